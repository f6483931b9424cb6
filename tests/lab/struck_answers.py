"""The same answers again and again, on a household that is struck meanwhile: always those of an undisturbed run."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import psutil

from tests.clients import body
from tests.lab.struck_household import Answer, StruckHousehold

FIRST_TOKENS = 6  # a fault strikes when a stream is past its fifth token
FROZEN_S, BLIP_S, UNPLUGGED_S = 5.0, 0.7, 4.0
SAMPLING: dict[str, Any] = {"temperature": 0.9, "seed": 3, "frequency_penalty": 0.4, "presence_penalty": 0.2}


def requests(tokens: int, **options: Any) -> tuple[dict[str, Any], ...]:
    """A greedy one, and one that is drawn with a seed and penalties."""
    return (
        body("Tell me a story about a fox.", tokens, stream=True, **options),
        body("Tell me a story.", tokens, stream=True, **SAMPLING, **options),
    )


class StruckAnswers:
    """`undisturbed` holds the ids of each request's answer; `moved` how many tokens engines computed again so far."""

    def __init__(self, household: StruckHousehold, asked: Sequence[dict[str, Any]], least: int = 100) -> None:
        self.household, self._asked = household, tuple(asked)
        answers = [household.listener.ask(request) for request in self._asked]
        for answer in answers:
            over = household.listener.wait_over(answer)
            assert over["status"] == 200 and over["finish"] and not over["error"], over
        self.undisturbed = [answer.ids for answer in answers]
        assert all(len(ids) >= least and len(set(ids)) > 10 for ids in self.undisturbed), self.undisturbed
        self.moved = 0

    def begin(self, tokens: int = FIRST_TOKENS) -> list[Answer]:
        """All of them, once each has so many tokens."""
        answers = [self.household.listener.ask(request) for request in self._asked]
        for answer in answers:
            self.household.listener.wait_tokens(answer, tokens)
        return answers

    def check(self, answers: Sequence[Answer], what: str) -> None:
        """Wait for their ends: the same tokens, and no error."""
        for answer, expected in zip(answers, self.undisturbed, strict=True):
            try:
                over = self.household.listener.wait_over(answer)
            except AssertionError as error:
                raise AssertionError(f"{what}: {error}; {self.household.told()}") from error
            assert over["status"] == 200, f"{what}: {over}"
            assert not over["error"], f"{what}: {over}"
            assert answer.ids == expected, f"{what}: other tokens from {first_difference(answer.ids, expected)}"
            assert over["finish"], f"{what}: it ended early"

    @contextmanager
    def streaming(self) -> Iterator[None]:
        """Ask again and again meanwhile; each answer is checked."""
        stop = threading.Event()

        def ask() -> int:
            rounds = 0
            while not stop.is_set() or rounds == 0:
                self.check([self.household.listener.ask(request) for request in self._asked], f"round {rounds}")
                rounds += 1
            return rounds

        with ThreadPoolExecutor(1) as thread:
            asking = thread.submit(ask)
            try:
                yield
            finally:
                stop.set()
                asking.result()

    def survive(self, kind: str, host: int, what: str = "") -> None:
        """Strike when the answers have begun, check them, and bring the device back."""
        before = self._replayed()
        answers = self.begin()
        strike(self.household, kind, host)
        self.check(answers, what or f"{kind} of {self.household.names[host]}")
        after = self._replayed()
        # An engine that was started again counts from 0.
        self.moved += sum(max(0, count - before.get(engine, 0)) for engine, count in after.items())
        if kind in ("kill", "farewell"):
            self.household.revive(host)
        self.household.settled()

    def _replayed(self) -> dict[tuple[int, int], int]:
        """By host and engine process."""
        found = {}
        for host, device in enumerate(self.household.devices):
            if device.process is not None and device.process.poll() is None:
                try:
                    found[host, self.household.engine(host)] = self.household.load(host)["replayed_tokens"]
                except (AssertionError, OSError, KeyError):
                    continue  # it holds nothing, or is about to start again
        return found


def first_difference(some: Sequence[int], others: Sequence[int]) -> int:
    return next((at for at, pair in enumerate(zip(some, others, strict=False)) if pair[0] != pair[1]), len(some))


def strike(household: StruckHousehold, kind: str, host: int) -> None:
    """Do it; what is frozen or unplugged comes back."""
    match kind:
        case "kill":
            household.kill(host)
        case "kill engine":
            psutil.Process(household.engine(host)).kill()
        case "kill own engine":
            psutil.Process(household.engine(0)).kill()
        case "freeze" | "blip":
            with household.frozen(host):
                time.sleep(FROZEN_S if kind == "freeze" else BLIP_S)
        case "unplug":
            with household.unplugged(host):
                time.sleep(UNPLUGGED_S)
        case "farewell":
            assert household.devices[host].stop() == 0
        case _:
            raise ValueError(kind)
