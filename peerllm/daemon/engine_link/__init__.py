"""The daemon's side of its engine: the child process, its messages, and what it measured of this device."""
