"""The forms in which checkpoints store rounded matrices, each read as whole numbers without rounding again."""
