"""Real text over two and three hosts on a bridge: SmolLM2 and the built-in model say what one device says."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from peerllm.builtin import MODEL_DIR
from peerllm.cli.demo.demo_memory import limits, sizes_of
from peerllm.engine.backends import Backends
from peerllm.engine.messages import Inspect, LoadStage
from tests.engine.runs import in_slot
from tests.household import Device
from tests.lab.netns import Lab
from tests.lab.smollm2 import smollm2
from tests.sizes import FULL

pytestmark = [pytest.mark.lab, pytest.mark.timeout(900)]
COUNTS = (2, 3) if FULL else (3,)  # hosts
NAMES = ("laptop", "mini-pc", "jetson")
QUESTIONS = ("What is the capital of France?", "Write one sentence about the sea.", "Count from one to ten.")
TOKENS, SLOTS, CONTEXT = 32, 1, 512
API = "127.0.0.1:8642"
EXACT = ("--exact",)
ASK = """
import json, sys, urllib.request
url, token = sys.argv[1:]
for body in json.load(sys.stdin):
    request = urllib.request.Request(url + "/v1/chat/completions", json.dumps(body).encode(), headers={
        "Content-Type": "application/json", "Authorization": "Bearer " + token})
    print(json.dumps(json.load(urllib.request.urlopen(request, timeout=240))["choices"][0]))
"""


@contextmanager
def hosts(root: Path, memory: Sequence[int]) -> Iterator[tuple[Lab, list[Device]]]:
    """Paired devices, each in a namespace of its own."""
    with Lab(len(memory)) as lab:
        made = [
            Device(root / name, name, memory=str(lent), prefix=lab.argv(host, []), port=8643, api=API)
            for host, (name, lent) in enumerate(zip(NAMES, memory, strict=False))
        ]
        try:
            for device in made:
                device.start()
            for device in made:
                device.wait_ready()
            for device in made[1:]:
                device.cli("join", made[0].cli("invite").stdout.split()[-1])
            yield lab, made
        finally:
            for device in made:
                device.stop()


def answers(lab: Lab, source: Device, model: str) -> list[dict[str, Any]]:
    bodies = [
        {"model": model, "temperature": 0, "max_tokens": TOKENS, "return_token_ids": True,
         "messages": [{"role": "user", "content": question}]}
        for question in QUESTIONS
    ]  # fmt: skip
    argv = [sys.executable, "-c", ASK, f"http://{API}", source.token()]
    done = lab.run(0, argv, input=json.dumps(bodies), timeout_s=600)
    return [json.loads(line) for line in done.stdout.splitlines()]


@cache
def prompts(directory: Path) -> tuple[tuple[list[int], ...], set[int]]:
    """Token ids of the questions, and those that end an answer."""
    from transformers import AutoTokenizer, GenerationConfig

    tokenizer = AutoTokenizer.from_pretrained(directory)
    asked = [[{"role": "user", "content": question}] for question in QUESTIONS]
    ids = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=True)["input_ids"]
    ends = GenerationConfig.from_pretrained(directory).eos_token_id
    return tuple(ids), {ends} if isinstance(ends, int) else set(ends)


@cache
def in_float32(directory: Path) -> list[list[int]]:
    """What transformers says."""
    from transformers import AutoModelForCausalLM

    model, said = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32), []
    for ids in prompts(directory)[0]:
        with torch.inference_mode():
            made = model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=TOKENS)
        said.append(made[0, len(ids) :].tolist())
    return said


@cache
def on_one_device(directory: Path) -> list[list[int]]:
    """What all layers in one shard say, in the form that is computed by default."""
    backend = Backends()
    inspected = backend.inspect(Inspect(0, str(directory), "auto", "auto"))
    tensors = tuple({one.name: one for layer in inspected.tensors for one in layer}.values())
    last = len(inspected.profile.layers) - 1
    shard = backend.load(
        LoadStage(0, "", 1, 0, 1, 0, last, inspected.config, tensors, inspected.dtype, 1, CONTEXT, 128, 1, None, None,
                  "", quantize=inspected.quantize),
        lambda done, total: None,
    )  # fmt: skip
    ids, ends = prompts(directory)
    said: list[list[int]] = []
    for prompt in ids:
        shard.release(0)
        given, position, answer = np.array(prompt), 0, list[int]()
        while len(answer) < TOKENS and not (answer and answer[-1] in ends):
            logits = shard.forward(given, [in_slot(0, position, len(given), sample=True)])
            position += len(given)
            answer.append(int(logits[0].argmax()))
            given = np.array(answer[-1:])
        said.append(answer)
    shard.close()
    return said


def without_end(ids: Sequence[int], directory: Path) -> list[int]:
    return [token for token in ids if token not in prompts(directory)[1]]


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize(
    ("name", "options"), [("smollm2", ()), ("smollm2", EXACT), ("builtin", ())], ids=["smollm2", "exact", "builtin"]
)
def test_hosts_say_what_one_device_says(tmp_path: Path, name: str, options: tuple[str, ...], count: int) -> None:
    directory = MODEL_DIR if name == "builtin" else smollm2()
    exact = bool(options) or name == "builtin"  # which is computed in float32 anyway
    form = ("float32", "none") if exact else ("auto", "auto")
    expected = in_float32(directory) if exact else on_one_device(directory)
    memory = limits(sizes_of(directory, SLOTS, CONTEXT, *form), count)
    with hosts(tmp_path, memory) as (lab, devices):
        model = name if name == "builtin" else str(directory)
        devices[0].cli("run", model, "--slots", str(SLOTS), "--context", str(CONTEXT), *options)
        deployment = devices[0].status()["deployments"][0]
        assert {stage["device"] for stage in deployment["plan"]["stages"]} == set(NAMES[:count])
        said = answers(lab, devices[0], deployment["model"])
    for question, one in zip(QUESTIONS, said, strict=True):
        print(f"{name}, {count} hosts{' --exact' * bool(options)}: {question} -> {one['message']['content']!r}")
    found = [without_end(one["token_ids"], directory) for one in said]
    assert found == [without_end(ids, directory) for ids in expected]
