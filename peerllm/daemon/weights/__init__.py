"""Weights between devices: what a source offers, and what the others fetched and keep. Never a path given by a peer."""
