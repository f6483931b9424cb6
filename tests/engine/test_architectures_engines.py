"""Every family through three engine processes with links between them: tokens and logits of the whole model.

Each family takes one cut, into two or three, which together are all cuts many times over; with PEERLLM_FULL=1 each
takes every cut. By default only the families of DEFAULT have their turn.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from tests.engine.architectures import (
    ANSWER,
    CONTEXT,
    FAMILIES,
    LAYERS,
    PROMPT,
    TOLERANCE,
    VOCABULARY,
    Cut,
    Example,
    difference,
    every_cut,
    share,
)
from tests.engine.engines import Deployed, Device, devices, inspect, redeploy
from tests.engine.recording import FOLDER, recorded
from tests.sizes import FULL

DEFAULT = {"Llama", "GPT-2", "gpt-oss", "Qwen3-Next"}
CHUNKS = {2: 4, 3: 5}  # of a prompt of 9, by the number of shards
DRAWN = range(PROMPT, PROMPT + ANSWER)  # positions of the answer's tokens

pytestmark = [pytest.mark.usefixtures("calm"), pytest.mark.timeout(240)]


@dataclass
class Household:
    """Three devices whose engines write down their logits."""

    made: list[Device]
    logits: Path


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def household(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Household]:
    start, logits = asyncio.create_subprocess_exec, tmp_path_factory.mktemp("logits")

    def recording(program: str, *arguments: str, env: dict[str, str], **options: Any) -> Any:
        ours = ["tests.engine.recording" if argument == "peerllm.engine" else argument for argument in arguments]
        path = os.pathsep.join([env["PYTHONPATH"], str(Path(__file__).parents[2])])
        assert program == sys.executable
        assert ours != list(arguments)
        return start(program, *ours, env={**env, "PYTHONPATH": path, FOLDER: str(logits)}, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(asyncio, "create_subprocess_exec", recording)
        async with devices(3, tmp_path_factory.mktemp("devices")) as made:
            yield Household(made, logits)


def one_cut(number: int) -> Cut:
    return share(number)[number % 2]


async def compare(household: Household, made: Example, cut: Cut, turn: int) -> None:
    """Two sequences at once through one cut; `turn` says which device is the source."""
    order = household.made[turn:] + household.made[:turn]
    inspected = await inspect(order[0], made.directory)
    assert inspected == replace(made.inspected, request=inspected.request)
    deployed = Deployed(order, inspected)
    places = tuple((number, *part) for number, part in enumerate(cut))
    prompt = made.prompt.tolist()
    try:
        await redeploy(deployed, places, slots=2, context=CONTEXT, chunk=CHUNKS[len(cut)])
        answers = await asyncio.gather(*(deployed.generate(prompt, ANSWER) for _ in range(2)))
        assert not any(device.links_lost() for device in order)
    finally:
        await deployed.unload()
        rows = recorded(household.logits, VOCABULARY)
        for device in order:
            device.events.clear()
    assert answers == [made.tokens] * 2
    assert {position: len(found) for position, found in rows.items()} == dict.fromkeys(DRAWN, 2)
    for sequence in range(2):
        assert difference([rows[position][sequence] for position in DRAWN], made.logits) <= TOLERANCE


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize(
    "number",
    [
        pytest.param(number, id=family.name, marks=() if family.name in DEFAULT else pytest.mark.slow)
        for number, family in enumerate(FAMILIES)
    ],
)
async def test_engines_give_the_tokens_of_the_whole_model(
    number: int, household: Household, examples: Callable[[str], Example]
) -> None:
    made = examples(FAMILIES[number].name)
    assert not made.blind
    assert made.layers == LAYERS
    for turn, cut in enumerate(every_cut() if FULL else [one_cut(number)], number):
        await compare(household, made, cut, turn % 3)


@pytest.mark.asyncio(loop_scope="module")
async def test_the_engines_hold_nothing_and_never_died(household: Household) -> None:
    for device in household.made:
        load = await device.load()
        assert (load.stages, load.weight_bytes, load.kv_bytes) == ((), 0, 0)
        assert not device.lost
        assert len(device.ready) == 1


def test_all_cuts_have_their_turn() -> None:
    assert {one_cut(number) for number in range(len(FAMILIES))} == set(every_cut())
