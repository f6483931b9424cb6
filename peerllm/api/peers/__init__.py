"""Requests between the devices' APIs: those passed on to a model's source, and those taken from other devices."""
