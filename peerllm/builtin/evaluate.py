"""Measures the built-in model as shipped: python -m peerllm.builtin.evaluate (exits 1 below the goal)."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import torch

from peerllm.builtin import MODEL_DIR
from peerllm.builtin.answering import Answerer, Messages, one
from peerllm.builtin.exchanges import story_parts
from peerllm.builtin.exchanges.dialogues import KINDS, dialogue
from peerllm.builtin.exchanges.home import Command, command, follow_up, fresh_command
from peerllm.builtin.exchanges.stories import story
from peerllm.builtin.exchanges.sums import Sum, sum_question
from peerllm.builtin.exchanges.units import unit_question

GOAL = 0.9  # exact match of the JSON action on the held-out commands
TEST_SEED = 977
STORY_TOKENS = 600
_NO_STORY = {kind: part for kind, part in KINDS.items() if kind != "story"}
LONG_TALK = 6  # dialogues before a command that comes late in a conversation


def held_out_commands(count: int, seed: int = TEST_SEED) -> list[Command]:
    """Commands whose verb, core and carrier are all in no training command."""
    rng = Random(seed)  # noqa: S311 - data, not secrets
    return [command(rng, held_out=True) for _ in range(count)]


def share(hits: Sequence[bool]) -> float:
    """The share of hits, to four places."""
    return round(sum(hits) / len(hits), 4) if hits else 0.0


def evaluate(folder: Path = MODEL_DIR, count: int = 600) -> dict[str, Any]:
    """All measures, each on fresh draws from the test seed; shares are from 0 to 1."""
    model, rng = Answerer(folder), Random(TEST_SEED + 1)  # noqa: S311 - data, not secrets
    unseen = held_out_commands(count)
    hits = _action_hits(model, unseen)
    seen = [command(rng) for _ in range(count // 3)]
    report: dict[str, Any] = {
        "held_out_commands": count,
        "held_out_exact_match": share(hits),
        "held_out_where_sentence_decides": share([h for h, c in zip(hits, unseen, strict=True) if not c.verb_decides]),
        "held_out_where_verb_decides": share([h for h, c in zip(hits, unseen, strict=True) if c.verb_decides]),
        "held_out_commands_where_verb_decides": sum(c.verb_decides for c in unseen),
        "fresh_exact_match": share(_action_hits(model, _fresh(count // 3))),
        "trained_phrasing_exact_match": share(_action_hits(model, seen)),
        "follow_up_exact_match": _follow_ups(model, rng, count // 6),
    }
    for name, largest in (("", 99), ("three_digit_", 999)):
        sums = [sum_question(rng, held_out=True, largest=largest) for _ in range(count // 2)]
        if name:
            sums = [s for s in sums if re.search(r"\d{3}", s.said) and s.kind in ("addition", "subtraction")]
        right = _result_hits(model, sums)
        for kind in ("addition", "subtraction", "product", "quotient")[: 2 if name else 4]:
            report[name + kind] = share([h for h, s in zip(right, sums, strict=True) if s.kind == kind])
    report["conversion"] = share(_result_hits(model, [unit_question(rng, held_out=True) for _ in range(count // 6)]))
    report["held_out_late_in_a_talk"] = _late(model, rng, count // 6)
    return report | _stories(model, rng, 20)


def _fresh(count: int) -> list[Command]:
    rng = Random(TEST_SEED + 2)  # noqa: S311 - data, not secrets
    return [fresh_command(rng) for _ in range(count)]


def misses(folder: Path, count: int) -> list[tuple[str, str, str]]:
    """The held-out commands that were answered wrongly: the command, the wanted and the given answer."""
    model, asked = Answerer(folder), held_out_commands(count)
    came = model.answers([one(c.said) for c in asked])
    return [(c.said, c.answer, a) for c, a in zip(asked, came, strict=True) if not same_action(a, c.answer)]


def same_action(came: str, wanted: str) -> bool:
    """Whether the answer's last line equals that of the wanted answer, letter by letter."""
    return came.strip().split("\n")[-1] == wanted.rsplit("\n", maxsplit=1)[-1]


def _action_hits(model: Answerer, asked: Sequence[Command]) -> list[bool]:
    came = model.answers([one(c.said) for c in asked])
    return [same_action(answer, c.answer) for answer, c in zip(came, asked, strict=True)]


def _result_hits(model: Answerer, asked: Sequence[Sum]) -> list[bool]:
    came = model.answers([one(s.said) for s in asked])
    return [answer.strip().endswith(f" {s.result}") for answer, s in zip(came, asked, strict=True)]


def _follow_ups(model: Answerer, rng: Random, count: int) -> float:
    prompts: list[Messages] = []
    wanted: list[str] = []
    while len(prompts) < count:
        first = command(rng)
        later = follow_up(rng, first)
        if later:
            prompts.append([*one(first.said), {"role": "assistant", "content": first.answer}, *one(later[0])])
            wanted.append(later[1])
    return share([same_action(a, w) for a, w in zip(model.answers(prompts), wanted, strict=True)])


def _stories(model: Answerer, rng: Random, count: int) -> dict[str, Any]:
    asked = [story(rng)[0] for _ in range(count)]
    told = model.answers([one(a) for a in asked], STORY_TOKENS)
    words = sorted(len(text.split()) for text in told)
    return {
        "stories": count,
        "story_words_median": words[count // 2],
        "stories_brought_to_an_end": share([text.endswith(".") for text in told]),
        "stories_with_no_paragraph_twice": share([_no_repeats(text) for text in told]),
        "stories_with_what_was_wished": share([_kept(a, text) for a, text in zip(asked, told, strict=True)]),
    }


def _kept(asked: str, told: str) -> bool:
    names = (*story_parts.HEROES, *story_parts.THINGS, *story_parts.HELPERS)
    return all(name in told for name in names if f"a {name}" in asked)


def _late(model: Answerer, rng: Random, count: int) -> float:
    prompts: list[Messages] = []
    for asked in held_out_commands(count):
        before = [message for _ in range(LONG_TALK) for message in dialogue(rng, _NO_STORY).messages()]
        prompts.append([m for m in before if m["role"] != "system"] + one(asked.said))
    came = model.answers(prompts)
    return share([same_action(a, c.answer) for a, c in zip(came, held_out_commands(count), strict=True)])


def _no_repeats(text: str) -> bool:
    lines = text.split("\n")
    return len(lines) == len(set(lines))


def print_report(report: dict[str, Any]) -> None:
    """One measure a line."""
    for name, value in report.items():
        print(f"{name:40} {value}")


def main() -> None:
    """Prints the report, and the misses if asked; exits 1 if the goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=MODEL_DIR)
    parser.add_argument("--count", type=int, default=600)
    parser.add_argument("--misses", action="store_true", help="print the commands gone wrong instead")
    parser.add_argument("--record", action="store_true", help="write the report into the model's recipe.json")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.misses:
        for said, wanted, came in misses(args.model, args.count):
            print(f"{said}\n  wanted {wanted!r}\n  came   {came!r}")
        return
    report = evaluate(args.model, args.count)
    print_report(report)
    if args.record:
        file = args.model / "recipe.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"results": report}, indent=1) + "\n")
    sys.exit(report["held_out_exact_match"] < GOAL)


if __name__ == "__main__":
    main()
