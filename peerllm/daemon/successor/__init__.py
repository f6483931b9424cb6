"""Coordinator loss: what the next device in a plan's order keeps ready, and how it takes over."""
