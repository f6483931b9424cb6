"""What happens in the household reaches the parts that act on it, in this order, and no others."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from peerllm.daemon.control_messages import DeploymentView, DeviceView
from peerllm.daemon.decide.membership_events import State
from peerllm.daemon.household_events import HouseholdEvents
from peerllm.errors import UnavailableError
from tests.daemon.noting import Noting

ME, OTHER = "a" * 64, "b" * 64


class Household:
    """A daemon's parts that note what is told to them; `peers`, `free` and `views` are what the household has."""

    def __init__(self) -> None:
        self.calls: list[tuple[object, ...]] = []
        self.peers: dict[str, SimpleNamespace] = {}
        self.free: dict[str, int] = {}
        self.views: list[SimpleNamespace] = []
        for part in ("coordinator", "worker", "successor", "relays", "household_models"):
            setattr(self, part, Noting(part, self.calls))
        self.network = SimpleNamespace(peers=lambda: self.peers, link_monitor=Noting("link_monitor", self.calls))
        self.device_engine = SimpleNamespace(
            host=SimpleNamespace(state="running", wake=lambda: self.calls.append(("wake",))),
            trust=lambda entries: self.calls.append(("trust", entries)),
            time_link=self._time_link,
        )
        self.home = SimpleNamespace(
            me=ME,
            candidates=lambda: {device: SimpleNamespace(free_bytes=n) for device, n in self.free.items()},
            views=lambda: self.views,
            address=lambda device: (("10.0.0.2",), 8644),
            name=lambda device: "desk",
        )
        self.events = HouseholdEvents(self)  # type: ignore[arg-type]

    async def _time_link(self, device: str, hosts: object, port: int, sizes: object) -> list[tuple[int, float]]:
        return [(port, 0.5)]

    def poke(self) -> None:
        self.calls.append(("poke",))

    def taken(self) -> list[tuple[object, ...]]:
        """The calls since the last look."""
        calls, self.calls[:] = self.calls[:], []
        return calls


def peer(engine: str = "running", deployments: tuple[DeploymentView, ...] = ()) -> SimpleNamespace:
    return SimpleNamespace(state="online", view=DeviceView(0, 0, engine, deployments))


VANISHED, AWAY = ("relays.vanished", OTHER), ("worker.away", OTHER)
ONLINE, SILENT, GONE = (("successor.presence", OTHER, what) for what in ("online", "silent", "gone"))
IS = ("coordinator.device_is", OTHER)


@pytest.mark.parametrize(("before", "state", "renewed", "calls"), [
    ("silent", "online", False, [(*ONLINE, False), ("worker.back", OTHER), (*IS, "online")]),
    ("silent", "online", True, [(*ONLINE, True)]),
    ("connecting", "online", True, [(*ONLINE, True)]),
    ("online", "silent", False, [SILENT, AWAY, (*IS, "silent", "is cut")]),
    ("silent", "offline", False, [VANISHED, GONE, AWAY, (*IS, "gone", "is gone (cut)")]),
    ("online", "left", False, [VANISHED, GONE, AWAY, (*IS, "gone", "is gone (cut)")]),
    ("offline", "left", False, [VANISHED, AWAY, (*IS, "gone", "is gone (cut)")]),
    ("offline", "connecting", False, []),
])  # fmt: skip
def test_who_hears_of_a_device_s_state(before: State, state: State, renewed: bool, calls: list[object]) -> None:
    household = Household()
    household.events._device_state(OTHER, before, state, "cut", renewed)
    assert household.taken() == calls


def test_a_device_reached_anew_counts_as_that_once_it_said_what_it_has_loaded() -> None:
    household = Household()
    household.events._device_state(OTHER, "silent", "online", "", True)
    household.taken()
    obeyed = {"d" * 32: OTHER}
    view = DeviceView(0, 0, "running", (), obeyed=obeyed)
    for renewed in (True, False):
        household.events._heard(OTHER, view)
        assert household.taken() == [
            ("coordinator.told", OTHER, ()), ("worker.back", OTHER), (*IS, "online", ("renewed", renewed)),
            ("successor.told", OTHER, (), obeyed),
        ]  # fmt: skip
    household.events._heard(OTHER, DeviceView(0, 0, "running", (), leaving="going down"))
    assert (*IS, "leaving", "is leaving: going down", False) in household.taken()


def test_a_new_roster_goes_to_the_engine_first_and_who_has_said_nothing_is_away() -> None:
    household = Household()
    household.peers = {OTHER: peer(), "c" * 64: SimpleNamespace(state="offline", view=None)}
    household.events._roster_changed(())
    assert household.taken() == [
        ("trust", ()), ("coordinator.device_is", "c" * 64, "gone", "is not here"), ("poke",)
    ]  # fmt: skip


def test_only_more_free_memory_stirs_the_deployments_and_only_a_new_plan_wakes_the_engine() -> None:
    household = Household()
    stirred, woken = ("coordinator.stir", "memory was freed"), ("wake",)
    for free, states, expected in [
        (10, (), [stirred]), (10, (), []), (9, ("planning",), [woken]), (10, ("planning",), [stirred]),
        (10, ("serving", "planning"), [woken]), (10, ("serving",), []),
    ]:  # fmt: skip
        household.free = {OTHER: free}
        household.views = [SimpleNamespace(deployment=n, state=state) for n, state in enumerate(states)]
        household.events.changed()
        assert [call for call in household.taken() if call in (stirred, woken)] == expected, (free, states)


async def test_links_are_timed_between_engines_that_both_run() -> None:
    household = Household()
    timed = ("link_monitor.engine_changed",)
    for engine, expected in [("idle", False), ("running", True), ("running", False), ("idle", False)]:
        household.peers = {OTHER: peer(engine)}
        household.events.changed()
        assert (timed in household.taken()) is expected, engine
    household.peers = {OTHER: peer("running")}
    assert await household.events._echo(OTHER, (1,)) == [(8644, 0.5)]
    household.device_engine.host.state = "idle"
    with pytest.raises(UnavailableError, match="the engine of desk cannot be reached yet"):
        await household.events._echo(OTHER, (1,))
