"""OpenAI's Responses, as the Open Responses specification has them: items in, items out, each step an event."""
