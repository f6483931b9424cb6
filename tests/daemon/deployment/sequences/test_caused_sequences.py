"""Which request a sequence is for stands in the logs of all devices that compute it, once, and in no others."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from peerllm.daemon.control_messages import Computing
from peerllm.daemon.deployment.sequences.admitted_sequence import AdmittedSequence
from peerllm.daemon.deployment.sequences.caused_sequences import LAST_REQUESTS, CausedSequences
from peerllm.daemon.facade import GenerateRequest
from peerllm.request_ids import CauseInLog, caused_by
from peerllm.types import Sampling

DEPLOYMENT = "d" * 32


class Around:
    me = "a"

    def __init__(self) -> None:
        self.told: list[tuple[str, Computing]] = []

    def name(self, device: str) -> str:
        return f"device-{device}"

    def tell_device(self, device: str, message: Computing) -> None:
        self.told.append((device, message))


def sequence(number: int, cause: str) -> AdmittedSequence:
    with caused_by(cause):
        return AdmittedSequence(number, GenerateRequest(DEPLOYMENT, (1,), 4, Sampling()), 4)


def test_each_other_device_hears_of_a_request_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.handler.addFilter(CauseInLog())
    around: Any = Around()
    devices = ["b", "a", "b", "c"]
    caused = CausedSequences(DEPLOYMENT, around, lambda: devices)
    with caplog.at_level(logging.INFO), caused_by("whoever frees a slot"):
        for one in (sequence(1, "one"), sequence(2, "one"), sequence(3, ""), sequence(4, "two")):
            caused.begins(one)
    expected = [(device, Computing(DEPLOYMENT, *what)) for what in ((1, "one"), (4, "two")) for device in "bc"]
    assert around.told == expected
    assert [record.cause for record in caplog.records] == ["[one] ", "[two] "]  # type: ignore[attr-defined]
    assert "sequence 1 of dddddddd is computed on device-b, device-a, device-c" in caplog.text


def test_requests_long_ago_are_forgotten() -> None:
    around: Any = Around()
    caused = CausedSequences(DEPLOYMENT, around, lambda: ["b"])
    for number in range(LAST_REQUESTS + 1):
        caused.begins(sequence(number, f"r{number}"))
    caused.begins(sequence(0, "r0"))
    caused.begins(sequence(0, f"r{LAST_REQUESTS}"))
    assert len(around.told) == LAST_REQUESTS + 2
