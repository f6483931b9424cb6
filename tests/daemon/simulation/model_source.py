"""A model of the sequences on the source's engine: they enter an epoch, have computed again what it lacks, and step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from tests.daemon.simulation.model_engine import ModelFrame, token_of

CHUNK = 4  # tokens of one frame of a prompt


@dataclass(slots=True)
class Running:
    sequence: int
    slot: int
    seed: int
    ids: list[int]  # prompt and answer
    left: int  # tokens still to come
    epoch: int = -1
    phase: str = "waiting"
    starts: list[int] = field(default_factory=list)  # of replayed chunks whose end is not heard of yet

    @property
    def position(self) -> int:
        """Of the token that is computed next; all before it are."""
        return len(self.ids) - 1


class ModelSource:
    """`send` gives a frame to the first stage of its epoch; `tell` gives the daemon a sequence's next token."""

    def __init__(self, send: Callable[[ModelFrame], None], tell: Callable[[int, int, int], None]) -> None:
        self._send, self._tell = send, tell
        self.sequences: dict[int, Running] = {}
        self.epoch = -1
        self._switched: Callable[[], None] | None = None

    def submit(self, sequence: int, slot: int, seed: int, ids: list[int], left: int) -> None:
        running = self.sequences[sequence] = Running(sequence, slot, seed, ids, left)
        if self.epoch >= 0:
            self._enter(running)

    def cancel(self, sequence: int) -> None:
        self.sequences.pop(sequence, None)
        self._check_switched()

    def switch(self, epoch: int, switched: Callable[[], None]) -> None:
        self.epoch, self._switched = epoch, switched
        for running in self.sequences.values():
            self._enter(running)
        self._check_switched()

    def _check_switched(self) -> None:
        if self._switched is not None and all(one.phase != "opening" for one in self.sequences.values()):
            done, self._switched = self._switched, None
            done()

    def _enter(self, running: Running) -> None:
        running.epoch, running.phase = self.epoch, "opening"
        position = running.position
        self._send(ModelFrame("open", self.epoch, running.sequence, running.slot, position, has=position))

    def hear(self, frame: ModelFrame) -> None:
        """A frame that has gone round its ring."""
        running = self.sequences.get(frame.sequence)
        if running is None or not self.expected(running, frame):
            return
        if frame.kind == "open":
            self._replay(running, frame.last, frame.has)
            self._check_switched()
        elif frame.kind == "replay":
            del running.starts[0]
            if not running.starts:
                self._step(running)
        else:
            self._token(running, frame)

    def expected(self, running: Running, frame: ModelFrame) -> bool:
        if frame.kind == "replay" and not running.starts:
            return False
        phase = {"open": "opening", "replay": "replaying", "step": "stepping"}[frame.kind]
        fits = frame.start == (running.starts[0] if frame.kind == "replay" else running.position)
        return running.phase == phase and running.epoch == frame.epoch and fits

    def _replay(self, running: Running, last: int, has: int) -> None:
        starts = range(has, running.position, CHUNK) if last >= 0 else range(0)
        running.phase, running.starts = "replaying", list(starts)
        for start in starts:
            xs = tuple(running.ids[start : min(start + CHUNK, running.position)])
            self._send(ModelFrame("replay", running.epoch, running.sequence, running.slot, start, xs, last))
        if not starts:
            self._step(running)

    def _step(self, running: Running) -> None:
        running.phase = "stepping"
        x = running.ids[running.position]
        self._send(ModelFrame("step", running.epoch, running.sequence, running.slot, running.position, (x,)))

    def _token(self, running: Running, frame: ModelFrame) -> None:
        token = token_of(frame.xs[0], running.seed, frame.start)
        running.ids.append(token)
        running.left -= 1
        if not running.left:
            del self.sequences[running.sequence]
            self._check_switched()
        else:
            self._step(running)
        self._tell(running.sequence, frame.start, token)
