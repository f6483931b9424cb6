"""Membership, driven without sockets: whom it dials, when it calls a device gone, and that two agree on one link."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peerllm.daemon.decide.membership import (
    BACKOFF_JITTER,
    BACKOFF_MOST_S,
    GRACE_S,
    HEARTBEAT_S,
    LARGER_WAIT_S,
    MAX_STATIC,
    QUIET_BACKOFF_S,
    SILENT_AFTER_S,
    SLOW,
    STALL_S,
    Membership,
    backoff_s,
)
from peerllm.daemon.decide.membership_events import (
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
    HeartbeatHeard,
    Incompatible,
    LinkName,
    Members,
    Retire,
    Sighted,
    Tick,
    Up,
    Use,
)
from tests.sizes import examples

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


@dataclass
class Silence:
    """A device that was never heard after its link came up, until `end_s`; what was done, with the time."""

    machine: Membership
    end_s: float
    done: list[tuple[float, Action]] = field(default_factory=list)

    def __post_init__(self) -> None:
        now = 0.0
        while (due := self.machine.deadline()) is not None and due <= self.end_s:
            assert due - now <= HEARTBEAT_S, "it ticks on"
            now = max(now, due)
            for action in self.machine.handle(Tick(), now):
                self.done.append((now, action))
                if isinstance(action, Dial):
                    self.machine.handle(DialFailed(action.target, "no answer"), now)

    def times(self, kind: type[Action]) -> list[float]:
        return [now for now, action in self.done if isinstance(action, kind)]


def test_silence_is_noticed_in_a_second_but_the_link_is_kept_for_the_grace() -> None:
    story = Silence(online(), GRACE_S + 0.1)
    changes = [(now, action.before, action.state) for now, action in story.done if isinstance(action, Changed)]
    assert changes == [(SILENT_AFTER_S, "online", "silent"), (GRACE_S, "silent", "offline")]
    assert story.times(Cut) == [GRACE_S]
    assert len(story.times(Beat)) == GRACE_S / HEARTBEAT_S - 1, "heartbeats go on: it may hear them"
    assert "silent for 60 s" in story.machine.members[B].reason
    for _ in range(12):
        story.machine.handle(DialFailed(B, "no answer"), GRACE_S)
    due = story.machine.deadline()
    assert due is not None and due > GRACE_S + BACKOFF_MOST_S / 2, "nobody waits for it any more"


def test_a_silent_device_is_dialled_anew_beside_its_link_often_and_in_turn() -> None:
    machine = online()
    dials = Silence(machine, 30.0).times(Dial)
    assert dials[0] == SILENT_AFTER_S, "at once: the smaller id does not wait"
    assert all(later - earlier <= QUIET_BACKOFF_S + HEARTBEAT_S for earlier, later in pairwise(dials))
    assert machine.members[B].link == LinkName(B, 1) and machine.members[B].reason == "silent for 1 s"
    assert Silence(online(B, A), 30.0).times(Dial)[0] >= SILENT_AFTER_S + LARGER_WAIT_S


def test_a_device_that_is_heard_again_is_online_over_the_same_link() -> None:
    machine = online()
    machine.handle(Tick(), SILENT_AFTER_S)
    assert machine.handle(Heard(LinkName(A, 7)), 1.1) == [], "another link says nothing of this one"
    assert machine.handle(Heard(LinkName(B, 1)), 5.0) == [Changed(B, "silent", "online", "")]
    assert machine.handle(Heard(LinkName(B, 1)), 5.1) == []
    actions = machine.handle(Tick(), 5.2)
    assert kinds(actions) == ["Beat"], "nobody dials it any more"


def beating(machine: Membership, until_s: float, now: float = 0.0) -> list[tuple[float, Action]]:
    """Its link is quiet, but its heartbeats come as datagrams."""
    done: list[tuple[float, Action]] = []
    while now < until_s:
        now += HEARTBEAT_S
        for action in (*machine.handle(HeartbeatHeard(B), now), *machine.handle(Tick(), now)):
            done.append((now, action))
            if isinstance(action, Dial):
                machine.handle(DialFailed(B, "no answer"), now)
    return done


def test_a_device_whose_heartbeats_come_beside_its_quiet_link_is_slow_and_not_silent() -> None:
    machine = online()
    done = beating(machine, 30.0)
    changes = [(now, action) for now, action in done if isinstance(action, Changed)]
    assert changes == [(SILENT_AFTER_S, Changed(B, "online", "online", SLOW))]
    dials = [now for now, action in done if isinstance(action, Dial)]
    assert dials[0] == SILENT_AFTER_S and len(dials) > 20, "its link may be broken: another is tried beside it"
    assert machine.handle(Heard(LinkName(B, 1)), 30.1) == [Changed(B, "online", "online", "")]
    assert kinds(machine.handle(Tick(), 30.3)) == ["Beat"]


def test_a_device_that_only_beats_is_not_waited_for_for_ever() -> None:
    done = beating(online(), GRACE_S + 1.0)
    assert (GRACE_S, Cut(LinkName(B, 1), "silent for 60 s")) in done
    assert done[-1][1] == Dial(B, (HOST,), 8643)


def test_a_new_link_of_a_slow_device_is_renewed_too() -> None:
    machine = online()
    beating(machine, 2.0)
    assert Changed(B, "online", "online", "", True) in machine.handle(Up(LinkName(A, 2), B, HOST, 8643, B), 2.0)


def test_heartbeats_keep_nobody_online_that_has_no_link() -> None:
    machine = paired()
    assert machine.handle(HeartbeatHeard(B), 1.0) == [] == machine.handle(HeartbeatHeard(C), 1.0)
    assert machine.members[B].state == "offline"
    machine = online()
    machine.handle(Tick(), SILENT_AFTER_S)
    assert machine.members[B].state == "silent"
    assert machine.handle(HeartbeatHeard(B), 1.2) == [Changed(B, "silent", "online", SLOW)]
    assert machine.handle(HeartbeatHeard(B), 1.3) == []
    for now in (1.5, 1.75, 2.0, 2.25, 2.5):
        machine.handle(Tick(), now)
    assert machine.members[B].state == "silent", "the last sign of life counts"


def test_a_heartbeat_alone_does_not_end_the_silence_of_this_devices_own_standstill() -> None:
    machine = online()
    machine.handle(Tick(), SILENT_AFTER_S)
    machine.handle(Tick(), 20.0)
    assert machine.members[B].state == "silent", "it stood still itself, which tells nothing of the other"


def test_a_connection_that_closes_while_its_device_is_silent_ends_the_waiting() -> None:
    machine = online()
    machine.handle(Tick(), SILENT_AFTER_S)
    assert machine.handle(Down(LinkName(B, 1), "reset"), 3.0) == [Changed(B, "silent", "offline", "reset")]
    assert machine.handle(Farewell(LinkName(B, 1), "late"), 3.1) == [Cut(LinkName(B, 1), "it said goodbye")]


@pytest.mark.parametrize("link", [LinkName(A, 2), LinkName(B, 2), LinkName(B, 0)], ids=["mine", "theirs", "clock"])
def test_a_newer_link_of_a_silent_device_replaces_the_old_whoever_dialled_it(link: LinkName) -> None:
    machine = online()
    machine.handle(Tick(), SILENT_AFTER_S)
    assert machine.handle(Up(link, B, HOST, 8643, None), 4.0) == [
        Use(B, link),
        Changed(B, "silent", "online", "", renewed=True),
        Retire(LinkName(B, 1)),
    ]
    assert "Cut" not in kinds(machine.handle(Tick(), 4.0 + SILENT_AFTER_S / 2)), "its silence counts anew"
    assert machine.handle(Down(LinkName(B, 1), "closed"), 5.0) == []


def test_who_is_not_heard_by_the_other_side_takes_its_new_link_and_knows_why_it_came() -> None:
    machine = online(B, A)
    machine.handle(Heard(LinkName(A, 1)), 3.0)
    (use, changed, retire) = machine.handle(Up(LinkName(A, 2), A, HOST, 8643), 3.0)
    assert changed == Changed(A, "online", "online", "", renewed=True)
    assert (use, retire) == (Use(A, LinkName(A, 2)), Retire(LinkName(A, 1)))


def test_an_old_dial_that_ends_late_does_not_replace_a_newer_link_of_a_silent_device() -> None:
    machine = online()
    machine.handle(Up(LinkName(A, 9), B, HOST, 8643), 0.1)
    machine.handle(Tick(), 0.1 + SILENT_AFTER_S)
    assert machine.members[B].state == "silent"
    assert machine.handle(Up(LinkName(A, 8), B, HOST, 8643, B), 1.2) == [Retire(LinkName(A, 8))]


def test_a_fresh_sighting_of_a_silent_device_ends_the_wait_for_the_next_dial() -> None:
    machine = online()
    for now in (1.0, 1.3, 1.9, 3.0):
        machine.handle(Tick(), now)
        machine.handle(DialFailed(B, "no answer"), now)
    assert kinds(machine.handle(Sighted(B[:16], ("192.0.2.77",), 8643), 3.0)) == ["Dial"]


def test_a_silent_device_may_be_at_its_static_address() -> None:
    machine = Membership(A, ((HOST, 8643),))
    machine.handle(Members(frozenset({B})), 0.0)
    machine.handle(Up(LinkName(A, 1), B, HOST, 8643, (HOST, 8643)), 0.0)
    targets = {str(action.target) for _, action in Silence(machine, 20.0).done if isinstance(action, Dial)}
    assert targets == {B, str((HOST, 8643))}


def test_heard_keeps_a_device_alive() -> None:
    machine = online()
    now = 0.0
    for _ in range(40):
        now += HEARTBEAT_S
        machine.handle(Heard(LinkName(B, 1)), now)
        assert "Changed" not in kinds(machine.handle(Tick(), now))


def test_a_device_that_stood_still_itself_gives_the_others_time_to_be_heard() -> None:
    machine = online()
    machine.handle(Tick(), 0.1)
    assert kinds(machine.handle(Tick(), 90.0)) == ["Beat"], "the silence was our own"
    assert "Changed" in kinds(machine.handle(Tick(), 90.3)), "but it is not trusted for ever"
    assert machine.members[B].state == "silent"
    machine.handle(Tick(), 200.0)
    assert machine.members[B].state == "silent", "nor does the grace count what this device slept"


@pytest.mark.parametrize(("second", "trusted"), [(0.1, True), (1.0 - HEARTBEAT_S - STALL_S, False)])
def test_how_long_it_must_have_stood_still_for_that(second: float, trusted: bool) -> None:
    machine = online()
    machine.handle(Tick(), second)
    assert ("Changed" not in kinds(machine.handle(Tick(), 1.0))) is trusted


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
        (LinkName(A, 1), LinkName(B, 2), LinkName(B, 2)),
        (LinkName(B, 2), LinkName(A, 1), LinkName(B, 2)),
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
    mute: set[tuple[int, LinkName]] = field(default_factory=set)  # nothing arrives at this side over this link

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
        known = self.machines[side].members[self.ids[1 - side]].link
        self.counts[side] = max(self.counts[side], known.number if known is not None else 0) + 1
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
            if member.link in self.alive and (side, member.link) not in self.mute:
                self.feed(side, Heard(member.link))
            self.feed(side, Tick())

    def settle(self) -> None:
        for _ in range(200):
            while self.dials or self.events[0] or self.events[1]:
                while self.dials:
                    self.finish_dial(0, True)
                for side in (0, 1):
                    while self.events[side]:
                        self.deliver(side, 0)
            self.step_time(0.2)


choices = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 7), st.booleans()), max_size=80)


@settings(max_examples=examples(200))
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
        elif kind == 6 and world.alive:
            world.mute.add((side, sorted(world.alive)[(pick // 2) % len(world.alive)]))
    for side in (0, 1):
        world.feed(side, Sighted(world.ids[1 - side][:16], (HOST,), 1))
    world.settle()
    links = [world.machines[side].members[world.ids[1 - side]].link for side in (0, 1)]
    assert links[0] is not None and links[0] == links[1]
    assert world.alive == {links[0]}
    assert all(world.machines[s].members[world.ids[1 - s]].state == "online" for s in (0, 1))
