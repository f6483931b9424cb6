"""How exactly `run` and `plan` have a model computed: what --quantize, --activations and --exact ask for."""

from __future__ import annotations

import argparse
from typing import Any

from peerllm.errors import BadInputError
from peerllm.types import BITS

EXACT = {"dtype": "float32", "quantize": "none", "activations": "exact"}  # of a request to run or plan


class UsageError(BadInputError):
    """Options that contradict each other."""


def exactness(args: argparse.Namespace) -> dict[str, Any]:
    """The request's "quantize" and "activations", and "dtype" where --exact fixes it; UsageError if they contradict."""
    if not args.exact:
        return {"quantize": args.quantize, "activations": args.activations}
    for option, asked in (("--quantize", args.quantize), ("--activations", args.activations)):
        if asked in BITS:
            raise UsageError(f"--exact rounds nothing: leave out {option} {asked}")
    return EXACT
