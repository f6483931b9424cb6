"""A shard of any family that transformers has, computed by its own modules in torch, one sequence after the other."""
