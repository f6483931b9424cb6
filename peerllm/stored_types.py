"""How numbers lie in model files, by the type name in the header: safetensors dtypes and GGML block types."""

from __future__ import annotations

from collections.abc import Mapping

# (numbers in a block, bytes of a block)
STORED_TYPES: Mapping[str, tuple[int, int]] = {
    "F64": (1, 8), "F32": (1, 4), "F16": (1, 2), "BF16": (1, 2), "F8_E4M3": (1, 1), "F8_E5M2": (1, 1),
    "I64": (1, 8), "I32": (1, 4), "I16": (1, 2), "I8": (1, 1), "U8": (1, 1), "BOOL": (1, 1),
    "Q4_0": (32, 18), "Q4_1": (32, 20), "Q5_0": (32, 22), "Q5_1": (32, 24), "Q8_0": (32, 34),
    "Q2_K": (256, 84), "Q3_K": (256, 110), "Q4_K": (256, 144), "Q5_K": (256, 176), "Q6_K": (256, 210),
    "IQ4_NL": (32, 18), "IQ4_XS": (256, 136), "MXFP4": (32, 17),
}  # fmt: skip
PLAIN_FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
FLOATS = PLAIN_FLOATS | {"F8_E4M3", "F8_E5M2"}
POOLING_FILE = "1_Pooling/config.json"  # how hidden states become one vector, as sentence-transformers writes it
TENSOR_LIST = "tensors.json"  # names, by absolute path, the files in which a directory's tensors lie (GGUF)


def stored_bytes(dtype: str, shape: tuple[int, ...]) -> int | None:
    """Bytes of a tensor in a file; None if the type is unknown or its rows are no whole number of blocks."""
    if dtype not in STORED_TYPES:
        return None
    numbers, size = STORED_TYPES[dtype]
    columns = shape[-1] if shape else 1
    if columns % numbers:
        return None
    total = columns // numbers * size
    for side in shape[:-1]:
        total *= side
    return total
