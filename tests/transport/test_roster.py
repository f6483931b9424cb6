"""The signed roster: who belongs, in whatever order one hears of it, and nobody who was put out."""

from __future__ import annotations

import os
from dataclasses import replace
from itertools import pairwise
from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from peerllm.errors import AuthenticationError, BadInputError, NotFoundError, OverloadedError
from peerllm.transport.identity import Identity
from peerllm.transport.roster import roster as roster_module
from peerllm.transport.roster.entry import MAX_COUNTER, RosterEntry, check_signature, sign_entry
from peerllm.transport.roster.roster import MAX_ENTRIES, Change, Roster

HISTORIES = int(os.environ.get("PEERLLM_ROSTER_HISTORIES", "25"))


def pair(inviter: Roster, inviter_identity: Identity, joiner: Roster, joiner_identity: Identity) -> None:
    """What the pairing protocol does with the two lists."""
    entry = inviter.introduce(inviter_identity, joiner_identity.certificate_pem, "joiner", above=joiner.counter)
    told = (*(e for e in inviter.vouch(inviter_identity) if e.device != joiner_identity.device), entry)
    above = max(joiner.counter, *(e.counter for e in told))
    back = sign_entry(joiner_identity, inviter_identity.certificate_pem, "inviter", above + 1)
    inviter.merge((entry, back))
    joiner.merge((*told, back))


def gossip(*rosters: Roster) -> None:
    """Until nobody learns anything new, among devices that let each other in."""
    for _ in range(8 * len(rosters)):
        before = [roster.export() for roster in rosters]
        for one in rosters:
            for other in rosters:
                if one.is_member(other.device) and other.is_member(one.device):
                    one.merge(other.export())
        if before == [roster.export() for roster in rosters]:
            return
    raise AssertionError("gossip does not come to rest")


@pytest.fixture
def household(identities: list[Identity]) -> list[Roster]:
    """0 invited 1, 1 invited 2, 2 invited 3; all have heard of each other. 4 and 5 are strangers."""
    rosters = [Roster.create(identity, f"device {number}") for number, identity in enumerate(identities)]
    for number in range(3):
        pair(rosters[number], identities[number], rosters[number + 1], identities[number + 1])
    gossip(*rosters[:4])
    return rosters


def test_a_household_of_one(alice: Identity) -> None:
    roster = Roster.create(alice, "  Kitchen\n laptop ")
    (entry,) = roster.members().values()
    assert (entry.device, entry.name, entry.introducer, entry.counter) == (
        alice.device,
        "Kitchen laptop",
        alice.device,
        1,
    )
    assert not Roster.create(alice, "x").merge(roster.export())


def test_one_code_per_device_is_enough(household: list[Roster], identities: list[Identity]) -> None:
    everyone = {identity.device for identity in identities[:4]}
    assert [set(roster.members()) for roster in household[:4]] == [everyone] * 4


def test_it_survives_the_disk(household: list[Roster]) -> None:
    data = household[2].save()
    again = Roster.load(data)
    assert again.save() == data
    assert again.members() == household[2].members()
    for damaged in (
        b"",
        b"{}",
        data[:-2],
        data.replace(b'"version":1', b'"version":2'),
        data.replace(b"BEGIN", b"BEGUN", 1),
    ):
        with pytest.raises(BadInputError, match="household's list"):
            Roster.load(damaged)


def test_removal_reaches_everyone_and_keeps_the_rest(household: list[Roster], identities: list[Identity]) -> None:
    """Device 1 introduced 2, and 2 introduced 3: both stay when 1 goes, as the remover vouches for them."""
    tombstone = household[0].remove(identities[0], identities[1].device)
    assert tombstone.removed
    change = household[3].merge(household[0].export())
    assert change == Change(removed=(identities[1].device,))
    gossip(household[0], household[2], household[3])
    rest = {identities[number].device for number in (0, 2, 3)}
    assert [set(household[number].members()) for number in (0, 2, 3)] == [rest] * 3
    assert not household[0].is_member(identities[1].device)
    with pytest.raises(NotFoundError):
        household[0].remove(identities[0], identities[1].device)


