"""Anthropic's Messages: its requests into the shared form, the shared events into its answers."""
