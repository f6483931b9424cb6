"""SmolLM2 over two devices must call tools, at temperature 1: every call of every API parses and fits its schema."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.e2e.chosen_calls import wrong_call
from tests.household import household
from tests.lab.smollm2 import smollm2
from tests.sizes import FULL

pytestmark = [pytest.mark.lab, pytest.mark.timeout(3600)]
TRIES = 200 if FULL else 9
AT_ONCE = 8


async def test_every_call_of_a_real_model_fits(tmp_path: Path) -> None:
    directory, turn = smollm2(), asyncio.Semaphore(AT_ONCE)
    with household(tmp_path, ("laptop", "mini-pc")) as devices:
        devices[0].cli("run", str(directory), "--slots", str(AT_ONCE), "--context", "2048")

        async def one(seed: int) -> str:
            async with turn:
                return await wrong_call(devices[seed % 2].url, str(directory), seed)

        assert [wrong for wrong in await asyncio.gather(*map(one, range(TRIES))) if wrong] == []
