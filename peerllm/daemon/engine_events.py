"""What happens to this device's engine goes to the parts of the daemon that act on it."""

from __future__ import annotations

from typing import Protocol

from peerllm.daemon.control_messages import DeploymentView
from peerllm.daemon.decide.ledger import Ledger
from peerllm.daemon.deployment.coordinator import Coordinator
from peerllm.daemon.deployment.surroundings import Home
from peerllm.daemon.deployment.worker import Worker
from peerllm.daemon.network import Network
from peerllm.engine.messages import FromEngine, LinkLost, LinkTraffic, LoadProgress, Tokens


def may_need_engines(view: DeploymentView) -> bool:
    """Whether a device without layers of this deployment may need its engine at once.

    An engine takes 100 MB and seconds to start, for which an answer would wait when another device of its plan is lost.
    """
    several = len({stage.device for stage in view.stages}) > 1
    return view.state in ("planning", "loading") or (view.state == "serving" and several)


class EngineEventParts(Protocol):
    """What is needed of the daemon."""

    network: Network
    ledger: Ledger
    home: Home
    coordinator: Coordinator
    worker: Worker

    def poke(self) -> None: ...


class EngineEvents:
    """The engine's watcher (engine_link/device_engine.EngineWatcher)."""

    def __init__(self, parts: EngineEventParts) -> None:
        self._parts = parts

    def needed(self) -> bool:
        parts = self._parts
        views = (*parts.coordinator.views(), *parts.home.views())
        return bool(parts.ledger.promises()) or any(may_need_engines(view) for view in views)

    def heard(self, event: FromEngine) -> None:
        match event:
            case Tokens():
                self._parts.coordinator.tokens(event)
            case LoadProgress():
                self._parts.worker.progress(event)
            case LinkLost():
                self._parts.worker.link_lost(event)
            case LinkTraffic(frames, handover_s):
                for frame in frames:
                    self._parts.network.link_monitor.framed(*frame)
                self._parts.network.link_monitor.handover(handover_s)

    def lost(self, reason: str) -> None:
        self._parts.worker.engine_lost(reason)
        self._parts.coordinator.device_is(self._parts.home.me, "gone", f"lost its engine ({reason})")
        self._parts.poke()

    def ready(self) -> None:
        self._parts.network.set_hello_changed()
        self._parts.network.link_monitor.engine_changed()
        self._parts.coordinator.device_is(self._parts.home.me, "online")
        self._parts.poke()

    def changed(self) -> None:
        self._parts.poke()
