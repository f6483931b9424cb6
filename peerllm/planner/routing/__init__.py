"""Throughput plans: one contiguous shard per device around a ring, the least max(bottleneck, ring / micro-batches)."""
