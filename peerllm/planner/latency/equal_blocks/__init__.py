"""Latency plans of models whose blocks are all alike: visits again to a device become relays, which hold nothing."""
