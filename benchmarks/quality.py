"""What rounding costs the built-in model, of weights or of what travels: loss and top-1 agreement on unseen dialogues.

Held-out commands (phrasings and verbs of no training dialogue), each with its right answer, are read token by token;
what counts are the answers' tokens. The engine's own shards compute, in float32 with the file's weights, then with
weights rounded to 8 and to 4 bits, and cut into two and three shards with hidden states as int8 between them: in
float32, which shows what that alone costs (a deployment never does it there), and in bfloat16.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer

from peerllm.builtin import MODEL_DIR
from peerllm.builtin.chat import encode, render
from peerllm.builtin.dialogues import Dialogue
from peerllm.builtin.evaluate import held_out_commands
from peerllm.engine.activations import restored, rounded
from peerllm.engine.base import Segment
from peerllm.engine.inspect import inspect_model
from peerllm.engine.messages import LoadStage
from peerllm.engine.shard import TorchShard, load_shard

CONTEXT, AT_ONCE = 192, 16
COMMANDS = 200

@dataclass(frozen=True, slots=True)
class Way:
    """How the model is computed; after each layer of `cuts` hidden states are rounded."""

    name: str
    dtype: str = "float32"
    quantize: str = "none"
    cuts: tuple[int, ...] = ()


WAYS = (  # the first is what the others are held against
    Way("float32"),
    Way("int8 weights", quantize="int8"),
    Way("int4 weights", quantize="int4"),
    Way("int8 on 1 hop", cuts=(6,)),
    Way("int8 on 2 hops", cuts=(4, 9)),
    Way("bfloat16", "bfloat16"),
    Way("bfloat16, int8 on 1 hop", "bfloat16", cuts=(6,)),
    Way("bfloat16, int8 on 2 hops", "bfloat16", cuts=(4, 9)),
)
Read = tuple[torch.Tensor, torch.Tensor]  # of every token of an answer: log-probabilities [n, vocabulary], what it was


class Chain:
    """The built-in model's shards one after another, hidden states rounded between them."""

    def __init__(self, way: Way) -> None:
        found = inspect_model(MODEL_DIR, way.dtype, way.quantize)
        ends = (*way.cuts, len(found.profile.layers) - 1)
        self.shards: list[TorchShard] = []
        for first, last in zip((0, *(cut + 1 for cut in way.cuts)), ends, strict=True):
            layers = found.tensors[first : last + 1]
            tensors = tuple({tensor.name: tensor for layer in layers for tensor in layer}.values())
            spec = LoadStage(
                0, "0" * 32, 0, 0, 1, first, last, found.config, tensors, found.dtype, AT_ONCE, CONTEXT, CONTEXT,
                AT_ONCE, None, None, "",
            )  # fmt: skip
            self.shards.append(load_shard(replace(spec, quantize=found.quantize)))
        self.weight_bytes = sum(shard.weight_bytes for shard in self.shards)

    def forward(self, rows: NDArray[Any], segments: Sequence[Segment]) -> NDArray[Any]:
        for shard in self.shards[:-1]:
            rows = shard.forward(rows, segments)
            rows = restored(*rounded(rows), rows.dtype)
        return self.shards[-1].forward(rows, segments)

    def release(self, slot: int) -> None:
        for shard in self.shards:
            shard.release(slot)

    def close(self) -> None:
        for shard in self.shards:
            shard.close()


def read(model: Chain, rows: Sequence[tuple[list[int], list[bool]]]) -> Read:
    """Every row through the model, a token at a time, several rows at once."""
    seen: list[torch.Tensor] = []
    wanted: list[int] = []
    for first in range(0, len(rows), AT_ONCE):
        some = rows[first : first + AT_ONCE]
        for place in range(max(len(ids) for ids, _ in some) - 1):
            here = [(slot, ids, said) for slot, (ids, said) in enumerate(some) if place + 1 < len(ids)]
            segments = [Segment(slot, place, 1, True) for slot, _, _ in here]
            logits = torch.from_numpy(model.forward(np.array([ids[place] for _, ids, _ in here]), segments))
            for row, (_, ids, said) in zip(logits.log_softmax(-1), here, strict=True):
                if said[place + 1]:
                    seen.append(row)
                    wanted.append(ids[place + 1])
        for slot in range(len(some)):
            model.release(slot)
    return torch.stack(seen), torch.tensor(wanted)


def measure(commands: int) -> dict[str, dict[str, float]]:
    """By way: mean loss of the right tokens, share of places with float32's likeliest token, bytes of weights."""
    tokenizer = Tokenizer.from_file(str(Path(MODEL_DIR) / "tokenizer.json"))
    dialogues = [Dialogue(None, ((one.said, one.answer),)) for one in held_out_commands(commands)]
    rows = [(ids[:CONTEXT], said[:CONTEXT]) for ids, said in encode(tokenizer, [render(one) for one in dialogues])]
    found: dict[str, dict[str, float]] = {}
    best = torch.empty(0)
    for way in WAYS:
        model = Chain(way)
        seen, wanted = read(model, rows)
        best = best if found else seen.argmax(-1)
        found[way.name] = {
            "tokens": len(wanted),
            "loss": float(-seen.gather(1, wanted.unsqueeze(1)).mean()),
            "top1_agreement": float((seen.argmax(-1) == best).float().mean()),
            "weight_bytes": model.weight_bytes,
        }
        model.close()
    return found


def table(found: dict[str, dict[str, float]]) -> str:
    """Markdown."""
    lines = ["| computed | loss per token | same likeliest token as float32 | weights in memory |", "|---|---|---|---|"]
    lines += [
        f"| {name} | {one['loss']:.4f} | {one['top1_agreement']:.2%} | {one['weight_bytes'] / 1e6:.1f} MB |"
        for name, one in found.items()
    ]
    return "\n".join(lines) + f"\n\n{found['float32']['tokens']} tokens of answers."


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--commands", type=int, default=COMMANDS)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    found = measure(args.commands)
    print(json.dumps(found) if args.json else table(found))


if __name__ == "__main__":
    main()
