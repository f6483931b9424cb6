"""The loader thread by itself: which loads are wanted."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from peerllm.engine.messages import Failed
from peerllm.engine.process.inbox import Inbox
from peerllm.engine.process.loading import Loader
from peerllm.errors import OverloadedError
from tests.engine.fakes import FakeBackend, stage


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
