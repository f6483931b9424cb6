"""Pairing over real sockets: the right code, wrong ones, late ones, and everybody who tries without."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

import pytest

from peerllm.errors import AuthenticationError, PairingError
from peerllm.transport.identity import Identity
from peerllm.transport.pairing import door as door_module
from peerllm.transport.pairing.code import door_name, make_code, normalise
from peerllm.transport.pairing.door import PairingDoor
from peerllm.transport.pairing.join import join
from peerllm.transport.pairing.pairing_messages import (
    LENGTH,
    PAIRING_VERSION,
    Challenge,
    Confirm,
    JoinRequest,
    PairingChannel,
    PairingDone,
    Possession,
)
from peerllm.transport.pairing.pake import Pake
from peerllm.transport.roster.roster import Roster
from peerllm.transport.tls.contexts import door_context, knock_context

WAIT_S = 10.0


@dataclass
class House:
    identity: Identity
    roster: Roster
    door: PairingDoor
    paired: list[int] = field(default_factory=list)  # members at each success
    closed: asyncio.Queue[str] = field(default_factory=asyncio.Queue)
    code: str = ""

    async def join(self, who: Identity, code: str = "", port: int = 0) -> Roster:
        roster = Roster.create(who, "newcomer")
        result = await join(
            who, "newcomer", code or self.code, "127.0.0.1", port or self.door.port, counter=roster.counter
        )
        assert result.device == self.identity.device
        roster.merge(result.entries)
        return roster

    async def why_closed(self) -> str:
        return await asyncio.wait_for(self.closed.get(), WAIT_S)


@pytest.fixture
async def house(alice: Identity) -> AsyncIterator[House]:
    roster = Roster.create(alice, "alice")
    paired: list[int] = []
    closed: asyncio.Queue[str] = asyncio.Queue()
    door = PairingDoor(
        alice,
        lambda: roster,
        "alice",
        ["127.0.0.1"],
        0,
        lambda: paired.append(len(roster.members())),
        closed.put_nowait,
    )
    house = House(alice, roster, door, paired, closed)
    house.code = await door.open()
    yield house
    await door.close()
    await door.close()


def wrong(code: str) -> str:
    return code[:-1] + ("0" if code[-1] != "0" else "1")


async def test_the_right_code_pairs_both_sides(house: House, bob: Identity) -> None:
    assert house.door.door == house.code[:2] == door_name(house.code)
    theirs = await house.join(bob, f" {house.code.lower().replace('-', ' ')} ")
    assert await house.why_closed() == "paired"
    assert house.paired == [2]
    assert house.roster.members()[bob.device].name == "newcomer"
    both = {house.identity.device, bob.device}
    assert set(theirs.members()) == set(house.roster.members()) == both
    assert theirs.members()[house.identity.device].name == "alice"
    assert not house.door.is_open
    with pytest.raises(PairingError, match="no pairing window is open"):
        await house.join(bob)


async def test_a_newcomer_adopts_the_whole_household(house: House, bob: Identity, carol: Identity) -> None:
    of_bob = await house.join(bob)
    house.code = await house.door.open()
    of_carol = await house.join(carol)
    everyone = {house.identity.device, bob.device, carol.device}
    assert set(of_carol.members()) == everyone
    of_bob.merge(house.roster.export())
    assert set(of_bob.members()) == everyone


async def test_three_wrong_codes_close_the_door(house: House, bob: Identity) -> None:
    bad = wrong(house.code)
    for line in (
        "the code is wrong; 2 tries left",
        "the code is wrong; 1 try left",
        "the code was wrong 3 times; run peerllm invite again",
    ):
        with pytest.raises(PairingError) as refusal:
            await house.join(bob, bad)
        assert str(refusal.value) == line
    assert await house.why_closed() == "the code was wrong 3 times; run peerllm invite again"
    with pytest.raises(PairingError, match="no pairing window is open"):
        await house.join(bob)
    assert set(house.roster.members()) == {house.identity.device}


async def test_the_right_code_after_a_wrong_one(house: House, bob: Identity) -> None:
    with pytest.raises(PairingError, match="2 tries left"):
        await house.join(bob, wrong(house.code))
    await house.join(bob)


async def test_the_window_closes_by_itself(house: House, bob: Identity, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(door_module, "PAIRING_WINDOW_S", 0.05)
    await house.door.open()
    assert "withdrawn" in await house.why_closed()
    assert await house.why_closed() == "the pairing window is closed; run peerllm invite again"
    with pytest.raises(PairingError, match="no pairing window is open"):
        await house.join(bob)


async def test_a_window_that_closes_during_an_attempt(house: House, bob: Identity) -> None:
    _, writer, channel = await _knock(house)
    pake, hello, challenge, challenge_bytes = await _greet(house, channel, bob, house.code)
    house.door._shut(door_module.CLOSED)
    await channel.send(Confirm(pake.finish(challenge.share, hello, challenge_bytes).joiner_proof))
    with pytest.raises(PairingError, match="window is closed"):
        await channel.receive(Confirm)
    writer.close()


async def test_hanging_up_after_learning_spends_a_try(house: House, bob: Identity) -> None:
    for _ in range(3):
        _, writer, channel = await _knock(house)
        pake, hello, challenge, challenge_bytes = await _greet(house, channel, bob, house.code)
        await channel.send(Confirm(pake.finish(challenge.share, hello, challenge_bytes).joiner_proof))
        await channel.receive(Confirm)
        writer.close()
    assert await house.why_closed() == "3 tries are spent; run peerllm invite again"
    assert set(house.roster.members()) == {house.identity.device}


async def test_hanging_up_before_spends_none(house: House, bob: Identity) -> None:
    for _ in range(5):
        _, writer, channel = await _knock(house)
        await _greet(house, channel, bob, house.code)
        writer.close()
    await house.join(bob)


async def test_a_stolen_code_does_not_pass_for_another_device(house: House, bob: Identity, carol: Identity) -> None:
    """Who knows the code but not the key of the certificate it shows gets nothing of the household."""
    _, writer, channel = await _knock(house)
    pake, hello, challenge, challenge_bytes = await _greet(house, channel, bob, house.code)
    keys = pake.finish(challenge.share, hello, challenge_bytes)
    await channel.send(Confirm(keys.joiner_proof))
    await channel.receive(Confirm)
    channel.authenticate(keys.joiner_mac, keys.inviter_mac)
    await channel.send(Possession(carol.sign(b"joiner" + keys.transcript)))
    with pytest.raises(PairingError):
        await channel.receive(PairingDone)
    writer.close()
    assert not house.paired


async def test_a_man_in_the_middle_gets_nothing(house: House, bob: Identity, carol: Identity) -> None:
    """He shows his own certificate to the joiner and passes every byte on: the codes match, the certificates do not."""

    async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        onward_reader, onward_writer = await asyncio.open_connection(
            "127.0.0.1", house.door.port, ssl=knock_context(), server_hostname="x"
        )

        async def pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
            while data := await source.read(4096):
                sink.write(data)
                await sink.drain()
            sink.close()

        await asyncio.gather(pump(reader, onward_writer), pump(onward_reader, writer), return_exceptions=True)

    async with await asyncio.start_server(relay, "127.0.0.1", 0, ssl=door_context(carol)) as between:
        port = between.sockets[0].getsockname()[1]
        with pytest.raises(PairingError, match="the code is wrong; 2 tries left"):
            await house.join(bob, port=port)
    assert not house.paired
    await house.join(bob)


async def test_a_false_door_learns_nothing_and_is_named(bob: Identity, carol: Identity) -> None:
    """A door that does not know the code cannot answer the joiner's proof."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        channel = PairingChannel(reader, writer)
        await channel.receive(JoinRequest)
        pake = Pake("00-000000", carol.device, bob.device, True)
        await channel.send(Challenge(PAIRING_VERSION, pake.share))
        await channel.receive(Confirm)
        await channel.send(Confirm("00" * 32))
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0, ssl=door_context(carol)) as false_door:
        port = false_door.sockets[0].getsockname()[1]
        with pytest.raises(PairingError, match="somebody may be in between"):
            await join(bob, "bob", make_code(), "127.0.0.1", port)


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"GET / HTTP/1.1\r\n\r\n",
        LENGTH.pack(1 << 30),
        LENGTH.pack(5) + b"{nope",
        LENGTH.pack(2) + b"{}",
        LENGTH.pack(20) + b'{"type":"PairingDone","x":1',
        LENGTH.pack(33) + b'{"type":"PairingDone","device":"abcdefg"}'[:33],
    ],
)
async def test_garbage_is_refused_and_the_door_stays_open(house: House, bob: Identity, raw: bytes) -> None:
    reader, writer, _ = await _knock(house)
    writer.write(raw)
    if raw:
        writer.write(b"\0" * 64)
    else:
        writer.close()
    assert len(await asyncio.wait_for(reader.read(), WAIT_S)) < 500
    writer.close()
    await house.join(bob)


