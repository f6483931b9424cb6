"""`peerllm` under a watch: how long its event loop stood still, where, and how much of that it computed itself.

Put `python -m tests.loop_watch FILE` before a command `python -m peerllm ...`: the longest stands come into FILE, one
JSON object a line.
Of a busy machine `stood_ms` tells more than of the program; `worked_ms`, the time that a processor worked on one
callback of the loop, is the program's own; in `others_ms` its other threads worked meanwhile.
"""

from __future__ import annotations

import asyncio
import json
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

LEAST_S = 0.015  # that a callback has worked, or the loop stood, to be noted
LOOK_S = 0.005
FRAMES = 14  # of a stack


class LoopWatch:
    """Looks from a thread of its own at the loop of the thread that makes it."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._main = threading.get_ident()
        self._clock = time.pthread_getcpuclockid(self._main)
        self._began: tuple[float, float] | None = None  # when the callback that runs began: wall, processor
        threading.Thread(target=self._look, name="loop watch", daemon=True).start()

    def run(self, original: Callable[[Any], None], handle: Any) -> None:
        """Around one callback."""
        since, worked, all_worked = time.perf_counter(), time.thread_time(), time.process_time()
        self._began = since, worked
        try:
            original(handle)
        finally:
            self._began = None
            stood, took = time.perf_counter() - since, time.thread_time() - worked
            if stood > LEAST_S:
                others = time.process_time() - all_worked - took
                times = {"stood_ms": stood, "worked_ms": took, "others_ms": others}
                rounded = {name: round(1000 * seconds, 1) for name, seconds in times.items()}
                self._note({**rounded, "what": repr(handle)[:300]})

    def _look(self) -> None:
        while True:
            time.sleep(LOOK_S)
            began = self._began
            if began is None:
                continue
            worked = time.clock_gettime(self._clock) - began[1]
            if worked > LEAST_S:
                frame = sys._current_frames().get(self._main)
                if frame is not None and self._began is began:
                    stack = traceback.format_stack(frame)[-FRAMES:]
                    self._note({"working_ms": round(1000 * worked, 1), "stack": "".join(stack)})

    def _note(self, what: dict[str, Any]) -> None:
        with self._file.open("a") as file:
            file.write(json.dumps({"at": time.time(), **what}) + "\n")


def longest(file: Path, since: float, most: int = 5) -> list[dict[str, Any]]:
    """What the loop computed longest since that time (Unix seconds), each place once, with the end of its stack."""
    noted = [json.loads(line) for line in file.read_text().splitlines()]
    works = sorted((one for one in noted if "stack" in one and one["at"] > since), key=lambda one: -one["working_ms"])
    found = dict[str, dict[str, Any]]()
    for one in works:
        lines = [line.strip() for line in one["stack"].splitlines() if line.startswith('  File "')]
        where = " < ".join(line.split("/")[-1].replace('", line ', ":") for line in reversed(lines[-6:]))
        found.setdefault(where, {"worked_ms": one["working_ms"], "where": where})
    return list(found.values())[:most]


def main() -> int:
    watch = LoopWatch(Path(sys.argv[1]))
    original = asyncio.Handle._run
    asyncio.Handle._run = lambda handle: watch.run(original, handle)  # type: ignore[method-assign]
    sys.modules["uvloop"] = None  # type: ignore[assignment]  # its callbacks cannot be seen
    from peerllm.cli.main import main as command

    return command(sys.argv[sys.argv.index("peerllm") + 1 :])


if __name__ == "__main__":
    sys.exit(main())
