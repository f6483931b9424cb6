"""Matrices rounded to 8 or 4 bits: which they are, how they are rounded, and what multiplies with them."""
