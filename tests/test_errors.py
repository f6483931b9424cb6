"""What the API answers with, for errors that are nobody's fault at the keyboard."""

from __future__ import annotations

import errno
import socket
import ssl

import pytest

from peerllm import errors
from peerllm.errors import in_words


@pytest.mark.parametrize("kind", [errors.LinkError, errors.FrameError, errors.EngineError, errors.UnavailableError])
def test_what_may_work_in_a_moment_is_not_a_fault_of_the_server(kind: type[errors.PeerLLMError]) -> None:
    assert kind("it broke").http_status == 503


def test_only_the_root_stands_for_a_fault_of_the_server() -> None:
    kinds = [one for one in vars(errors).values() if isinstance(one, type) and issubclass(one, errors.PeerLLMError)]
    assert [one for one in kinds if one.http_status == 500] == [errors.PeerLLMError]


def test_a_systems_error_is_told_in_its_words() -> None:
    refused = ConnectionRefusedError(errno.ECONNREFUSED, "Connect call failed ('10.0.0.7', 7777)")
    assert in_words(refused) == "connection refused"
    assert in_words(OSError("no such address")) == "no such address"
    unknown = socket.gaierror(socket.EAI_NONAME, "Name or service not known")
    assert in_words(unknown) == str(unknown)
    assert in_words(ssl.SSLError(1, "bad certificate")) == str(ssl.SSLError(1, "bad certificate"))
