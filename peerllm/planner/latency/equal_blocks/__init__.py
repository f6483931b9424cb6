"""Latency search for models whose blocks are all equal: second visits to a device become relays without layers."""
