"""How long the client's stream pauses when a device dies, freezes, is unplugged, leaves or joins.

Three hosts in network namespaces (root is needed), any two of which hold the model; one client streams from the first.
With --model DIRECTORY that model is served instead of the built-in one, whose float32 tokens are always the same; of
another model only their number is compared. The pause is the longest gap between two tokens
at and after the fault; it is also told in usual gaps.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median, quantiles

import psutil

from peerllm.builtin import BUILTIN
from peerllm.daemon.decide.deployment_life.pacing import STABLE_S
from tests.clients import body
from tests.lab.struck_household import Answer, StruckHousehold, serving

NAMES = ("laptop", "mini-pc", "jetson")
SLOTS, CONTEXT = 2, 512
FIRST_TOKENS = 6
QUESTION = "Tell me a story about a fox."


class Trial:
    """One household, one stream at a time."""

    def __init__(self, household: StruckHousehold, model: str) -> None:
        self.household, self.model = household, model
        self.listener = household.listener
        self.usual: list[int] = []

    def ask(self) -> Answer:
        tokens = 400 if self.model == BUILTIN else 60
        return self.listener.ask(body(QUESTION, tokens, stream=True, model=self.model))

    def whole(self) -> Answer:
        """An undisturbed answer."""
        answer = self.ask()
        over = self.listener.wait_over(answer)
        if over["status"] != 200 or over["error"]:
            raise SystemExit(f"an undisturbed answer failed: {over}")
        return answer

    def settled(self) -> None:
        self.household.settled()

    def struck(self, fault: Callable[[int], None], restore: Callable[[int], None]) -> tuple[float, float]:
        """The pause in seconds, and in usual gaps; SystemExit where the tokens are not the same."""
        self.settled()
        time.sleep(STABLE_S)  # a plan that breaks sooner than this after the last is mended ever more slowly
        host = self.household.holders()[0]
        answer = self.ask()
        self.listener.wait_tokens(answer, FIRST_TOKENS)
        at = time.monotonic()
        fault(host)
        over = self.listener.wait_over(answer)
        same = answer.ids == self.usual if self.model == BUILTIN else len(answer.ids) == len(self.usual)
        if over["status"] != 200 or over["error"] or not same:
            raise SystemExit(f"the answer is another after a fault: {over}, {len(answer.ids)} tokens")
        restore(host)
        gaps = [(b, b - a) for a, b in zip(answer.times, answer.times[1:], strict=False) if b > a]
        pause = max((gap for end, gap in gaps if end >= at), default=0.0)
        return pause, pause / median(gap for _, gap in gaps)


def faults(trial: Trial, freeze_s: float) -> dict[str, tuple[Callable[[int], None], Callable[[int], None]]]:
    house = trial.household

    def frozen(host: int) -> None:
        with house.frozen(host):
            time.sleep(freeze_s)

    def unplugged(host: int) -> None:
        with house.unplugged(host):
            time.sleep(freeze_s)

    def nothing(host: int) -> None:
        pass

    return {
        "daemon killed": (house.kill, house.revive),
        "engine killed": (lambda host: psutil.Process(house.engine(host)).kill(), nothing),
        "source's engine killed": (lambda host: psutil.Process(house.engine(0)).kill(), nothing),
        f"frozen for {freeze_s:g} s": (frozen, nothing),
        f"unplugged for {freeze_s:g} s": (unplugged, nothing),
        "farewell (SIGTERM)": (lambda host: house.devices[host].process.terminate(), house.revive_stopped),  # type: ignore[union-attr]
    }


@contextmanager
def started(directory: Path, model: str, holders: int) -> Iterator[Trial]:
    """`holders`: how many devices it takes to hold the model."""
    path = None if model == BUILTIN else Path(model)
    with serving(directory, path, NAMES, holders, SLOTS, CONTEXT) as household:
        trial = Trial(household, household.deployment()["name"])
        trial.usual = trial.whole().ids
        yield trial


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=BUILTIN)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--freeze", type=float, default=5.0, help="seconds that a device is frozen or unplugged")
    parser.add_argument("--holders", type=int, default=2, help="how many of the three devices the model takes")
    parser.add_argument("--event", default="", help="only the events whose names contain this")
    args = parser.parse_args(argv)
    with (
        tempfile.TemporaryDirectory(prefix="peerllm-bench-") as directory,
        started(Path(directory), args.model, args.holders) as trial,
    ):
        for name, (fault, restore) in faults(trial, args.freeze).items():
            if args.event not in name:
                continue
            found = [trial.struck(fault, restore) for _ in range(args.rounds)]
            pauses, gaps = [pause for pause, _ in found], [gap for _, gap in found]
            p95 = quantiles(pauses, n=20)[-1] if len(pauses) > 1 else pauses[0]
            line = {"event": name, "rounds": len(found), "pause_p50_s": round(median(pauses), 2),
                    "pause_p95_s": round(p95, 2), "pause_p50_usual_gaps": round(median(gaps), 1)}  # fmt: skip
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
