"""Pure functions from profiles to plans: no I/O, no clock, no torch."""
