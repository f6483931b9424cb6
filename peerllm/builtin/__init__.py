"""The model that comes inside the package: where it lies; nothing here imports torch."""

from pathlib import Path

MODEL_DIR: Path = Path(__file__).resolve().parent / "model"