@pytest.mark.parametrize(
    "share", ["", "zz", "41" + "ff" * 32, "42" + "ff" * 32, "42" + "00" * 32, "42" + "01" + "00" * 31, "42" * 34]
)
async def test_impossible_shares(house: House, bob: Identity, share: str) -> None:
    _, writer, channel = await _knock(house)
    await channel.send(JoinRequest(PAIRING_VERSION, bob.certificate_pem, "bob", share, 1))
    # The challenge goes out before the share is looked at: the refusal stands where the proof would.
    await channel.receive(Challenge)
    with pytest.raises(PairingError, match="impossible"):
        await channel.receive(Confirm)
    writer.close()
    assert not house.paired


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"version": 1}, "update both devices"),
        ({"certificate_pem": "x"}, "damaged"),
        ({"name": "\n"}, "cannot be a device's name"),
        ({"counter": -1}, "damaged"),
        ({"counter": 2**53}, "damaged"),
    ],
)
async def test_hellos_that_cannot_be(house: House, bob: Identity, change: dict[str, object], line: str) -> None:
    _, writer, channel = await _knock(house)
    good: dict[str, object] = {
        "version": PAIRING_VERSION,
        "certificate_pem": bob.certificate_pem,
        "name": "bob",
        "share": "42" * 33,
        "counter": 1,
    }
    await channel.send(JoinRequest(**(good | change)))  # type: ignore[arg-type]
    with pytest.raises(PairingError, match=line):
        await channel.receive(Challenge)
    writer.close()


