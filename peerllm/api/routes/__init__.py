"""Routes as they are registered and described: one declaration for both."""
