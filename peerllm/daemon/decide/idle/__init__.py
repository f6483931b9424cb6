"""Of models that nobody asks for, and of those that requests start."""
