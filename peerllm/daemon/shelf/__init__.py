"""The models that lie on this device's disk: found, fetched, called by other names, deleted."""
