"""The throughput plan: one contiguous shard per device around a ring, and the micro-batches that fill it."""
