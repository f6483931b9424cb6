"""Products with matrices of a checkpoint as operators of a graph: dense, and experts."""
