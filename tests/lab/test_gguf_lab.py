"""GGUF files over three hosts: with --exact the tokens of transformers, and without it what llama.cpp would say."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.quality import Chain, Way
from peerllm.api.text.model_text import ModelText
from peerllm.cli.demo.demo_memory import limits, sizes_of
from peerllm.daemon.weights.gguf.model_directory import model_directory
from tests.lab.real_gguf import FILES, real_gguf
from tests.lab.test_real_models_lab import API, ASK, NAMES, hosts

pytestmark = [pytest.mark.lab, pytest.mark.timeout(1800)]
TOKENS, CONTEXT = 64, 512
FULL = os.environ.get("PEERLLM_FULL") == "1"
# Of the likeliest tokens along transformers' text, where activations are rounded to 8 bits; of three prompts, which
# have some 90 places, a little less.
AGREEMENT = 0.97 if FULL else 0.94
PROMPTS = (
    "What is the capital of France?", "Write one sentence about the sea.", "Count from one to ten.",
    "Why is the sky blue?", "Name three animals that live in the forest.", "How do I boil an egg?",
    "Tell me a short story about a lighthouse.", "What does a compass do?", "Explain photosynthesis to a child.",
    "List the months of the year.", "Translate to French: good morning.", "What is seven times eight?",
    "Write a haiku about autumn.", "Who wrote Hamlet?", "What is a prime number?", "Give me a recipe for pancakes.",
    "How far is the moon?", "Describe a rainy day in a city.", "What are the colours of the rainbow?",
    "Write a polite letter that declines an invitation.",
)  # fmt: skip
ASKED = PROMPTS if FULL else PROMPTS[:3]


@pytest.fixture(params=sorted(FILES))
def file(request: pytest.FixtureRequest) -> Path:
    return real_gguf(request.param)


@cache
def directory_of(file: Path) -> Path:
    return model_directory([file], file.parent / "gguf")


@cache
def said_by_transformers(file: Path) -> list[tuple[list[int], list[int]]]:
    """(token ids of the prompt, token ids of the answer) in float32, for each prompt."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
    config.quantization_config = None  # its numbers are put in here
    with torch.device("meta"):
        outline = AutoModelForCausalLM.from_config(config)
    tensors = load_gguf_checkpoint(str(file), return_tensors=True, model_to_load=outline)["tensors"]
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    found = model.load_state_dict({name: torch.as_tensor(one) for name, one in tensors.items()}, strict=False)
    assert set(found.missing_keys) <= {"lm_head.weight"}, found
    assert not found.unexpected_keys, found
    text, said = ModelText(directory_of(file)), []
    for prompt in ASKED:
        ids = text.prompt([{"role": "user", "content": prompt}], 1024)
        with torch.inference_mode():
            made = model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=TOKENS)
        said.append((ids, made[0, len(ids) :].tolist()))
    return said


def answers(lab: Any, token: str, model: str) -> Iterator[list[int]]:
    bodies = [
        {"model": model, "temperature": 0, "max_tokens": TOKENS, "return_token_ids": True,
         "messages": [{"role": "user", "content": prompt}]}
        for prompt in ASKED
    ]  # fmt: skip
    argv = [sys.executable, "-c", ASK, f"http://{API}", token]
    done = lab.run(0, argv, input=json.dumps(bodies), timeout_s=1500)
    for line in done.stdout.splitlines():
        yield json.loads(line)["token_ids"]


def without_end(ids: Sequence[int], directory: Path) -> list[int]:
    ends = json.loads((directory / "generation_config.json").read_text())["eos_token_id"]
    return [token for token in ids if token not in ends]


def test_three_hosts_say_exactly_what_transformers_says(tmp_path: Path, file: Path) -> None:
    expected = said_by_transformers(file)
    memory = limits(sizes_of(directory_of(file), 1, CONTEXT, "float32", "none"), 3)
    with hosts(tmp_path, memory) as (lab, devices):
        devices[0].cli("run", str(file), "--slots", "1", "--context", str(CONTEXT), "--exact")
        deployment = devices[0].status()["deployments"][0]
        assert {stage["device"] for stage in deployment["plan"]["stages"]} == set(NAMES)
        found = list(answers(lab, devices[0].token(), deployment["model"]))
    directory = directory_of(file)
    assert [without_end(one, directory) for one in found] == [without_end(one, directory) for _, one in expected]


@pytest.mark.parametrize("hops", [0, 2])
def test_rounded_activations_leave_the_likeliest_token(file: Path, hops: int) -> None:
    """Over one shard and over three, with hidden states handed on exactly."""
    model = Chain(directory_of(file), Way("stored", "auto", "auto", hops, exact_hops=True))
    agreed = total = 0
    for prompt, answer in said_by_transformers(file):
        ids = np.array([*prompt, *answer], np.int64)
        likeliest = np.concatenate([model.logits(ids, first).argmax(1) for first in range(0, len(ids), 128)])
        found = likeliest[len(prompt) - 1 : -1]
        agreed, total = agreed + int((found == answer).sum()), total + len(answer)
    model.close()
    print(f"{file.name}, {hops} hops: {agreed} of {total} ({agreed / total:.2%})")
    assert agreed >= AGREEMENT * total
