"""A shard of any family that transformers has: its own modules in torch compute one sequence after the other."""
