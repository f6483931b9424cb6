"""Latency search for any layers: label setting under a Lagrangian bound on memory."""
