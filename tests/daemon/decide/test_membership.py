"""Membership, driven without sockets: whom it dials, when it calls a device gone, and that two agree on one link."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peerllm.daemon.decide.membership import (
    BACKOFF_JITTER,
    BACKOFF_MOST_S,
    DEAD_AFTER_S,
    HEARTBEAT_S,
    LARGER_WAIT_S,
    MAX_STATIC,
    STALL_S,
    Action,
    Beat,
    Changed,
    Cut,
    Dial,
    DialFailed,
    Down,
    Event,
    Farewell,
    Heard,
    Incompatible,
    LinkName,
    Members,
    Membership,
    Retire,
    Sighted,
    Tick,
    Up,
    Use,
    backoff_s,
)

A, B, C = "a" * 64, "b" * 64, "c" * 64
HOST = "192.0.2.9"


def kinds(actions: list[Action]) -> list[str]:
    return [type(action).__name__ for action in actions]


def paired(me: str = A, other: str = B, now: float = 0.0) -> Membership:
    machine = Membership(me)
    machine.handle(Members(frozenset({other})), now)
    return machine


def online(me: str = A, other: str = B, now: float = 0.0) -> Membership:
    machine = paired(me, other, now)
    machine.handle(Up(LinkName(other, 1), other, HOST, 8643), now)
    assert machine.members[other].state == "online"
    return machine


def test_a_sighting_of_a_member_is_dialled_and_of_a_stranger_not() -> None:
    machine = paired()
    assert machine.handle(Sighted(C[:16], (HOST,), 8643), 1.0) == []
    assert machine.handle(Sighted(B[:16], (HOST,), 8643), 1.0) == [Dial(B, (HOST,), 8643)]
    assert machine.handle(Sighted(B[:16], (HOST,), 8643), 1.1) == [], "one dial at a time"


def test_the_larger_id_waits_for_the_smaller() -> None:
    machine = paired(B, A)
    assert machine.handle(Sighted(A[:16], (HOST,), 8643), 0.0) == []
    assert machine.handle(Tick(), LARGER_WAIT_S) == [Dial(A, (HOST,), 8643)]


def test_failed_dials_back_off_within_bounds_and_a_sighting_ends_the_wait() -> None:
    machine = paired()
    machine.handle(Sighted(B[:16], (HOST,), 8643), 0.0)
    now, waits = 0.0, []
    for _ in range(12):
        machine.handle(DialFailed(B, "refused"), now)
        due = machine.deadline()
        assert due is not None
        waits.append(due - now)
        assert machine.handle(Tick(), (now + due) / 2) == [], "not before its time"
        now = due
        assert kinds(machine.handle(Tick(), now)) == ["Dial"]
    assert all(wait <= BACKOFF_MOST_S * (1 + BACKOFF_JITTER) for wait in waits)
    assert waits[-1] > 20 * waits[0]
    machine.handle(DialFailed(B, "refused"), now)
    assert kinds(machine.handle(Sighted(B[:16], (HOST,), 8643), now)) == ["Dial"]
    assert machine.members[B].state == "offline" and machine.members[B].reason == "refused"


def test_backoff_depends_only_on_its_arguments() -> None:
    assert backoff_s(A, B, 3) == backoff_s(A, B, 3) != backoff_s(B, A, 3)


def test_silence_is_noticed_in_a_second_and_heartbeats_are_sent() -> None:
    machine = online()
    now, beats, gone = 0.0, 0, None
    while gone is None and now < 5:
        due = machine.deadline()
        assert due is not None and due - now <= HEARTBEAT_S
        now = due
        for action in machine.handle(Tick(), now):
            beats += isinstance(action, Beat)
            if isinstance(action, Cut):
                gone = now
    assert gone == pytest.approx(DEAD_AFTER_S)
    assert beats == 3
    assert machine.members[B].state == "offline" and "silent" in machine.members[B].reason


def test_heard_keeps_a_device_alive() -> None:
    machine = online()
    now = 0.0
    for _ in range(40):
        now += HEARTBEAT_S
        machine.handle(Heard(LinkName(B, 1)), now)
        assert "Cut" not in kinds(machine.handle(Tick(), now))


def test_a_device_that_stood_still_itself_gives_the_others_time_to_be_heard() -> None:
    machine = online()
    machine.handle(Tick(), 0.1)
    assert "Cut" not in kinds(machine.handle(Tick(), 60.0)), "the silence was our own"
    assert "Cut" in kinds(machine.handle(Tick(), 60.3)), "but it is not trusted for ever"


@pytest.mark.parametrize(("second", "trusted"), [(0.1, True), (1.0 - HEARTBEAT_S - STALL_S, False)])
def test_how_long_it_must_have_stood_still_for_that(second: float, trusted: bool) -> None:
    machine = online()
    machine.handle(Tick(), second)
    assert ("Cut" not in kinds(machine.handle(Tick(), 1.0))) is trusted


def test_a_reset_is_noticed_at_once_and_dialled_again() -> None:
    machine = online()
    assert machine.handle(Down(LinkName(B, 1), "reset"), 2.0) == [Changed(B, "online", "offline", "reset")]
    due = machine.deadline()
    assert due is not None
    assert machine.handle(Tick(), due) == [Dial(B, (HOST,), 8643)]


def test_goodbye_is_left_and_not_hammered() -> None:
    machine = online()
    actions = machine.handle(Farewell(LinkName(B, 1), "SIGTERM"), 2.0)
    assert Changed(B, "online", "left", "SIGTERM") in actions
    due = machine.deadline()
    assert due is not None and due > 2.0 + 5
    machine.handle(Tick(), due)
    machine.handle(DialFailed(B, "refused"), due)
    assert machine.members[B].state == "left"
    machine.handle(Up(LinkName(B, 2), B, HOST, 8643), 99.0)
    assert machine.members[B].state == "online"


def test_removal_cuts_the_link_and_a_stranger_is_cut() -> None:
    machine = online()
    actions = machine.handle(Members(frozenset()), 1.0)
    assert kinds(actions) == ["Cut", "Changed"] and B not in machine.members
    assert kinds(machine.handle(Up(LinkName(B, 2), B, HOST, 8643), 2.0)) == ["Cut"]
    assert machine.deadline() is None


def test_an_unusable_device_is_named_and_asked_seldom() -> None:
    machine = paired()
    machine.handle(Sighted(B[:16], (HOST,), 8643), 0.0)
    machine.handle(Incompatible(B, "speaks protocol 9", B), 0.1)
    assert machine.members[B].reason == "speaks protocol 9"
    due = machine.deadline()
    assert due is not None and due > 5


def test_a_static_peer_is_dialled_by_address_and_then_known() -> None:
    machine = Membership(A, ((HOST, 8643),))
    assert machine.handle(Tick(), 0.0) == [], "an unpaired device has nobody to trust"
    assert Dial((HOST, 8643), (HOST,), 8643) in machine.handle(Members(frozenset({B})), 0.0)
    actions = machine.handle(Up(LinkName(A, 1), B, HOST, 8643, (HOST, 8643)), 0.1)
    assert Use(B, LinkName(A, 1)) in actions
    machine.handle(Down(LinkName(A, 1), "reset"), 1.0)
    assert [a for a in machine.handle(Tick(), 60.0) if isinstance(a, Dial)] == [Dial(B, (HOST,), 8643)]
    for _ in range(3):
        machine.handle(DialFailed(B, "refused"), 61.0)
    assert Dial((HOST, 8643), (HOST,), 8643) in machine.handle(Tick(), 62.0), "it may be another device's address now"


def test_static_peers_are_bounded() -> None:
    machine = Membership(A, tuple(("10.0.0.1", port) for port in range(1, MAX_STATIC + 10)))
    dials = machine.handle(Members(frozenset({B})), 0.0)
    assert [action.port for action in dials if isinstance(action, Dial)] == list(range(1, MAX_STATIC + 1))


def test_another_device_answering_at_the_address_is_used_as_what_it_is() -> None:
    machine = Membership(A)
    machine.handle(Members(frozenset({B, C})), 0.0)
    machine.handle(Sighted(B[:16], (HOST,), 8643), 0.0)
    machine.handle(Up(LinkName(A, 1), C, HOST, 8643, B), 0.1)
    assert machine.members[C].state == "online" and machine.members[B].link is None
    assert not machine.members[B].attempt.dialling


def test_false_sightings_never_push_out_the_address_that_worked() -> None:
    machine = online()
    for n in range(100):
        machine.handle(Sighted(B[:16], tuple(f"203.0.113.{n}" for _ in range(9)), 1), 1.0)
    assert machine.members[B].hosts[0] == HOST and len(machine.members[B].hosts) <= 16


def test_false_sightings_never_push_out_the_port_that_worked() -> None:
    machine = online()
    machine.handle(Sighted(B[:16], (HOST,), 1), 1.0)
    assert machine.members[B].port == 8643, "weights and measurements go where the device itself said"
    now, dialled = 1.0, []
    machine.handle(Down(LinkName(B, 1), "reset"), now)
    for spoofed in (False, False, True, True):
        now += 60.0
        if spoofed:
            machine.handle(Sighted(B[:16], (HOST,), 1), now)
        (dial,) = [action for action in machine.handle(Tick(), now + 1.0) if isinstance(action, Dial)] or [None]
        dialled.append(dial.port if dial else 0)
        machine.handle(DialFailed(B, "nobody there"), now + 1.0)
    assert set(dialled) >= {1, 8643}, "both are tried in turn: it may really have moved"
    machine.handle(Up(LinkName(B, 2), B, HOST, 9000), now + 2.0)
    assert machine.members[B].port == 9000


@pytest.mark.parametrize(
    ("first", "second", "kept"),
    [
        (LinkName(A, 1), LinkName(B, 1), LinkName(A, 1)),
        (LinkName(B, 1), LinkName(A, 1), LinkName(A, 1)),
        (LinkName(A, 1), LinkName(A, 2), LinkName(A, 2)),
        (LinkName(A, 2), LinkName(A, 1), LinkName(A, 2)),
    ],
)
def test_of_two_links_both_sides_keep_the_same(first: LinkName, second: LinkName, kept: LinkName) -> None:
    for me, other in ((A, B), (B, A)):
        machine = paired(me, other)
        machine.handle(Up(first, other, HOST, 1), 0.0)
        actions = machine.handle(Up(second, other, HOST, 1), 0.0)
        assert machine.members[other].link == kept
        assert Retire(first if kept == second else second) in actions
        assert machine.members[other].state == "online" and not any(isinstance(a, Changed) for a in actions)


# ---- two machines against each other --------------------------------------------------------------------------------


@dataclass
class World:
    """Two machines and the links between them; what happens next is picked from outside."""

    ids: tuple[str, str] = (A, B)
    now: float = 0.0
    machines: list[Membership] = field(default_factory=list)
    events: list[list[Event]] = field(default_factory=lambda: [[], []])  # per machine, in order per link only
    dials: list[tuple[int, Dial]] = field(default_factory=list)
    counts: list[int] = field(default_factory=lambda: [0, 0])
    alive: set[LinkName] = field(default_factory=set)

    def __post_init__(self) -> None:
        for side in (0, 1):
            self.machines.append(Membership(self.ids[side]))
            self.feed(side, Members(frozenset({self.ids[1 - side]})))

    def feed(self, side: int, event: Event) -> None:
        for action in self.machines[side].handle(event, self.now):
            if isinstance(action, Dial):
                self.dials.append((side, action))
            elif isinstance(action, (Cut, Retire)):
                self.end(action.link)

    def end(self, link: LinkName) -> None:
        if link in self.alive:
            self.alive.discard(link)
            for side in (0, 1):
                self.events[side].append(Down(link, "closed"))

    def finish_dial(self, index: int, works: bool) -> None:
        side, dial = self.dials.pop(index)
        if not works:
            self.events[side].append(DialFailed(dial.target, "refused"))
            return
        self.counts[side] += 1
        link = LinkName(self.ids[side], self.counts[side])
        self.alive.add(link)
        other = 1 - side
        self.events[side].append(Up(link, self.ids[other], HOST, 1, dial.target))
        self.events[other].append(Up(link, self.ids[side], HOST, 1))

    def deliver(self, side: int, index: int) -> None:
        """Links are independent of each other; the events of one stay in order."""
        event = self.events[side][index]
        link = getattr(event, "link", None)
        for place, earlier in enumerate(self.events[side][:index]):
            if getattr(earlier, "link", None) == link:
                event, index = earlier, place
                break
        del self.events[side][index]
        self.feed(side, event)

    def step_time(self, seconds: float) -> None:
        self.now += seconds
        for side in (0, 1):
            member = self.machines[side].members[self.ids[1 - side]]
            if member.link is not None and member.link in self.alive:
                self.machines[side].handle(Heard(member.link), self.now)
            self.feed(side, Tick())

    def settle(self) -> None:
        for _ in range(400):
            while self.dials or self.events[0] or self.events[1]:
                while self.dials:
                    self.finish_dial(0, True)
                for side in (0, 1):
                    while self.events[side]:
                        self.deliver(side, 0)
            self.step_time(0.1)


choices = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 7), st.booleans()), max_size=80)


@settings(max_examples=300, deadline=None)
@given(choices, st.booleans())
def test_two_machines_always_end_with_exactly_one_link(script: list[tuple[int, int, bool]], swapped: bool) -> None:
    world = World(ids=(B, A) if swapped else (A, B))
    for kind, pick, yes in script:
        side = pick % 2
        if kind == 0:
            world.feed(side, Sighted(world.ids[1 - side][:16], (HOST,), 1, fresh=yes))
        elif kind == 1 and world.dials:
            world.finish_dial(pick % len(world.dials), yes)
        elif kind in (2, 3) and world.events[side]:
            world.deliver(side, pick % len(world.events[side]))
        elif kind == 4:
            world.step_time(0.3 if yes else 2.0)
        elif kind == 5 and world.alive and yes:
            world.end(sorted(world.alive)[pick % len(world.alive)])
    for side in (0, 1):
        world.feed(side, Sighted(world.ids[1 - side][:16], (HOST,), 1))
    world.settle()
    links = [world.machines[side].members[world.ids[1 - side]].link for side in (0, 1)]
    assert links[0] is not None and links[0] == links[1]
    assert world.alive == {links[0]}
    assert all(world.machines[s].members[world.ids[1 - s]].state == "online" for s in (0, 1))
