"""Trains the built-in model from nothing: python -m peerllm.builtin.train (about 45 minutes on one free core)."""

from __future__ import annotations

import argparse
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm
from transformers import LlamaForCausalLM

from peerllm.builtin import MODEL_DIR
from peerllm.builtin.evaluate import evaluate, print_report
from peerllm.builtin.exchanges.dialogues import MIXES
from peerllm.builtin.packing import Packer
from peerllm.builtin.recipe import Recipe, build_model, build_optimizers
from peerllm.builtin.vocabulary import train_tokenizer
from peerllm.builtin.writing import record, save

SAVE_EVERY_STEPS = 100
_SMOOTHING = 0.95  # of the reported loss, from step to step


def loss_of(model: LlamaForCausalLM, ids: Tensor, weights: Tensor) -> Tensor:
    """Weighted mean next-token cross-entropy over rows of (count, length + 1)."""
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits
    each = functional.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    wanted = weights[:, 1:].flatten()
    return (each * wanted).sum() / wanted.sum()


@dataclass(slots=True)
class Trainer:
    """A training run: the model, its optimizers and data, and how far they have come."""

    recipe: Recipe
    tokenizer: Tokenizer = field(init=False)
    model: LlamaForCausalLM = field(init=False)
    optimizers: list[torch.optim.Optimizer] = field(init=False)
    packer: Packer = field(init=False)
    step: int = 0
    spent_s: float = 0.0
    loss: float = 0.0  # smoothed
    curve: list[dict[str, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.tokenizer = train_tokenizer(self.recipe.seed)
        self.model = build_model(self.recipe)
        self.optimizers = build_optimizers(self.model, self.recipe)
        self.packer = self._packer(0)

    def _packer(self, skip: int) -> Packer:
        mix = self.recipe.mix(self.step)
        return Packer(self.tokenizer, self.recipe.seed + 1 + mix, MIXES[mix], skip)

    def advance(self) -> None:
        """One step of all optimizers."""
        began = time.monotonic()
        if self.step in self.recipe.mixes_from_steps:
            self.packer = self._packer(0)
        length = self.recipe.row_tokens(self.step)
        loss = loss_of(self.model, *self.packer.rows(self.recipe.step_tokens // length, length))
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["full_rate"] * self.recipe.rate_share(self.step)
            optimizer.step()
            optimizer.zero_grad()
        self.loss = _SMOOTHING * self.loss + (1 - _SMOOTHING) * loss.item() if self.step else loss.item()
        self.step += 1
        self.spent_s += time.monotonic() - began

    def run(self, out: Path, state: Path | None) -> None:
        """Trains to the end; saves usable models into `out` meanwhile and, if asked, the training state."""
        if state and state.exists():
            self._go_on_from(state)
        self.model.train()
        with tqdm(initial=self.step, total=self.recipe.steps, unit="step", mininterval=5) as bar:
            while self.step < self.recipe.steps:
                self.advance()
                bar.set_postfix(loss=f"{self.loss:.3f}", refresh=False)
                bar.update()
                if self.step % SAVE_EVERY_STEPS == 0 or self.step == self.recipe.steps:
                    at = {"step": self.step, "loss": round(self.loss, 4), "spent_s": round(self.spent_s)}
                    self.curve.append(at)
                    save(self.model, self.tokenizer, out)
                    if state:
                        self._keep(state)

    def _keep(self, state: Path) -> None:
        kept: dict[str, Any] = {name: getattr(self, name) for name in ("step", "spent_s", "loss", "curve")}
        kept |= {"model": self.model.state_dict(), "optimizers": [o.state_dict() for o in self.optimizers]}
        torch.save(kept | {"drawn": self.packer.drawn}, state)

    def _go_on_from(self, state: Path) -> None:
        kept = torch.load(state)
        self.model.load_state_dict(kept.pop("model"))
        for optimizer, was in zip(self.optimizers, kept.pop("optimizers"), strict=True):
            optimizer.load_state_dict(was)
        drawn = kept.pop("drawn")
        for name, value in kept.items():
            setattr(self, name, value)
        self.packer = self._packer(drawn)


def main() -> None:
    """Reads the command line, trains, evaluates the files as written, and records recipe and results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=MODEL_DIR)
    parser.add_argument("--steps", type=int, default=Recipe().steps)
    parser.add_argument("--seed", type=int, default=Recipe().seed)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--state", type=Path, help="file that keeps the run's state, to go on from")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    trainer = Trainer(Recipe().scaled(args.steps, args.seed))
    trainer.run(args.out, args.state)
    report = evaluate(args.out)
    print_report(report)
    record(
        args.out,
        trainer.recipe,
        curve=trainer.curve,
        parameters=sum(p.numel() for p in trainer.model.parameters()),
        threads=args.threads,
        report=report,
    )


if __name__ == "__main__":
    main()
