"""A decoder block as operators: what mixes a token with those before it (a file each), experts and their routing."""
