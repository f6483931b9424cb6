"""A device of the plan that lies in OPENs: what it can hold up, and for how long."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from peerllm.engine.messages import Submit, Tokens
from peerllm.engine.schedule.batching import Scheduler
from peerllm.engine.schedule.held_shard import HeldShard
from peerllm.engine.schedule.loaded_stage import LoadedStage
from peerllm.engine.schedule.local_deployment import LocalDeployment
from peerllm.engine.schedule.running_sequence import MOST_PARTIAL
from peerllm.engine.schedule.source_sequences import SourceSequences
from peerllm.engine.wire.parcels import Opened, first_attempt
from peerllm.errors import FrameError
from peerllm.types import Sampling
from tests.engine.fakes import DEPLOYMENT, FakeBackend, FakeShard, stage

SPEC = stage(1, epoch=3, slots=2, context=64)


def staged() -> LoadedStage:
    backend = FakeBackend()
    return LoadedStage(SPEC, [HeldShard.of(SPEC, FakeShard(backend, SPEC))], backend.sampler)  # type: ignore[arg-type]


def opened(sequence: int, attempt: int) -> Opened:
    return Opened(sequence, 0, Sampling(), attempt=attempt)


def test_no_number_makes_the_opens_of_all_later_epochs_late() -> None:
    present = staged()
    for attempt in (2**63 - 1, first_attempt(5)):
        with pytest.raises(FrameError, match="later epoch"):
            present.open(opened(1, attempt))
    assert present.open(opened(1, first_attempt(5) - 1)) is not None, "a source that was in epoch 4, and left it"
    assert present.open(opened(2, first_attempt(3) + 1)) is None, "in this epoch they are late"
    later = LoadedStage(replace(SPEC, epoch=5), present.chain, FakeBackend().sampler)
    assert later.open(opened(2, first_attempt(5) + 1)) is not None


def test_a_source_numbers_its_opens_by_the_epoch() -> None:
    source = SourceSequences(DEPLOYMENT, 2, 64, 8, 2, 9, epoch=3)
    source.submit(Submit(DEPLOYMENT, 1, (1, 2), 5, (), Sampling()))
    numbers = []
    for epoch in (3, 9, 9):
        source.change_to(replace(SPEC, epoch=epoch))
        source.leave(1)
        numbers.append(source.enter(1)[0].attempt)
    assert numbers == [first_attempt(3) + 1, first_attempt(9) + 1, first_attempt(9) + 2]


@pytest.mark.parametrize("held", [0, 1, -1])
def test_a_stage_that_lacks_tokens_again_and_again_ends_the_answer(held: int, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []
    deployment = LocalDeployment(DEPLOYMENT, Scheduler(), told.append)
    lying, asked = staged(), []

    def lie(parcel: Opened, *rest: Any) -> Opened:
        asked.append(parcel.position)
        return parcel.lacks(2, held if held >= 0 else parcel.position - 1)

    monkeypatch.setattr(lying, "open", lie)
    deployment.loaded(lying)
    deployment.linked(3, {})
    deployment.submit(Submit(DEPLOYMENT, 1, (1, 2, 3), 50, (), Sampling(), answer=(6, 12, 24)))
    (end,) = [message for message in told if isinstance(message, Tokens) and message.finish]
    assert end.finish == "error" and "again and again" in end.error
    assert asked[0] == 5 and asked[-1] == 0 and len(asked) <= MOST_PARTIAL + 2
    assert deployment.feed is not None and not deployment.feed.sequences.running
