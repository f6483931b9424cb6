"""What a token of a constrained answer costs beside one of a free answer: pairs of answers of one length, in one run.

With --logprobs N, what one costs that comes with its log probability and N likeliest ones.

Engines are real processes; times are those at which the source's engine tells tokens. The model is the built-in one,
or the one in --model. Its answer is a long JSON array of objects, so that masks are of all kinds: forced, few, most.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from llguidance import LLMatcher

from peerllm.api.text.answer_grammar import JSON_OPTIONS
from peerllm.builtin import MODEL_DIR
from peerllm.engine.messages import Constraint
from peerllm.types import Sampling
from tests.engine.engines import Cut, Deployed, deploy, devices, inspect

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 40},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "likes": {"type": "array", "items": {"enum": ["rain", "bread", "chess"]}, "maxItems": 2},
    },
    "required": ["name", "age", "likes"],
    "additionalProperties": False,
}
PEOPLE = {"type": "array", "items": PERSON, "minItems": 60}
PROMPT = tuple(range(20, 52))


async def step_ms(deployed: Deployed, tokens: int, seed: int, **more: Any) -> float:
    """Mean milliseconds of a token after the first ones."""
    source, told = deployed.source, list[float]()
    number = deployed.submit(PROMPT, tokens, Sampling(temperature=1.0, seed=seed), **more)
    for count in (8, tokens):
        await deployed.some(number, count)
        told.append(time.perf_counter())
    end = await deployed.ended(number)
    if end.finish != "length" or len(source.tokens(number)[0]) != tokens:
        raise SystemExit(f"the answer ended early: {end}")
    source.events.clear()
    return (told[1] - told[0]) / (tokens - 8) * 1e3


async def measured(model: Path, count: int, pairs: int, tokens: int, logprobs: int | None) -> dict[str, float]:
    grammar = LLMatcher.grammar_from_json_schema(PEOPLE, overrides=JSON_OPTIONS)
    more: dict[str, Any] = {"logprobs": logprobs}
    if logprobs is None:
        more = {"constraint": Constraint(grammar, str(model / "tokenizer.json"))}
    with tempfile.TemporaryDirectory() as folder:
        async with devices(count, Path(folder)) as made:
            last = len((await inspect(made[0], model)).tensors) - 1
            cut: Cut = tuple((at, at * (last + 1) // count, (at + 1) * (last + 1) // count - 1) for at in range(count))
            deployed = await deploy(made, model, cut, context=tokens + 64, chunk=64)
            for warm in ({}, more):
                await step_ms(deployed, tokens, 0, **warm)
            free, kept, ratios = list[float](), list[float](), list[float]()
            for pair in range(pairs):
                both = {}
                for one in ({}, more) if pair % 2 else (more, {}):
                    both[bool(one)] = await step_ms(deployed, tokens, pair, **one)
                free.append(both[False])
                kept.append(both[True])
                ratios.append(both[True] / both[False])
    names = {"free_ms": free, "constrained_ms" if logprobs is None else "logprobs_ms": kept, "ratio": ratios}
    return {name: round(median(values), 3) for name, values in names.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=MODEL_DIR)
    parser.add_argument("--pairs", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=300)
    parser.add_argument("--devices", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--logprobs", type=int)
    options = parser.parse_args()
    for count in options.devices:
        found = asyncio.run(measured(options.model, count, options.pairs, options.tokens, options.logprobs))
        print(json.dumps({"devices": count, **found}))


if __name__ == "__main__":
    main()
