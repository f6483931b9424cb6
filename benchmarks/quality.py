"""What rounding the weights costs the built-in model: loss and top-1 agreement on dialogues it was never trained on.

Held-out commands (phrasings and verbs of no training dialogue), each with its right answer, are read token by token;
what counts are the answers' tokens. The engine's own shards compute, in float32 with the file's weights, then with
weights rounded to 8 and to 4 bits.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from tokenizers import Tokenizer

from peerllm.builtin import MODEL_DIR
from peerllm.builtin.chat import encode, render
from peerllm.builtin.dialogues import Dialogue
from peerllm.builtin.evaluate import held_out_commands
from peerllm.engine.base import Segment
from peerllm.engine.inspect import inspect_model
from peerllm.engine.messages import LoadStage
from peerllm.engine.shard import TorchShard, load_shard

CONTEXT, AT_ONCE = 192, 16
COMMANDS = 200

Read = tuple[torch.Tensor, torch.Tensor]  # of every token of an answer: log-probabilities [n, vocabulary], what it was


def whole(quantize: str) -> TorchShard:
    """The built-in model as one shard."""
    found = inspect_model(MODEL_DIR, "float32", quantize)
    last = len(found.profile.layers) - 1
    tensors = tuple({tensor.name: tensor for layer in found.tensors for tensor in layer}.values())
    spec = LoadStage(
        0, "0" * 32, 0, 0, 1, 0, last, found.config, tensors, found.dtype, AT_ONCE, CONTEXT, CONTEXT, AT_ONCE, None,
        None, "",
    )  # fmt: skip
    return load_shard(replace(spec, quantize=quantize))


def read(shard: TorchShard, rows: Sequence[tuple[list[int], list[bool]]]) -> Read:
    """Every row through the model, a token at a time, several rows at once."""
    seen: list[torch.Tensor] = []
    wanted: list[int] = []
    for first in range(0, len(rows), AT_ONCE):
        some = rows[first : first + AT_ONCE]
        for place in range(max(len(ids) for ids, _ in some) - 1):
            here = [(slot, ids, said) for slot, (ids, said) in enumerate(some) if place + 1 < len(ids)]
            segments = [Segment(slot, place, 1, True) for slot, _, _ in here]
            logits = shard.forward(torch.tensor([ids[place] for _, ids, _ in here]), segments)
            for row, (_, ids, said) in zip(logits.log_softmax(-1), here, strict=True):
                if said[place + 1]:
                    seen.append(row)
                    wanted.append(ids[place + 1])
        for slot in range(len(some)):
            shard.release(slot)
    return torch.stack(seen), torch.tensor(wanted)


def measure(commands: int) -> dict[str, dict[str, float]]:
    """By rounding: mean loss of the right tokens, share of places with float32's likeliest token, bytes of weights."""
    tokenizer = Tokenizer.from_file(str(Path(MODEL_DIR) / "tokenizer.json"))
    dialogues = [Dialogue(None, ((one.said, one.answer),)) for one in held_out_commands(commands)]
    rows = [(ids[:CONTEXT], said[:CONTEXT]) for ids, said in encode(tokenizer, [render(one) for one in dialogues])]
    found: dict[str, dict[str, float]] = {}
    best = torch.empty(0)
    for quantize in ("", "int8", "int4"):
        shard = whole(quantize)
        seen, wanted = read(shard, rows)
        best = best if quantize else seen.argmax(-1)
        found[quantize or "float32"] = {
            "tokens": len(wanted),
            "loss": float(-seen.gather(1, wanted.unsqueeze(1)).mean()),
            "top1_agreement": float((seen.argmax(-1) == best).float().mean()),
            "weight_bytes": shard.weight_bytes,
        }
        shard.close()
    return found


def table(found: dict[str, dict[str, float]]) -> str:
    """Markdown."""
    lines = ["| weights | loss per token | same likeliest token as float32 | weights in memory |", "|---|---|---|---|"]
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
