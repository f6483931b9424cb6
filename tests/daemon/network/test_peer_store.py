"""What is remembered of other devices, and what of another's hints about them is believed."""

from __future__ import annotations

from peerllm.daemon.control_messages import DeviceView, Place, Whereabouts
from peerllm.daemon.decide.membership import Member
from peerllm.daemon.network.network_files import Known
from peerllm.daemon.network.peer_store import MAX_HINTS, MAX_HOST_CHARS, PeerStore, whereabouts
from peerllm.transport.roster.entry import RosterEntry
from peerllm.transport.roster.roster import MAX_MEMBERS
from tests.daemon.house import hello

A, B, C = "a" * 64, "b" * 64, "c" * 64


def entry(device: str) -> RosterEntry:
    made = object.__new__(RosterEntry)
    object.__setattr__(made, "device", device)
    object.__setattr__(made, "name", f"device-{device[0]}")
    return made


MEMBERS = {device: entry(device) for device in (A, B)}


def test_hints_are_taken_about_members_alone_and_only_where_they_could_be_true() -> None:
    store = PeerStore(())
    many = tuple(f"10.0.0.{last}" for last in range(1, MAX_HINTS + 4))
    said = Whereabouts((
        Place(A, many, 8643),
        Place(B, ("x" * (MAX_HOST_CHARS + 1), "10.0.1.1", "y" * MAX_HOST_CHARS), 65535),
        Place(C, ("10.0.2.1",), 8643), Place(B, ("10.0.1.2",), 0), Place(B, ("10.0.1.2",), 65536), Place(B, (), 8643),
    ))  # fmt: skip
    hints = store.hinted(said, MEMBERS)
    assert [(hint.prefix, hint.hosts, hint.port) for hint in hints] == [
        (A[:16], many[:MAX_HINTS], 8643),
        (B[:16], ("10.0.1.1", "y" * MAX_HOST_CHARS), 65535),
    ]
    assert store.known[A].hosts == many[:MAX_HINTS] and set(store.known) == {A, B}


def test_a_flood_of_hints_is_bounded() -> None:
    said = Whereabouts((Place(A, ("10.0.0.1",), 8643),) * (MAX_MEMBERS + 5))
    assert len(PeerStore(()).hinted(said, MEMBERS)) == MAX_MEMBERS


def test_a_hint_does_not_change_where_a_device_was_really_reached() -> None:
    reached = Known(A, "device-a", ("10.0.0.7",), 8643, 8644)
    store = PeerStore((reached,))
    assert store.hinted(Whereabouts((Place(A, ("10.6.6.6",), 1),)), MEMBERS)
    assert store.known == {A: reached}
    member = Member(A, hosts=("10.0.0.9",), port=9)
    assert store.where({A: member}, MEMBERS) == (Known(A, "device-a", ("10.0.0.9",), 9, 8644),)
    store.hellos[A] = hello("a", 1)
    (known,) = store.where({A: member, B: Member(B), C: Member(C, hosts=("10.0.0.3",))}, MEMBERS)
    assert known.data_port == 2, "as it said itself; nothing of one never reached, or of a stranger"


def test_addresses_on_an_interface_of_this_device_are_told_nobody() -> None:
    members = [
        Member(A, hosts=("fe80::1%4", *(f"10.0.0.{last}" for last in range(MAX_HINTS + 1))), port=1),
        Member(B, hosts=("fe80::2%eth0",), port=2),
    ]
    assert whereabouts(members) == Whereabouts((Place(A, tuple(f"10.0.0.{n}" for n in range(MAX_HINTS)), 1),))


def test_who_left_the_household_is_forgotten() -> None:
    store = PeerStore((Known(A, "a", ("h",), 1, 2), Known(B, "b", ("h",), 1, 2)))
    for device in (A, B):
        store.hellos[device], store.views[device] = hello("x", 1), DeviceView(1, 2, "running", ())
    store.keep_only({B})
    assert set(store.known) == set(store.hellos) == set(store.views) == {B}
