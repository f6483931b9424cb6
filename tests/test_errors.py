"""What the API answers with, for errors that are nobody's fault at the keyboard."""

from __future__ import annotations

import pytest

from peerllm import errors


@pytest.mark.parametrize("kind", [errors.LinkError, errors.FrameError, errors.EngineError, errors.UnavailableError])
def test_what_may_work_in_a_moment_is_not_a_fault_of_the_server(kind: type[errors.PeerLLMError]) -> None:
    assert kind("it broke").http_status == 503


def test_only_the_root_stands_for_a_fault_of_the_server() -> None:
    kinds = [one for one in vars(errors).values() if isinstance(one, type) and issubclass(one, errors.PeerLLMError)]
    assert [one for one in kinds if one.http_status == 500] == [errors.PeerLLMError]
