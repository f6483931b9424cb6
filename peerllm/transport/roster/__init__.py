"""The household's signed list of devices (docs/wire.md §3)."""
