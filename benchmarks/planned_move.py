"""The gaps between an answer's tokens while a stage moves to another device, with its state carried and without.

Three engines on this machine hold the built-in model (or --model DIR); one answer is written at a time, and in its
middle the middle stage moves from the second engine to the third, or back. For each phase of the move the longest gap
is compared with the median gap of the answer before it: loading the layers there, carrying the state, changing over
(until four tokens after it). `--without` computes the state again instead of carrying it.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from statistics import median
from time import perf_counter

from peerllm.builtin import __file__ as builtin
from peerllm.engine.messages import CarryState, Connect, FromEngine, Hop, Tokens, Unload
from tests.engine.engines import WAIT_S, Cut, Deployed, Device, deploy, devices, inspect, stage_specs

SETTLE = 40  # tokens before the move
MOST = 100_000  # tokens of an answer; it is cancelled long before


class Clock:
    """When the source's tokens came."""

    def __init__(self, source: Device) -> None:
        self.times: dict[int, list[float]] = defaultdict(list)
        heard = source._event

        def event(message: FromEngine) -> None:
            if isinstance(message, Tokens):
                self.times[message.sequence].append(perf_counter())
            heard(message)

        source.host._on_event = event  # type: ignore[attr-defined]


def longest(times: Sequence[float], since: float, until: float) -> float:
    """The longest gap, in ms, of which some lies between the two moments."""
    return max((b - a for a, b in pairwise(times) if b >= since and a <= until), default=0.0) * 1e3


async def move(
    deployed: Deployed, clock: Clock, prompt: Sequence[int], cut: Cut, context: int, carries: bool
) -> list[float]:
    """[median gap, longest gap while loading, while carrying, while changing over] in ms, tokens computed again."""
    made = deployed.devices
    sequence = deployed.submit(prompt, MOST)
    await deployed.some(sequence, SETTLE)
    before = sum([(await device.load()).replayed_tokens for device in made])
    times = [perf_counter()]
    old, new = (1, 2) if cut[1][0] == 2 else (2, 1)
    deployed.epoch += 1
    for device, spec in stage_specs(made, deployed.inspected, cut, deployed, context=context, chunk=64):
        await device.host.ask(replace(spec, state_from=(made[old].id,)), WAIT_S)
    for device in (made[0], made[new]):
        await device.host.ask(Connect(device.host.next_request(), deployed.id, deployed.epoch), WAIT_S)
    times.append(perf_counter())
    if carries:
        to = Hop(made[new].id, made[new].hosts, made[new].port, 1)
        layers = cut[1][1], cut[1][2]
        request = made[old].host.next_request()
        order = CarryState(request, deployed.id, deployed.epoch - 1, *layers, deployed.epoch, to)
        await made[old].host.ask(order, WAIT_S)
    times.append(perf_counter())
    there = len(clock.times[sequence])
    await deployed.switch()
    await deployed.some(sequence, there + 4)
    times.append(perf_counter())
    replayed = sum([(await device.load()).replayed_tokens for device in made]) - before
    for device in made:
        await device.host.ask(Unload(device.host.next_request(), deployed.id, deployed.epoch - 1), WAIT_S)
    deployed.cancel(sequence)
    await deployed.until_free()
    came = clock.times[sequence]
    usual = [(b - a) * 1e3 for a, b in pairwise(came[4:]) if b < times[0]]
    return [median(usual), *(longest(came, *phase) for phase in pairwise(times)), replayed]


async def run(model: Path, moves: int, prompt: int, carries: bool) -> None:
    context = 2048
    with tempfile.TemporaryDirectory() as directory:
        async with devices(3, Path(directory)) as made:
            clock = Clock(made[0])
            head = len((await inspect(made[0], model)).tensors) - 1
            third = head // 3
            cuts: list[Cut] = [((0, 0, third), (one, third + 1, head - 1), (0, head, head)) for one in (1, 2)]
            deployed = await deploy(made, model, cuts[0], context=context, chunk=64)
            ids = [3 + (7 * place + place * place) % 200 for place in range(prompt)]
            rows = [await move(deployed, clock, ids, cuts[(n + 1) % 2], context, carries) for n in range(moves)]
    print(f"{moves} moves, a prompt of {prompt} tokens, {'carried' if carries else 'computed again'}")
    names = "usual", "loading", "carrying", "changing over", "replayed"
    for name, column in zip(names, zip(*rows, strict=True), strict=True):
        print(f"  {name:14} median {median(column):8.2f}  most {max(column):8.2f}")
    print(f"  longest gap of a change over the usual one: median {median(r[3] / r[0] for r in rows):.2f}, "
          f"most {max(r[3] / r[0] for r in rows):.2f}; of carrying: {median(r[2] / r[0] for r in rows):.2f}, "
          f"{max(r[2] / r[0] for r in rows):.2f}")  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=Path(builtin).parent / "model")
    parser.add_argument("--moves", type=int, default=20)
    parser.add_argument("--prompt", type=int, default=400)
    parser.add_argument("--without", action="store_true")
    told = parser.parse_args(argv)
    asyncio.run(run(told.model, told.moves, told.prompt, not told.without))


if __name__ == "__main__":
    main()
