"""Epochs side by side on real engines: sequences change from one to another, and lost stages are computed again."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from peerllm.types import Sampling
from tests.engine.engines import Cut, deploy, devices, redeploy
from tests.engine.tiny import make_llama, prompt, reference

pytestmark = [pytest.mark.timeout(240)]

THREE: Cut = ((0, 0, 1), (1, 2, 3), (2, 4, 5))
MOVED: Cut = ((0, 0, 1), (1, 2, 2), (2, 3, 5))
DRAWN = Sampling(temperature=1.3, top_p=0.95, repetition_penalty=1.3, frequency_penalty=0.4, seed=7)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("model"))


async def test_a_killed_stage_is_loaded_elsewhere(model: Path, tmp_path: Path) -> None:
    async with devices(4, tmp_path) as made:
        deployed = await deploy(made, model, THREE, context=256)
        undisturbed = [await deployed.generate(prompt(20, n), 60, s) for n, s in enumerate((Sampling(), DRAWN))]
        running = [deployed.submit(prompt(20, n), 60, s) for n, s in enumerate((Sampling(), DRAWN))]
        for sequence in running:
            await deployed.some(sequence, 5)
        pid = made[1].host.pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        await made[0].until(lambda: bool(made[0].links_lost()))
        deployed.epoch += 1
        await redeploy(deployed, ((0, 0, 1), (3, 2, 3), (2, 4, 5)), context=256)
        await deployed.switch()
        for sequence, expected in zip(running, undisturbed, strict=True):
            assert (await deployed.finished(sequence))[0] == expected
        assert undisturbed[0] == reference(model, prompt(20, 0), 60)
        loads = [await made[n].load() for n in (0, 2, 3)]
        assert loads[0].replayed_tokens > 0 and loads[1].replayed_tokens == 0 and loads[2].replayed_tokens > 0
