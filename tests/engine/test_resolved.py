"""What weights are rounded to, where that is left open and where it is not."""

from __future__ import annotations

import pytest

from peerllm.engine.checkpoint import resolve


@pytest.mark.parametrize(
    ("asked", "dtype", "accelerator", "found"),
    [
        ("auto", "bfloat16", False, "int8"),
        ("auto", "float16", False, "int8"),
        ("auto", "float32", False, ""),
        ("auto", "bfloat16", True, ""),
        ("none", "bfloat16", False, ""),
        ("int4", "float32", True, "int4"),
    ],
)
def test_resolved(asked: str, dtype: str, accelerator: bool, found: str) -> None:
    assert resolve(asked, dtype, accelerator) == found
