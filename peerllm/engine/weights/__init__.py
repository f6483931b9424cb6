"""Checkpoints on disk: which tensors they hold, and how numbers are rounded to 8 or 4 bits."""
