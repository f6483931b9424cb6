"""Sequences, their batches and chunks: what is computed next, and when an answer ends."""
