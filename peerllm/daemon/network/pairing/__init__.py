"""Pairing as one device does it: opening its door, finding another one's."""
