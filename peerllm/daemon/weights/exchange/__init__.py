"""Tensors by content: who has which, fetched from several places at once, offered to others."""