@pytest.mark.parametrize("counter", [1, 2, 3, 4, 5, 8, 100, MAX_COUNTER])
def test_a_removed_device_brings_nobody_in(household: list[Roster], identities: list[Identity], counter: int) -> None:
    """Neither itself nor a friend, whatever counter it writes: it could backdate."""
    thief, friend = identities[1], identities[4]
    household[0].remove(identities[0], thief.device)
    gossip(household[0], household[2], household[3])
    forged = [
        sign_entry(thief, thief.certificate_pem, "me", counter),
        sign_entry(thief, friend.certificate_pem, "friend", counter),
        sign_entry(friend, thief.certificate_pem, "me again", MAX_COUNTER),
        sign_entry(friend, friend.certificate_pem, "friend", MAX_COUNTER),
    ]
    for number in (0, 2, 3):
        before = set(household[number].members())
        change = household[number].merge(forged)
        assert not change
        assert change.refused
        assert set(household[number].members()) == before


def test_whom_a_removed_device_introduced_behind_the_removers_back_goes_too(
    household: list[Roster], identities: list[Identity]
) -> None:
    thief, friend, second = identities[1], identities[4], identities[5]
    first = sign_entry(thief, friend.certificate_pem, "friend", household[3].counter + 1)
    circle = [
        first,
        sign_entry(friend, second.certificate_pem, "second", first.counter + 1),
        sign_entry(second, friend.certificate_pem, "friend", first.counter + 2),
    ]
    household[3].merge(circle)
    assert household[3].is_member(second.device)
    household[0].remove(identities[0], thief.device)
    change = household[3].merge(household[0].export())
    assert set(change.removed) == {thief.device, friend.device, second.device}
    assert not household[0].merge(household[3].export())
    assert not household[3].merge(circle)


def test_a_removed_device_removes_nobody_afterwards(household: list[Roster], identities: list[Identity]) -> None:
    tombstone = household[0].remove(identities[0], identities[1].device)
    late = sign_entry(identities[1], identities[0].certificate_pem, "x", tombstone.counter + 1, removed=True)
    assert not household[0].merge((late,))
    household[2].merge(household[0].export())
    assert not household[2].merge((late,))


@pytest.mark.parametrize("left", [True, False])
def test_who_left_or_was_removed_can_pair_with_strangers(
    household: list[Roster], identities: list[Identity], left: bool
) -> None:
    """Nobody there is known here: they count because this device says so itself, after its own end."""
    roster, gone, stranger = household[1], identities[1], 4
    if left:
        roster.remove(gone, gone.device)
    else:
        household[0].remove(identities[0], gone.device)
        roster.merge(household[0].export())
    assert not roster.members()
    pair(household[stranger], identities[stranger], roster, gone)
    assert {gone.device, identities[stranger].device} <= roster.members().keys()


def test_whom_a_device_brought_in_before_it_was_removed_does_not_count_unless_it_came_back_since(
    household: list[Roster], identities: list[Identity]
) -> None:
    roster, back, friend = household[0], identities[1], identities[4]
    tombstone = roster.remove(identities[0], back.device)
    introduction = sign_entry(back, friend.certificate_pem, "friend", tombstone.counter + 2)
    roster.merge((sign_entry(identities[2], back.certificate_pem, "back", tombstone.counter),))
    assert not roster.merge((introduction,)), "an introduction as high as the removal brings nobody back"
    roster.merge((sign_entry(identities[2], back.certificate_pem, "back", tombstone.counter + 1),))
    assert roster.merge((introduction,)).added == (friend.device,)


