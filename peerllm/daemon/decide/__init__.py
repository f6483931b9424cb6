"""Decisions without I/O, clocks or threads: who is here, who holds what, what fits, who waits."""
