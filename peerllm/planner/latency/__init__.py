"""The latency plan: any layer on any device, the least time for one request."""
