"""The room of torch: load a shard, run a batch, sample, measure itself; its own process."""
