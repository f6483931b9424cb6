"""The loader thread by itself: which loads are wanted, and how much each may take."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from peerllm.engine.messages import Failed
from peerllm.engine.process.inbox import Inbox
from peerllm.engine.process.loading import Loader
from peerllm.engine.schedule.held_shard import HeldShard
from peerllm.errors import OverloadedError
from tests.engine.fakes import FakeBackend, FakeShard, stage


def test_a_load_that_ends_before_put_returns_was_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    ended, failures, put = threading.Event(), [], Inbox.put

    def tell(message: Any) -> None:
        if isinstance(message, Failed):
            failures.append(message)
            ended.set()

    def finished(spec: Any, chain: Any, fresh: Any) -> None:
        loader.take_over(spec)
        ended.set()

    def put_and_wait(inbox: Inbox[Any], job: Any) -> None:
        put(inbox, job)
        assert ended.wait(20)

    monkeypatch.setattr(Inbox, "put", put_and_wait)
    loader = Loader(FakeBackend(), tell, finished)
    thread = loader.start()
    try:
        loader.put(stage(1))
        assert failures == []
    finally:
        loader.close()
        thread.join(20)
    with pytest.raises(OverloadedError):
        loader.put(stage(2))
    assert loader._wanted == {}


@pytest.mark.parametrize(("limit", "added", "left"), [(None, None, None), (5000, None, 3900), (5000, 700, 700),
                                                      (1500, 700, 400), (None, 700, 700)])  # fmt: skip
def test_a_part_has_what_the_stage_and_the_deployment_leave_it(limit: Any, added: Any, left: Any) -> None:
    """The shard that is there (1100 bytes) counts in what the stage may take, and not in what may come to it."""
    backend, limits, ended = FakeBackend(), [], threading.Event()
    there = HeldShard.of(stage(1, last_layer=1), FakeShard(backend, stage(1, last_layer=1)))  # type: ignore[arg-type]
    backend.before_load = lambda spec, _: limits.append((spec.first_layer, spec.limit_bytes))

    def finished(spec: Any, chain: Any, fresh: Any) -> None:
        loader.take_over(spec)
        ended.set()

    loader = Loader(backend, lambda message: None, finished, held=lambda deployment: (there,))
    thread = loader.start()
    try:
        loader.put(stage(2, epoch=2, limit_bytes=limit, added_limit_bytes=added))
        assert ended.wait(20)
    finally:
        loader.close()
        thread.join(20)
    assert limits == [(2, left)]
