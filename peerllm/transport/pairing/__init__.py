"""Pairing two devices with a short code spoken from one to the other (docs/wire.md §2)."""
