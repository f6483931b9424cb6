"""Who is believed to follow in a deployment: what it gets is prompts, the manifest and the model's small files."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from peerllm.daemon.control_messages import Answer, DeploymentView, Inherit
from peerllm.daemon.successor.successor import Successor
from peerllm.errors import RefusedError
from peerllm.types import Stage

ANNA, BERT, MALLORY = "a" * 64, "b" * 64, "c" * 64
DEPLOYMENT = "d" * 32


def view(coordinator: str, epoch: int, *devices: str) -> DeploymentView:
    stages = tuple(Stage(device, n, n) for n, device in enumerate(devices))
    return DeploymentView(DEPLOYMENT, "small", "serving", epoch, coordinator, stages, (1,) * len(stages))


@pytest.fixture
async def successor(tmp_path: Path) -> Any:
    async def nobody(*_: object) -> Answer:
        raise RefusedError("nobody is asked")

    parts: Any = SimpleNamespace(
        settings=SimpleNamespace(data_dir=tmp_path),
        home=SimpleNamespace(me=ANNA, outlines=SimpleNamespace(root=tmp_path / "outlines"), name=lambda device: device),
        network=SimpleNamespace(tell=lambda *_: None, ask=nobody),
        coordinator=SimpleNamespace(
            views=lambda: (), streaming={}, left=lambda _: (None, 0, None), drain=lambda *_: drained.append("drained")
        ),
        worker=SimpleNamespace(obey=lambda *_: None),
        store=SimpleNamespace(forget=lambda _: None),
        digests=None,
    )
    drained: list[str] = []
    made = Successor(parts)
    made.told(ANNA, [view(ANNA, 5, ANNA, BERT)])
    for device in (BERT, MALLORY):
        made.presence(device, "online")
    yield made
    await made.close()
    assert not drained


async def test_a_device_that_is_not_of_the_plan_does_not_become_its_successor_by_a_claim(successor: Successor) -> None:
    """It says that it coordinates the deployment itself, with a plan that it is of."""
    for claim in (view(MALLORY, 9, MALLORY, ANNA), view(ANNA, 9, ANNA, MALLORY)):
        successor.told(MALLORY, [claim])
        for complete in (False, True):
            with pytest.raises(RefusedError, match="only a device of its plan"):
                await successor.answer(MALLORY, Inherit(DEPLOYMENT, complete))
    assert await successor.answer(BERT, Inherit(DEPLOYMENT, complete=True)) == Answer(0)
    successor.told(MALLORY, [view(MALLORY, 9, MALLORY, ANNA)])
    assert successor._successor(DEPLOYMENT) == BERT


async def test_a_follower_believes_the_plan_of_whom_it_obeys(successor: Successor) -> None:
    other = "e" * 32
    told = DeploymentView(other, "small", "serving", 5, BERT, (Stage(BERT, 0, 0), Stage(ANNA, 1, 1)), (1, 1))
    successor.told(BERT, [told])
    claim = DeploymentView(other, "small", "serving", 9, MALLORY, (Stage(MALLORY, 0, 0), Stage(ANNA, 1, 1)), (1, 1))
    successor.told(MALLORY, [claim], {other: MALLORY})
    assert successor.obeyed == {other: BERT}
    assert [stage.device for stage in successor._stages[other]] == [BERT, ANNA]
