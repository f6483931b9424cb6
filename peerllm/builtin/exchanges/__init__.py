"""What the built-in model is trained on: exchanges of many kinds, drawn from a seed."""
