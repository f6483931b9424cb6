"""An engine keeps to its plan's promise: its runtime and 1.1 times the budget are enough, and the kernel sees to it.

Real engines, each in a control group of its own from its first page on, load what the planner gave them, take prompts
that fill every slot, and answer from all at once. What torch computes takes prompts of many lengths as well, which
compile many matrix products.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import AsyncExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from peerllm.daemon.control_messages import Hello
from peerllm.daemon.decide.demand import Blueprint, draw_up
from peerllm.daemon.decide.device_profiles import Candidate
from peerllm.daemon.facade import RunOptions
from peerllm.engine.messages import Inspected, Measure, TimeLayers
from tests.engine.engines import WAIT_S, Deployed, Device, inspect, redeploy
from tests.engine.weights.ggml_tensors import File, blocks_of
from tests.lab.cgroups import MemoryGroup, why_no_memory_groups

pytestmark = [
    pytest.mark.lab,
    pytest.mark.timeout(300),
    pytest.mark.skipif(bool(why_no_memory_groups()), reason=why_no_memory_groups()),
]
FULL = os.environ.get("PEERLLM_FULL") == "1"  # also divided over two devices
KINDS = ("int8", "int4", "stored", "float32", "bfloat16")  # the last by torch, which comes in only then
CASES = [(kind, 1) for kind in KINDS] + [(kind, 2) for kind in KINDS if FULL]
MARGIN = 1.1  # of the budget
SLOTS, CONTEXT = 4, 512
ANSWER = 16  # tokens
LENGTHS = range(2, 98, 3)  # of the prompts at the end
VOCABULARY = 32_000
ROUNDED = ("int8", "int4")  # from bfloat16
LAYERS = {"int8": 16, "int4": 24, "stored": 16, "float32": 3, "bfloat16": 7}  # about a quarter of a gigabyte each
OF_TWO = {"int8": 1.0, "int4": 1.2, "stored": 1.2, "float32": 1.1, "bfloat16": 2.4}  # of all weights, what one lends


def make_model(directory: Path, kind: str) -> Path:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        "llama", vocab_size=VOCABULARY, hidden_size=1024, intermediate_size=2816, num_hidden_layers=LAYERS[kind],
        num_attention_heads=16, num_key_value_heads=8, max_position_embeddings=CONTEXT, tie_word_embeddings=True,
        eos_token_id=None, bos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    if kind == "stored":
        return write_blocks(directory, config.to_dict())
    dtype = torch.float32 if kind == "float32" else torch.bfloat16
    AutoModelForCausalLM.from_config(config, dtype=dtype).save_pretrained(directory)
    return directory


def write_blocks(directory: Path, config: dict[str, Any]) -> Path:
    """The same model with a GGUF file's mix of Q4_K and Q6_K, as its model directory has it."""
    directory.mkdir()
    hidden, wide, file, types = config["hidden_size"], config["intermediate_size"], File(directory / "blocks.gguf"), {}

    def add(name: str, kind: str, *shape: int) -> None:
        types[name] = kind
        file.add(name, kind, shape, blocks_of(kind, *shape))

    for number in range(config["num_hidden_layers"]):
        layer = f"model.layers.{number}."
        for role, rows in (("q", hidden), ("k", hidden // 2), ("o", hidden)):
            add(f"{layer}self_attn.{role}_proj.weight", "Q4_K", rows, hidden)
        add(f"{layer}self_attn.v_proj.weight", "Q6_K", hidden // 2, hidden)
        for role in ("gate", "up"):
            add(f"{layer}mlp.{role}_proj.weight", "Q4_K", wide, hidden)
        add(f"{layer}mlp.down_proj.weight", ("Q4_K", "Q6_K")[number % 2], hidden, wide)
        for which in ("input", "post_attention"):
            file.add(f"{layer}{which}_layernorm.weight", "F32", (hidden,), np.ones(hidden, np.float32))
    add("model.embed_tokens.weight", "Q6_K", VOCABULARY, hidden)
    file.add("model.norm.weight", "F32", (hidden,), np.ones(hidden, np.float32))
    about = {"quant_method": "gguf", "types": types, "paired": True}
    (directory / "config.json").write_text(json.dumps({**config, "quantization_config": about}))
    (directory / "tensors.json").write_text(json.dumps([asdict(tensor) for tensor in file.tensors]))
    return directory


def anonymous(device: Device) -> int:
    """Of the engine's process, the bytes that are mapped from no file."""
    status = Path(f"/proc/{device.host.pid}/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon:"))


@contextmanager
def watched(made: list[Device]) -> Iterator[list[int]]:
    """The most that `anonymous` says of each."""
    peaks, over = [anonymous(device) for device in made], threading.Event()

    def watch() -> None:
        while not over.wait(0.002):
            peaks[:] = [max(peak, anonymous(device)) for peak, device in zip(peaks, made, strict=True)]

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield peaks
    finally:
        over.set()
        watcher.join()


def candidate(device: Device, lent: int, dtype: str) -> Candidate:
    speed = {dtype: 10.0}
    hello = Hello(1, "0", {}, device.id[:8], 1, 2, 2 * lent, lent, speed, speed, ("llama",), (dtype,))
    return Candidate(device.id, hello, lent, 1.0, 1000.0)


def plan_for(inspected: Inspected, made: list[Device]) -> Blueprint:
    """Over all of them."""
    whole = sum(layer.memory_bytes for layer in inspected.profile.layers)
    lent = 4 * whole if len(made) == 1 else int(OF_TWO[inspected.quantize or inspected.dtype] * whole)
    candidates = {device.id: candidate(device, lent, inspected.dtype) for device in made}
    found = draw_up(RunOptions("m", slots=SLOTS, context=CONTEXT), inspected, candidates, made[0].id)
    assert set(found.promises) == {device.id for device in made}
    assert (found.workload.sequences, found.workload.context) == (SLOTS, CONTEXT)
    return found


async def measure(device: Device, inspected: Inspected, free: int) -> None:
    """As a daemon does before it plans."""
    await device.host.ask(Measure(device.host.next_request()), WAIT_S)
    config, dtype, quantize = inspected.config, inspected.dtype, inspected.quantize
    question = TimeLayers(device.host.next_request(), config, dtype, free, quantize=quantize)
    await device.host.ask(question, WAIT_S)


async def serve(deployed: Deployed, plan: Blueprint) -> None:
    places = {device.id: number for number, device in enumerate(deployed.devices)}
    cut = tuple((places[stage.device], stage.first_layer, stage.last_layer) for stage in plan.plan.stages)
    await redeploy(deployed, cut, slots=SLOTS, context=CONTEXT, chunk=plan.chunk, micro_batch=plan.micro_batch)
    full = [[(7 * i + 13 * slot) % VOCABULARY for i in range(CONTEXT - ANSWER)] for slot in range(SLOTS)]
    sequences = [deployed.submit(prompt, ANSWER) for prompt in full]
    for sequence in sequences:
        ids, end = await deployed.finished(sequence)
        assert (len(ids), end.finish) == (ANSWER, "length"), end
    for length in LENGTHS if deployed.inspected.dtype == "bfloat16" else ():
        await deployed.generate(full[0][:length], 1)


@pytest.mark.parametrize(("kind", "devices"), CASES)
async def test_runtime_and_little_more_than_the_budget_is_enough(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, devices: int
) -> None:
    model = make_model(tmp_path / "model", kind)
    async with AsyncExitStack() as stack:
        groups = [stack.enter_context(MemoryGroup()) for _ in range(devices)]
        made = [Device(tmp_path / f"device{number}") for number in range(devices)]
        launchers = [group.launcher(tmp_path) for group in groups]
        for device, launcher in zip(made, launchers, strict=True):
            monkeypatch.setattr(sys, "executable", str(launcher))
            stack.push_async_callback(device.host.close)
            await device.start([one.trust for one in made])
        monkeypatch.undo()
        ready = [anonymous(device) for device in made]
        inspected = await inspect(made[0], model, quantize=kind if kind in ROUNDED else "none")
        plan = plan_for(inspected, made)
        await asyncio.gather(*(measure(device, inspected, plan.promises[device.id]) for device in made))
        for device, group in zip(made, groups, strict=True):
            (configured,) = device.ready
            group.limit(configured.runtime_bytes + int(MARGIN * plan.promises[device.id]))

        with watched(made) as peaks:
            await serve(Deployed(made, inspected), plan)

        for device, group, before, peak in zip(made, groups, ready, peaks, strict=True):
            assert device.lost == []
            assert group.kills == 0
            # Of its files the libraries' pages are counted elsewhere, the checkpoint's are the system's to take back:
            # without them it keeps to its budget, too.
            budget = plan.promises[device.id]
            print(f"{kind}: {budget / 1e6:.1f} MB planned, {(peak - before) / 1e6:.1f} MB taken")
            assert peak - before <= MARGIN * budget
            with pytest.raises(OSError, match="busy"):  # all that was in the group
                group.limit(budget // 2)
