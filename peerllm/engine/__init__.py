"""Load a shard, run a batch, sample, measure itself; a process of its own."""
