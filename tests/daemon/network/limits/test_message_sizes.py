"""Sizes of control messages by class, read off the first bytes; every class that the channel carries is written so."""

from __future__ import annotations

from typing import get_args

import pytest

from peerllm.codec import MAX_MESSAGE_BYTES, encode
from peerllm.daemon.control_messages import (
    Ask,
    Assign,
    Control,
    DeviceView,
    Goodbye,
    Gossip,
    Heartbeat,
    Holding,
    LinkSeen,
    LinkTable,
    Place,
    Profile,
    Question,
    Release,
    Reserve,
    Whereabouts,
)
from peerllm.daemon.network.limits import message_sizes
from peerllm.daemon.network.limits.message_sizes import (
    MAX_BYTES,
    MOST_OPENING_BYTES,
    SMALL_BYTES,
    check_class,
    check_size,
    class_of,
)
from peerllm.errors import LinkError
from peerllm.transport.identity import load_or_create
from peerllm.transport.roster.entry import RosterEntry
from peerllm.transport.roster.roster import MAX_ENTRIES, MAX_MEMBERS


def opening(message: Control) -> bytes:
    return encode(message, Control)[:MOST_OPENING_BYTES]


def test_the_class_stands_first_of_an_ask_its_bodys() -> None:
    assert class_of(opening(Heartbeat(1))) == "Heartbeat"
    assert class_of(opening(Ask(2**63, Release("d", 1)))) == "Release"
    assert class_of(opening(Ask(-5, Profile("{}", "float32", ("block",), True)))) == "Profile"
    assert set(MAX_BYTES) <= {kind.__name__ for kind in (*get_args(Control), *get_args(Question))}, "no other is named"


@pytest.mark.parametrize(
    "begin",
    [
        b"",
        b"{",
        b'{"n":1,"type":"Goodbye"}',
        b'{ "type":"Answer"',
        b'{"type":"' + b"A" * 41,
        b'[{"type":"Answer"',
    ],
)
def test_what_begins_in_another_way_is_refused(begin: bytes) -> None:
    with pytest.raises(LinkError, match="class does not come first"):
        check_size(begin, 1)


@pytest.mark.parametrize(
    ("message", "most"),
    [
        (Goodbye("x"), SMALL_BYTES),
        (Ask(1, Reserve("d", 1, 1, 1.0)), SMALL_BYTES),
        (DeviceView(1, 2, "", ()), 512 << 10),
        (Ask(1, Profile("", "", (), False)), MAX_MESSAGE_BYTES),
    ],
)
def test_each_class_has_its_bound(message: Control, most: int) -> None:
    check_size(opening(message), most)
    with pytest.raises(LinkError, match=f"the limit is {most}"):
        check_size(opening(message), most + 1)


def test_a_view_cannot_come_as_an_answer() -> None:
    check_class(b'{"type":"DeviceView"', DeviceView(1, 2, "", ()))
    with pytest.raises(LinkError, match="begins as a Answer"):
        check_class(b'{"type":"Answer"', DeviceView(1, 2, "", ()))


def test_the_largest_household_fits(tmp_path: object) -> None:
    device = "f" * 64
    host = "2001:0db8:1234:5678:9abc:def0:1234:5678"
    places = Whereabouts(tuple(Place(device, (host,) * 4, 65535) for _ in range(MAX_MEMBERS)))
    seen = LinkSeen(device, 1234.5678901, 12345.678901, 1234.5, True, 123.45678901, 12345.67890, 1234.5, True)
    pem = load_or_create(tmp_path).certificate_pem  # type: ignore[arg-type]
    entry = RosterEntry(device, "n" * 64, pem, device, 2**53 - 1, False, "a" * 128)
    holdings = tuple(Holding("d" * 32, 2**31, 1000, 1000) for _ in range(512))
    for message in (
        places,
        LinkTable((seen,) * MAX_MEMBERS, 123.4567890),
        Gossip((entry,) * MAX_ENTRIES),
        DeviceView(2**40, 2**40, "running", (), holdings=holdings),
    ):
        data = encode(message, Control)
        check_size(data[:MOST_OPENING_BYTES], len(data))


def test_only_what_names_every_tensor_or_was_recorded_may_be_as_large_as_a_message() -> None:
    largest = {name for name, most in message_sizes.MAX_BYTES.items() if most == MAX_MESSAGE_BYTES}
    assert largest == {Assign.__name__, Profile.__name__, "Answer"}
