"""The built-in model: its files, and how it is trained and measured. This file does not import torch."""

from pathlib import Path

BUILTIN = "builtin"  # what it is called
MODEL_DIR: Path = Path(__file__).resolve().parent / "model"
