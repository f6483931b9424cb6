"""Decisions without I/O, clocks or threads: membership, promised memory, plans, assignments, the queue for slots."""
