"""Ollama's API at the root path: its requests into the shared form, the shared events into its answers."""
