"""Calls of tools in a model's text: which form they have, and what of a growing text is one. No I/O."""
