"""GGUF files for tests of where models come from: a true header, a vocabulary, and tensors of zeros."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from gguf import GGUFWriter

ROWS = 64
SMALL = 16  # numbers of the third tensor


def gguf_file(path: Path, words: int = 300, rows: int = ROWS) -> Path:
    """A file with two tensors, a small one and `words` tokens."""
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = GGUFWriter(path, "llama")
    writer.add_token_list([f"token {number}" for number in range(words)])
    writer.add_token_scores([0.5] * words)
    for name in ("token_embd.weight", "output.weight"):
        writer.add_tensor(name, np.zeros((rows, 32), np.float32))
    writer.add_tensor("rope_freqs.weight", np.full(SMALL, 8.0, np.float32))  # which the translation reads
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
