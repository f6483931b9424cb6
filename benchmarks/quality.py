"""What rounding costs: perplexity on WikiText-2, and how often the likeliest token stays that of float32.

    python -m benchmarks.quality MODEL_DIR TEXT

TEXT is WikiText-2's validation split. Its first tokens are read in windows; every token of a window but the first
counts. The engine's own shards compute: the model's blocks in one or several with hidden states handed on exactly or
as int8, and its head in one of its own, which gives logits for every token.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from peerllm.engine.backends import Backends
from peerllm.engine.base import Shard
from peerllm.engine.messages import Inspect, LoadStage
from peerllm.engine.wire.quantised import restored, rounded
from peerllm.transport.frames.token_run import TokenRun

WINDOW, WINDOWS, CHUNK = 1024, 8, 128  # tokens, windows, tokens of one pass


@dataclass(frozen=True, slots=True)
class Way:
    """How the model is computed, on `hops` + 1 devices with hidden states as int8 between them."""

    name: str
    dtype: str
    quantize: str
    hops: int = 0


WAYS = (  # the first is what the others are held against
    Way("float32 (`--exact`)", "float32", "none"),
    Way("bfloat16, by torch (`--quantize none`)", "bfloat16", "none"),
    Way("int8 (the default)", "auto", "int8"),
    Way("int8, int8 on 1 hop", "auto", "int8", 1),
    Way("int8, int8 on 2 hops", "auto", "int8", 2),
    Way("int4", "auto", "int4"),
    Way("int4, int8 on 1 hop", "auto", "int4", 1),
)


class Chain:
    """The model's shards one after another, the last of them its head alone."""

    def __init__(self, model: Path, way: Way) -> None:
        backends = Backends()
        backends.facts()
        found = backends.inspect(Inspect(0, str(model), way.dtype, way.quantize))
        head = len(found.profile.layers) - 1
        ends = [head * (turn + 1) // (way.hops + 1) - 1 for turn in range(way.hops + 1)]
        self._shards: list[Shard] = []
        for first, last in zip((0, *(end + 1 for end in ends)), (*ends, head), strict=True):
            tensors = {tensor.name: tensor for layer in found.tensors[first : last + 1] for tensor in layer}
            slots = CHUNK if first == head else 1
            spec = LoadStage(
                0, "0" * 32, 0, 0, 1, first, last, found.config, tuple(tensors.values()), found.dtype, slots, WINDOW,
                CHUNK, slots, None, None, "", quantize=found.quantize,
            )  # fmt: skip
            self._shards.append(backends.load(spec, lambda done, total: None))
        self.weight_bytes = sum(shard.weight_bytes for shard in self._shards)

    def logits(self, window: NDArray[np.int64], first: int) -> NDArray[Any]:
        """Of each token of the chunk that begins at `first`, float32 [n, vocabulary]."""
        rows: NDArray[Any] = window[first : first + CHUNK]
        for number, shard in enumerate(self._shards[:-1]):
            if number:
                rows = restored(*rounded(rows), rows.dtype)
            rows = shard.forward(rows, [TokenRun(0, 0, first, len(rows))])
        return self._shards[-1].forward(rows, [TokenRun(slot, slot, 0, 1, True) for slot in range(len(rows))])

    def close(self) -> None:
        for shard in self._shards:
            shard.close()


def read(model: Chain, windows: Sequence[NDArray[np.int64]]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Of every token but a window's first: its loss, and the token that was likeliest in its place."""
    losses, likeliest = [], []
    for window in windows:
        for first in range(0, len(window), CHUNK):
            logits = model.logits(window, first)
            wanted = window[first + 1 : first + 1 + CHUNK]
            logits = logits[: len(wanted)].astype(np.float64)
            logits -= logits.max(1, keepdims=True)
            losses.append(np.log(np.exp(logits).sum(1)) - logits[np.arange(len(wanted)), wanted])
            likeliest.append(logits.argmax(1))
    return np.concatenate(losses), np.concatenate(likeliest)


def measure(directory: Path, text: Path, count: int) -> dict[str, dict[str, float]]:
    """By way."""
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    ids = np.array(tokenizer.encode(text.read_text(encoding="utf-8"), add_special_tokens=False).ids, np.int64)
    windows = [ids[start : start + WINDOW] for start in range(0, count * WINDOW, WINDOW)]
    found: dict[str, dict[str, float]] = {}
    best: NDArray[Any] | None = None
    for way in WAYS:
        model = Chain(directory, way)
        losses, likeliest = read(model, windows)
        best = likeliest if best is None else best
        found[way.name] = {
            "tokens": len(losses),
            "perplexity": math.exp(losses.mean()),
            "top1_agreement": float((likeliest == best).mean()),
            "weight_bytes": model.weight_bytes,
        }
        model.close()
    return found


def table(found: dict[str, dict[str, float]]) -> str:
    """Markdown."""
    base = next(iter(found.values()))
    lines = ["| computed | perplexity | | same likeliest token | weights in memory |", "|---|---|---|---|---|"]
    lines += [
        f"| {name} | {one['perplexity']:.3f} | {one['perplexity'] / base['perplexity'] - 1:+.2%} "
        f"| {one['top1_agreement']:.2%} | {one['weight_bytes'] / 1e6:.0f} MB |"
        for name, one in found.items()
    ]
    return "\n".join(lines) + f"\n\n{base['tokens']} tokens."


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--windows", type=int, default=WINDOWS)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(argv)
    found = measure(args.model, args.text, args.windows)
    print(json.dumps(found) if args.json else table(found))


if __name__ == "__main__":
    main()
