"""The source's sequences of a deployment: who waits, who has a slot, and what comes of each."""
