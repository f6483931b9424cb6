"""What single tokens of an answer are: their bytes, and where in its words they stand. No I/O."""
