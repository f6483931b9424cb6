"""The binary frames of the data plane (docs/wire.md §4): what they hold, what a plan allows, bytes both ways."""