def test_a_stranger_says_nothing(household: list[Roster], identities: list[Identity]) -> None:
    stranger = identities[4]
    for entry in (
        sign_entry(stranger, stranger.certificate_pem, "me", 99),
        sign_entry(stranger, identities[0].certificate_pem, "you", 99, removed=True),
        sign_entry(stranger, identities[5].certificate_pem, "friend", 99),
    ):
        change = household[0].merge((entry,))
        assert not change
        assert len(change.refused) == 1


@pytest.mark.parametrize(
    "change",
    [
        {"name": "another name"},
        {"counter": 50},
        {"counter": 0},
        {"counter": MAX_COUNTER + 1},
        {"removed": True},
        {"signature": "00" * 64},
        {"signature": "zz" * 64},
        {"signature": ""},
        {"name": ""},
        {"name": "x" * 65},
        {"name": "two\nlines"},
        {"certificate_pem": "garbage"},
        {"device": "0" * 64},
        {"introducer": "0" * 64},
        {"introducer": "é"},
    ],
)
def test_a_changed_entry_is_left_out(
    household: list[Roster], identities: list[Identity], change: dict[str, object]
) -> None:
    honest = household[0].introduce(identities[0], identities[4].certificate_pem, "new")
    forged = replace(honest, **change)  # type: ignore[arg-type]
    outcome = household[1].merge((forged,))
    assert not outcome
    assert len(outcome.refused) == 1
    assert household[1].merge((honest,)).added == (identities[4].device,)


def test_leaving(household: list[Roster], identities: list[Identity]) -> None:
    """Whom the leaver introduced before stays."""
    tombstone = household[1].remove(identities[1], identities[1].device)
    assert not household[1].is_member(identities[1].device)
    with pytest.raises(AuthenticationError, match="no longer belongs"):
        household[1].merge([household[1].introduce(identities[1], identities[4].certificate_pem, "late")])
    household[0].merge(household[1].export())
    gossip(household[0], household[2], household[3])
    rest = {identities[number].device for number in (0, 2, 3)}
    assert [set(household[number].members()) for number in (0, 2, 3)] == [rest] * 3
    late = sign_entry(identities[1], identities[4].certificate_pem, "late", household[0].counter + 1)
    assert not household[0].merge((late,))
    last = sign_entry(identities[1], identities[4].certificate_pem, "last", tombstone.counter)
    assert household[0].merge((last,)).added == (identities[4].device,)


def test_coming_back_takes_a_new_pairing(household: list[Roster], identities: list[Identity]) -> None:
    household[0].remove(identities[0], identities[3].device)
    gossip(household[0], household[1], household[2])
    back = Roster.create(identities[3], "back")
    pair(household[2], identities[2], back, identities[3])
    gossip(household[0], household[1], household[2], back)
    everyone = {identity.device for identity in identities[:4]}
    assert [set(roster.members()) for roster in (household[0], household[1], household[2], back)] == [everyone] * 4
    pair(back, identities[3], household[4], identities[4])
    gossip(household[0], household[1], household[2], back, household[4])
    assert household[0].is_member(identities[4].device)


def test_a_newcomer_learns_of_removals(household: list[Roster], identities: list[Identity]) -> None:
    """Even of one by a device that is itself gone; old entries cannot be replayed to it."""
    old = household[3].export()
    household[1].remove(identities[1], identities[3].device)
    gossip(household[0], household[1], household[2])
    household[0].remove(identities[0], identities[1].device)
    pair(household[0], identities[0], household[4], identities[4])
    household[4].merge(household[0].export())
    household[4].merge(old)
    assert set(household[4].members()) == {identities[number].device for number in (0, 2, 4)}


def test_removals_of_each_other(household: list[Roster], identities: list[Identity]) -> None:
    """Signed at once, both count; else the first. Every order of hearing of them ends alike."""
    household[0].remove(identities[0], identities[1].device)
    household[1].remove(identities[1], identities[0].device)
    both = (*household[0].export(), *household[1].export())
    household[2].merge(both)
    household[3].merge(reversed(both))
    rest = {identities[2].device, identities[3].device}
    assert set(household[2].members()) == set(household[3].members()) == rest


