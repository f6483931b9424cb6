"""A model of a device's side: its ledger (the real one), its engine, and how it answers a coordinator's questions."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from peerllm.daemon.control_messages import Reserve
from peerllm.daemon.decide.ledger import Ledger
from peerllm.errors import RefusedError
from tests.daemon.simulation.model_engine import ModelEngine, ModelFrame, Ring
from tests.daemon.simulation.virtual_time import VirtualTime

DEPLOYMENT = "d" * 32
LAYER_BYTES = 100
LEASE_S = 30.0
LOAD_S = 0.15  # a layer
RESTART_S = 0.6  # an engine

Reply = Callable[[str], None]  # "": done; else why not


class ModelWorker:
    """One life of a device's daemon. `told` gives the coordinator news of its engine."""

    def __init__(
        self, name: str, layers: int, recurrent: bool, time: VirtualTime, random: Random,
        send: Callable[[Ring, int, ModelFrame], None], told: Callable[[str, int], None],
    ) -> None:  # fmt: skip
        self.name, self._time, self._random = name, time, random
        self._recurrent, self._send, self._told = recurrent, send, told
        self.ledger = Ledger(layers * LAYER_BYTES)
        self.engine: ModelEngine | None = ModelEngine(name, recurrent, send)
        self.refusals = 0  # questions that it will refuse, whatever they are
        self._engines = 0

    # ---- questions ------------------------------------------------------------------------------------------------

    def reserve(self, coordinator: str, epoch: int, layers: int, added: int, reply: Reply) -> None:
        if self._refuses(reply):
            return
        asked = Reserve(DEPLOYMENT, epoch, layers * LAYER_BYTES, LEASE_S, added * LAYER_BYTES)
        try:
            self.ledger.reserve(asked, coordinator, self._time.now)
        except RefusedError as error:
            reply(str(error))
        else:
            reply("")

    def assign(self, coordinator: str, epoch: int, ring: Ring, reply: Reply) -> None:
        engine = self.engine
        if self._refuses(reply):
            return
        if engine is None:
            reply("the engine is being started")
            return
        try:
            self.ledger.commit(DEPLOYMENT, epoch, coordinator, self._time.now)
        except RefusedError as error:
            reply(str(error))
            return
        missing = engine.own(ring) - engine.slots.keys()
        engine.load(epoch, ring)
        self.check_memory()

        def loaded() -> None:
            alive = self.engine is engine and epoch in engine.rings
            reply("" if alive else "its engine ended, or it was released")

        self._time.after(LOAD_S * len(missing) * self._random.uniform(0.5, 1.5), loaded)

    def activate(self, epoch: int, reply: Reply) -> None:
        loaded = self.engine is not None and epoch in self.engine.rings
        reply("" if loaded else "nothing is loaded for this epoch")

    def release(self, coordinator: str, epoch: int, only: bool, reply: Reply) -> None:
        if any(p.coordinator != coordinator for p in self.ledger.promises() if p.deployment == DEPLOYMENT):
            reply("this deployment obeys another coordinator")
            return
        if self.engine is not None:
            over = [one for one in self.engine.rings if (one == epoch if only else one <= epoch)]
            self.engine.unload(epoch if only else 0, epoch)
            for one in over:
                self._told("unloaded", one)
        self.ledger.release(DEPLOYMENT, epoch, coordinator, only)
        reply("")

    def _refuses(self, reply: Reply) -> bool:
        if not self.refusals:
            return False
        self.refusals -= 1
        reply("it refuses")
        return True

    # ---- what happens to it ---------------------------------------------------------------------------------------

    def check_memory(self) -> None:
        taken = len(self.engine.slots) * LAYER_BYTES if self.engine is not None else 0
        ours = sum(p.nbytes for p in self.ledger.promises() if p.deployment != DEPLOYMENT)
        lent = self.ledger.lent_bytes
        assert taken + ours <= lent, f"{self.name} holds {taken} bytes beside {ours} of others, and lends {lent}"
        assert self.ledger.promised_bytes <= lent, f"{self.name} promised more than it lends"

    def crash_engine(self) -> None:
        """What it had loaded is gone; another engine starts."""
        if self.engine is None:
            return
        held = max((p.epoch for p in self.ledger.promises() if p.deployment == DEPLOYMENT), default=None)
        self.engine = None
        self._engines += 1
        life = self._engines
        if held is not None:
            self.drop()
            self._told("engine", held)

        def started() -> None:
            if life == self._engines:
                self.engine = ModelEngine(self.name, self._recurrent, self._send)
                self._told("ready", 0)

        self._time.after(RESTART_S, started)

    def drop(self) -> None:
        """Let go of everything that is held for the deployment."""
        epochs = [(p.epoch, p.coordinator) for p in self.ledger.promises() if p.deployment == DEPLOYMENT]
        for epoch, coordinator in epochs:
            self.ledger.release(DEPLOYMENT, epoch, coordinator)
            if self.engine is not None:
                self.engine.unload(0, epoch)