async def test_a_tampered_message_after_the_proof(house: House, bob: Identity) -> None:
    """Also a replayed one: the number of each message is in its MAC."""
    _, writer, channel = await _knock(house)
    pake, hello, challenge, challenge_bytes = await _greet(house, channel, bob, house.code)
    keys = pake.finish(challenge.share, hello, challenge_bytes)
    await channel.send(Confirm(keys.joiner_proof))
    await channel.receive(Confirm)
    channel.authenticate(keys.joiner_mac, keys.inviter_mac)
    channel._sent = 1
    await channel.send(Possession(bob.sign(b"joiner" + keys.transcript)))
    with pytest.raises(PairingError, match="tampered"):
        await channel.receive(PairingDone)
    writer.close()


async def test_a_stalling_peer_does_not_hold_the_door_shut(
    house: House, bob: Identity, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(door_module, "ATTEMPT_TIMEOUT_S", 0.3)
    stalling = await _knock(house)
    await house.join(bob)
    with pytest.raises(PairingError, match="took longer"):
        await stalling[2].receive(Challenge)
    stalling[1].close()


async def test_who_knocks_and_says_nothing_makes_way(house: House, bob: Identity) -> None:
    silent = [await asyncio.open_connection("127.0.0.1", house.door.port) for _ in range(10)]
    secured = [await _knock(house) for _ in range(3 * door_module.MAX_WAITING)]
    assert len(house.door._waiting) <= door_module.MAX_WAITING
    for reader, _ in silent:
        with contextlib.suppress(ConnectionError):
            assert await asyncio.wait_for(reader.read(), door_module.ATTEMPT_TIMEOUT_S / 2) == b"", "the first make way"
    await house.join(bob)
    for writer in (writer for _, writer, *_ in (*silent, *secured)):
        writer.close()


async def test_who_is_being_served_does_not_make_way(house: House, bob: Identity) -> None:
    _, writer, channel = await _knock(house)
    await _greet(house, channel, bob, house.code)
    flood = [await _knock(house) for _ in range(3 * door_module.MAX_WAITING)]
    await channel.send(Confirm("00" * 32))
    with pytest.raises(PairingError, match="the code is wrong"):
        await channel.receive(Confirm)
    for one in (writer, *(writer for _, writer, _ in flood)):
        one.close()


async def test_one_address_has_one_place_in_the_line(house: House, bob: Identity, alice: Identity) -> None:
    for _ in range(3):  # they greet in due form, and then leave the door waiting
        await _greet(house, (await _knock(house))[2], bob, house.code)
    lines = house.door._lines
    assert list(lines) == ["127.0.0.1"] and lines["127.0.0.1"].locked()
    waiting = house.door._turn._waiters
    assert not waiting, "of this address none but the one being served has come to the turn"


async def test_attempts_at_once_count_one_by_one(house: House, bob: Identity) -> None:
    bad = wrong(house.code)
    outcomes = await asyncio.gather(*(house.join(bob, bad) for _ in range(6)), return_exceptions=True)
    assert all(isinstance(outcome, PairingError) for outcome in outcomes)
    lines = sorted(str(outcome) for outcome in outcomes)
    assert lines.count("the code is wrong; 2 tries left") == 1
    assert lines.count("the code is wrong; 1 try left") == 1
    assert not house.door.is_open


async def test_a_device_is_not_paired_with_itself(house: House, alice: Identity) -> None:
    with pytest.raises(PairingError, match="with itself"):
        await house.join(alice)


async def test_withdrawing_cuts_an_attempt(house: House, bob: Identity) -> None:
    reader, writer, channel = await _knock(house)
    await _greet(house, channel, bob, house.code)
    await house.door.close()
    assert "withdrawn" in await house.why_closed()
    assert await asyncio.wait_for(reader.read(), WAIT_S) == b""
    writer.close()


async def test_a_peer_that_is_no_door(bob: Identity) -> None:
    async def mute(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    async with await asyncio.start_server(mute, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        with pytest.raises(PairingError, match=r"did not answer within 0\.1 s"):
            await join(bob, "bob", make_code(), "127.0.0.1", port, timeout_s=0.1)


def test_codes() -> None:
    codes = {make_code() for _ in range(200)}
    assert len(codes) == 200
    for code in codes:
        assert len(code) == 9
        assert normalise(code) == code
    assert normalise("ol-i4pq9u") == "01-14PQ9V"
    assert normalise(" k7 4pq9mx ") == "K7-4PQ9MX"
    assert door_name("k74pq9mx") == "K7"
    for bad in ("", "K7", "K7-4PQ9M", "K7-4PQ9MXX", "K7-4PQ9M!", "x" * 1000):
        with pytest.raises(PairingError, match="looks like K7-4PQ9MX"):
            normalise(bad)
    assert issubclass(PairingError, AuthenticationError)


Knock = tuple[asyncio.StreamReader, asyncio.StreamWriter, PairingChannel]


async def _knock(house: House, context: Callable[[], ssl.SSLContext] = knock_context) -> Knock:
    reader, writer = await asyncio.open_connection("127.0.0.1", house.door.port, ssl=context(), server_hostname="x")
    return reader, writer, PairingChannel(reader, writer)


async def _greet(
    house: House, channel: PairingChannel, who: Identity, code: str
) -> tuple[Pake, bytes, Challenge, bytes]:
    pake = Pake(code, house.identity.device, who.device, False)
    hello = await channel.send(JoinRequest(PAIRING_VERSION, who.certificate_pem, "raw", pake.share, 1))
    challenge, challenge_bytes = await channel.receive(Challenge)
    return pake, hello, challenge, challenge_bytes