def test_a_member_cannot_make_itself_irremovable(household: list[Roster], identities: list[Identity]) -> None:
    owner, rogue = household[0], identities[3]
    last = sign_entry(rogue, identities[4].certificate_pem, "mine", MAX_COUNTER)
    assert last.counter < MAX_COUNTER
    assert owner.merge((last, replace(last, counter=MAX_COUNTER))).added == (identities[4].device,)
    owner.remove(identities[0], rogue.device)
    owner.remove(identities[0], identities[4].device)
    household[1].merge(owner.export())
    for roster in household[:2]:
        assert not roster.is_member(rogue.device) and not roster.is_member(identities[4].device)
        assert not roster.merge((last,))
    owner.merge([owner.introduce(identities[0], identities[5].certificate_pem, "new")])  # and the household goes on
    household[1].merge(owner.export())
    assert household[1].is_member(identities[5].device)


def test_a_false_signature_is_looked_at_once(
    household: list[Roster], identities: list[Identity], monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[RosterEntry] = []

    def look(entry: RosterEntry, introducer_pem: str) -> None:
        looked.append(entry)
        check_signature(entry, introducer_pem)

    monkeypatch.setattr(roster_module, "check_signature", look)
    chain = [
        sign_entry(identities[4], identities[5].certificate_pem, "5", 100),
        sign_entry(identities[3], identities[4].certificate_pem, "4", 101),  # known only after the first was tried
    ]
    forged = [replace(chain[1], counter=200 + number) for number in range(20)]
    change = household[0].merge((*chain, *forged))
    assert set(change.added) == {identities[4].device, identities[5].device}
    assert len(looked) == len(set(looked)) == len(chain) + len(forged)


def test_bounds(household: list[Roster], identities: list[Identity], monkeypatch: pytest.MonkeyPatch) -> None:
    entry = household[0].introduce(identities[0], identities[4].certificate_pem, "new")
    monkeypatch.setattr(roster_module, "MAX_MEMBERS", 4)
    with pytest.raises(OverloadedError, match="4 devices"):
        household[0].merge([household[0].introduce(identities[0], identities[4].certificate_pem, "one too many")])
    assert "full" in household[0].merge((entry,)).refused[0]
    with pytest.raises(BadInputError, match="at most"):
        household[0].merge(replace(entry, counter=number) for number in range(1, MAX_ENTRIES + 2))
    monkeypatch.setattr(roster_module, "MAX_TOMBSTONES", 1)
    for number in (2, 3):
        household[0].remove(identities[0], identities[number].device)
    assert len([e for e in household[0].export() if e.removed]) == 1
    with pytest.raises(BadInputError):
        household[0].introduce(identities[0], identities[4].certificate_pem, "\n\t ")
    with pytest.raises(ValueError, match="own device"):
        household[0].merge([household[0].introduce(identities[1], identities[4].certificate_pem, "x")])


@st.composite
def histories(draw: st.DrawFn) -> list[tuple[str, int, int]]:
    """Pairings, removals, departures and meetings of five devices, whoever happens to know of what."""
    steps = st.tuples(
        st.sampled_from(["pair", "remove", "meet", "meet", "leave"]), st.integers(0, 4), st.integers(0, 4)
    )
    return draw(st.lists(steps.filter(lambda step: step[1] != step[2]), max_size=14))


def live(identities: list[Identity], history: list[tuple[str, int, int]]) -> list[Roster]:
    """Five devices paired in a chain, then the history, each step by a device that knows what it happens to know.

    Not covered: one part of a household taking back in whom another part is putting out at the same time. There the two
    may go on disagreeing until the device is paired, or removed, once more.
    """
    rosters = [Roster.create(identities[number], f"device {number}") for number in range(5)]
    put_out: set[int] = set()
    for before, after in pairwise(range(5)):
        pair(rosters[before], identities[before], rosters[after], identities[after])
    for what, one, other in history:
        a, b = rosters[one], rosters[other]
        if not a.is_member(a.device):
            continue
        match what:
            case "remove" if a.is_member(b.device):
                a.remove(identities[one], b.device)
                put_out.add(other)
            case "leave" if one == 4:
                a.remove(identities[one], a.device)
                put_out.add(one)
            case "pair" if b.is_member(b.device) and not {one, other} & put_out:
                pair(a, identities[one], b, identities[other])
            case "meet" if a.is_member(b.device) and b.is_member(a.device):
                a.merge(b.export())
                b.merge(a.export())
    return rosters


HISTORY_SETTINGS = settings(
    max_examples=HISTORIES,
    database=None,
    derandomize="PEERLLM_ROSTER_HISTORIES" not in os.environ,
    suppress_health_check=list(HealthCheck),
)
IDENTITIES: list[Identity] = []  # beside hypothesis, which would print them


@pytest.fixture(scope="module")
def five(identities: list[Identity]) -> list[Identity]:
    IDENTITIES[:] = identities
    return identities


Said = list[tuple[RosterEntry, ...]]


def live_in_touch(identities: list[Identity], history: list[tuple[str, int, int]]) -> tuple[list[Roster], Said]:
    """As `live`, but everybody hears of each step before the next, and device 0 stays; with all that was ever told."""
    rosters = live(identities, [])
    said: Said = [roster.export() for roster in rosters]
    gossip(*rosters)
    for what, one, other in history:
        a, b = rosters[one], rosters[other]
        if not a.is_member(a.device):
            continue
        match what:
            case "remove" if other != 0 and a.is_member(b.device):
                a.remove(identities[one], b.device)
            case "leave" if one != 0:
                a.remove(identities[one], a.device)
            case "pair" if not b.is_member(b.device):
                rosters[other] = Roster.create(identities[other], "back")
                pair(a, identities[one], rosters[other], identities[other])
        for roster in rosters:
            if roster is not a and roster.is_member(a.device):
                roster.merge(a.export())
        said += [roster.export() for roster in rosters]
        gossip(*rosters)
    said += [roster.export() for roster in rosters]
    return rosters, list(dict.fromkeys(said))


@pytest.mark.usefixtures("five")
@HISTORY_SETTINGS
@given(histories(), st.integers(0, 1 << 30))
def test_any_order_of_gossip_converges(history: list[tuple[str, int, int]], seed: int) -> None:
    """Two who missed it all hear everything ever told, old and new, each in another order, until nothing is new."""
    rosters, said = live_in_touch(IDENTITIES, history)
    random = Random(seed)
    for _ in range(2):
        listener = live(IDENTITIES, [])[0]
        while True:
            random.shuffle(said)
            before = listener.export()
            for told in said:
                listener.merge(told)
            if listener.export() == before:
                break
        assert set(listener.members()) == set(rosters[0].members())


@pytest.mark.usefixtures("five")
@HISTORY_SETTINGS
@given(histories())
def test_devices_that_still_meet_end_with_one_list(history: list[tuple[str, int, int]]) -> None:
    """Steps taken at once, by devices that know only part of what happened."""
    rosters = live(IDENTITIES, history)
    gossip(*rosters)
    for one in rosters:
        for other in rosters:
            if one.is_member(other.device) and other.is_member(one.device):
                assert set(one.members()) == set(other.members())


def test_entries_are_signed_over_every_field(alice: Identity, bob: Identity) -> None:
    entry = sign_entry(alice, bob.certificate_pem, "bob", 3)
    fields = [entry, replace(entry, name="Bob"), replace(entry, counter=4), replace(entry, removed=True)]
    fields += [replace(entry, device=alice.device), replace(entry, introducer=bob.device)]
    assert len({field.signed_bytes() for field in fields}) == len(fields)
    assert isinstance(entry, RosterEntry)
