"""What rounding costs: perplexity on WikiText-2, and how often the likeliest token stays that of float32.

    python -m benchmarks.quality MODEL TEXT [--llama-perplexity PROGRAM]

MODEL is a model directory or a GGUF file, TEXT is WikiText-2's validation split. Its first tokens are read in windows;
every token of a window but the first counts. The engine's own shards compute: the model's blocks in one or several
with hidden states handed on exactly or as int8, and its head in one of its own, which gives logits for every token.

Of a GGUF file llama.cpp's program reads the same text beside ours, and its way of counting is taken: windows of 512
tokens whose first is the token that begins a text, where the model has one, and whose second half counts.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from peerllm.daemon.weights.gguf.model_directory import model_directory
from peerllm.engine.backends import Backends
from peerllm.engine.base import Shard
from peerllm.engine.messages import Inspect, LoadStage
from peerllm.engine.wire.quantised import dequantise, quantise
from peerllm.transport.frames.token_run import TokenRun

WINDOW, WINDOWS, CHUNK = 1024, 8, 128  # tokens, windows, tokens of one pass


Figures = dict[str, dict[str, float]]


@dataclass(frozen=True, slots=True)
class Way:
    """How the model is computed, on `hops` + 1 devices with hidden states between them as int8, or exactly."""

    name: str
    dtype: str
    quantize: str
    hops: int = 0
    exact_hops: bool = False


WAYS = (  # the first is what the others are held against
    Way("float32 (`--exact`)", "float32", "none"),
    Way("bfloat16, by torch (`--quantize none`)", "bfloat16", "none"),
    Way("int8 (the default)", "auto", "int8"),
    Way("int8, int8 on 1 hop", "auto", "int8", 1),
    Way("int8, int8 on 2 hops", "auto", "int8", 2),
    Way("int4", "auto", "int4"),
    Way("int4, int8 on 1 hop", "auto", "int4", 1),
)
STORED_WAYS = (  # of a GGUF file
    Way("float32 (`--exact`)", "float32", "none"),
    Way("the file's numbers (the default)", "auto", "auto"),
    Way("on three devices", "auto", "auto", 2, exact_hops=True),
    Way("int8 on 2 hops", "auto", "auto", 2),
)
LLAMA_WINDOW = 512  # tokens


class Chain:
    """The model's shards one after another, the last of them its head alone."""

    def __init__(self, model: Path, way: Way) -> None:
        backends = Backends()
        backends.facts()
        found = backends.inspect(Inspect(0, str(model), way.dtype, way.quantize))
        head = len(found.profile.layers) - 1
        ends = [head * (turn + 1) // (way.hops + 1) - 1 for turn in range(way.hops + 1)]
        self._exact_hops = way.exact_hops
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
            if number and not self._exact_hops:
                rows = dequantise(*quantise(rows), rows.dtype)
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


def windows_of(directory: Path, text: Path, count: int, length: int, begins: bool) -> list[NDArray[np.int64]]:
    """The text's first windows; `begins`: the first token of each becomes the one that begins a text, if there is."""
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer.encode_special_tokens = True  # "<unk>" in the text is text, as llama.cpp reads it
    ids = np.array(tokenizer.encode(text.read_text(encoding="utf-8"), add_special_tokens=begins).ids, np.int64)
    windows = [ids[start : start + length].copy() for start in range(0, count * length, length)]
    empty = tokenizer.encode("").ids
    if begins and empty:
        for window in windows:
            window[0] = empty[0]
    return windows


def measure(directory: Path, windows: Sequence[NDArray[np.int64]], ways: Sequence[Way], half: bool) -> Figures:
    """By way; `half`: only the second half of each window counts."""
    found: Figures = {}
    best: NDArray[Any] | None = None
    counted = np.concatenate([np.arange(len(one) - 1) >= (len(one) // 2 if half else 0) for one in windows])
    for way in ways:
        model = Chain(directory, way)
        losses, likeliest = (array[counted] for array in read(model, windows))
        best = likeliest if best is None else best
        found[way.name] = {
            "tokens": len(losses),
            "perplexity": math.exp(losses.mean()),
            "top1_agreement": float((likeliest == best).mean()),
            "weight_bytes": model.weight_bytes,
        }
        model.close()
    return found


def llama_perplexity(program: Path, file: Path, text: Path, count: int) -> float:
    """What llama.cpp prints for the same windows."""
    argv = [program, "-m", file, "-f", text, "-c", str(LLAMA_WINDOW), "-b", str(LLAMA_WINDOW), "--chunks", str(count)]
    done = subprocess.run([str(one) for one in argv], capture_output=True, check=True, text=True)
    found = re.search(r"Final estimate: PPL = ([\d.]+)", done.stdout + done.stderr)
    if found is None:
        raise RuntimeError(f"{program} printed no perplexity: {done.stderr[-500:]}")
    return float(found[1])


def table(found: Figures) -> str:
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
    parser.add_argument("--llama-perplexity", type=Path, help="llama.cpp's program, for a GGUF file")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(argv)
    stored = args.model.suffix == ".gguf"
    with tempfile.TemporaryDirectory() as scratch:
        directory = model_directory([args.model], Path(scratch)) if stored else args.model
        length = LLAMA_WINDOW if stored else WINDOW
        windows = windows_of(directory, args.text, args.windows, length, begins=stored)
        found = measure(directory, windows, STORED_WAYS if stored else WAYS, half=stored)
    print(json.dumps(found) if args.json else table(found))
    if args.llama_perplexity:
        print(f"\nllama.cpp: {llama_perplexity(args.llama_perplexity, args.model, args.text, args.windows):.4f}")


if __name__ == "__main__":
    main()
