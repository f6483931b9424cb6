"""Real Networks on loopback: pairing, gossip, removal, restarts, questions, freezing."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import ifaddr
import pytest

from peerllm.daemon.control_messages import Answer, DeviceView, Goodbye, Holding, Question, Release, Trouble
from peerllm.daemon.decide import membership_events as m
from peerllm.daemon.discovery.interfaces import interfaces
from peerllm.daemon.network import Network
from peerllm.daemon.network.control_links import host_of
from peerllm.daemon.network.heartbeats.heartbeat_thread import HeartbeatThread
from peerllm.daemon.settings import Settings
from peerllm.errors import BadInputError, LinkError, NotFoundError, PairingError, PeerLLMError, RefusedError
from peerllm.transport.identity import load_or_create
from tests.daemon.networks import WAIT_S, Device, devices, pair

ROOT = Path(__file__).parents[3]
VIEW = DeviceView(1, 2, "running", ())


async def test_pairing_makes_a_link_with_all_that_is_known(tmp_path: Path) -> None:
    async with devices(tmp_path, "anna", "bert") as (anna, bert):
        rosters: list[int] = []
        anna.network.on_roster(lambda entries: rosters.append(len(entries)))
        await pair(anna, bert)
        peer = anna.network.peers()[bert.id]
        assert (peer.name, peer.state, peer.problem) == ("bert", "online", "")
        assert peer.hosts[0] == "127.0.0.1" and peer.control_port == bert.network.port and peer.data_port == 4711
        assert peer.hello is not None and peer.hello.gflops == {"float32": 85.0}
        await anna.until(lambda: (anna.network.peers()[bert.id].rtt_ms or 0) > 0)
        await anna.until(lambda: (anna.network.peers()[bert.id].mbps or 0) > 1)
        assert rosters == [2]


def link_local() -> str:
    """An IPv6 address of this machine that is valid on one interface only, with that one; "" if there is none."""
    for adapter in ifaddr.get_adapters():
        for ip in adapter.ips:
            if isinstance(ip.ip, tuple) and ip.ip[0].startswith("fe80:") and ip.ip[2]:
                return f"{ip.ip[0].partition('%')[0]}%{ip.ip[2]}"
    return ""


@pytest.mark.skipif(not link_local(), reason="no interface here has a link-local IPv6 address")
async def test_who_comes_from_a_link_local_address_is_found_there_again(tmp_path: Path) -> None:
    anna, bert = (Device(tmp_path, name, everywhere=True) for name in ("anna", "bert"))
    try:
        for device in (anna, bert):
            await device.network.start()
        code, port = await anna.network.open_door()
        await bert.network.join(code, (link_local(), port))
        await anna.sees(bert)
        await bert.sees(anna)
        for here, there in ((anna, bert), (bert, anna)):
            assert here.network.peers()[there.id].hosts[0] == link_local()
            await here.until(lambda here=here, there=there: here.network.peers()[there.id].mbps)  # type: ignore[misc]
    finally:
        for device in (anna, bert):
            await device.network.close()


def test_the_scope_is_part_of_an_address_where_there_is_one() -> None:
    assert host_of(("fe80::1", 8643, 0, 4)) == "fe80::1%4" and host_of(("fd00::1", 8643, 0, 0)) == "fd00::1"
    assert host_of(("10.0.0.1", 8643)) == "10.0.0.1" and host_of(None) == ""


async def test_a_removal_reaches_the_engine_even_if_the_listener_fails_to_hear_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with devices(tmp_path, "anna", "bert") as (anna, bert):
        rosters: list[int] = []
        anna.network.on_roster(lambda entries: rosters.append(len(entries)))
        await pair(anna, bert)

        async def fail(pems: object) -> None:
            raise OSError("no file can be opened")

        monkeypatch.setattr(anna.network._server, "set_trusted", fail)
        with pytest.raises(OSError, match="no file"):
            await anna.network.remove(bert.id)
        assert rosters == [2, 1]


async def test_a_wrong_code_lets_nobody_in_and_three_shut_the_door(tmp_path: Path) -> None:
    async with devices(tmp_path, "anna", "bert") as (anna, bert):
        code, port = await anna.network.open_door()
        wrong = code[:-1] + ("X" if code[-1] != "X" else "Y")
        for _ in range(3):
            with pytest.raises(PairingError):
                await bert.network.join(wrong, ("127.0.0.1", port))
        with pytest.raises(PairingError):
            await bert.network.join(code, ("127.0.0.1", port))
        assert anna.network.peers() == {} == bert.network.peers()
        with pytest.raises(PairingError, match="not a pairing code"):
            await bert.network.join("hello", None)


async def test_without_mdns_joining_says_to_use_at(tmp_path: Path) -> None:
    async with devices(tmp_path, "anna") as (anna,):
        with pytest.raises(PairingError, match=r"mDNS is off.*--at HOST"):
            await anna.network.join("K7-4PQ9MX", None)


async def test_a_device_says_where_it_is_reached_without_mdns_too(tmp_path: Path) -> None:
    async with devices(tmp_path, "anna") as (anna,):
        assert anna.network.addresses == ("127.0.0.1",)
    settings = Settings(tmp_path / "bert", "bert", port=0, mdns=False)
    identity = load_or_create(settings.data_dir)
    assert Network(settings, identity, anna.hello).addresses == interfaces().addresses
    alone = Network(replace(settings, hosts=("127.0.0.1", "::1")), identity, anna.hello)
    assert alone.addresses == ("127.0.0.1", "::1")


async def test_gossip_makes_one_code_per_device_enough(tmp_path: Path) -> None:
    async with devices(tmp_path, "anna", "bert", "cleo") as (anna, bert, cleo):
        await pair(anna, bert)
        await pair(bert, cleo)
        await anna.sees(bert, cleo)
        await cleo.sees(anna, bert)


async def test_mdns_finds_the_door_and_then_the_devices(tmp_path: Path) -> None:
    async with devices(tmp_path, "anna", "bert", "cleo", mdns=True) as (anna, bert, cleo):
        await bert.until(lambda: {s.name for s in bert.network.sightings()} == {"anna", "cleo"})
        code, _ = await anna.network.open_door()
        assert await bert.network.join(code, None) == "anna"
        await bert.sees(anna)
        code, _ = await bert.network.open_door()
        assert await cleo.network.join(code, None) == "bert"
        await cleo.sees(anna, bert)
        await anna.sees(bert, cleo)
        assert anna.network.sightings() == ()


async def test_a_door_that_is_not_there_is_named_with_what_was_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("peerllm.daemon.network.pairing.door_finder.FIND_DOOR_S", 0.5)
    async with devices(tmp_path, "anna", "bert", mdns=True) as (_, bert):
        await bert.until(bert.network.sightings)
        with pytest.raises(PairingError, match=r"saw only .*\banna \(127.0.0.1\).*--at"):
            await bert.network.join("ZZ-4PQ9MX", None)


async def test_joining_twice_is_refused_until_one_leaves(tmp_path: Path) -> None:
    async with devices(tmp_path, "anna", "bert", "cleo") as (anna, bert, cleo):
        await pair(anna, bert)
        code, port = await cleo.network.open_door()
        with pytest.raises(PairingError, match="peerllm leave"):
            await bert.network.join(code, ("127.0.0.1", port))
        await bert.network.leave()
        assert bert.network.peers() == {}
        await anna.until(lambda: anna.network.peers() == {})
        assert await bert.network.join(code, ("127.0.0.1", port)) == "cleo"
        await bert.sees(cleo)
        await bert.network.leave()
        await pair(anna, bert)
        with pytest.raises(BadInputError):
            await cleo.network.leave()


async def test_removal_cuts_links_at_once_and_is_told(tmp_path: Path) -> None:
    async with devices(tmp_path, "anna", "bert") as (anna, bert):
        await pair(anna, bert)
        await anna.network.remove(bert.id)
        assert anna.network.peers() == {}
        await bert.until(lambda: bert.network.peers() == {})
        assert [device for device, _ in bert.vanished] == [anna.id]
        with pytest.raises(LinkError):
            await bert.network.ask(anna.id, Release("d", 1), 1)
        with pytest.raises(NotFoundError):
            await anna.network.remove(bert.id)
        await anna.until(lambda: anna.network._links._channels == {})
        await pair(bert, anna)


async def test_questions_answers_and_errors(tmp_path: Path) -> None:
    async with devices(tmp_path, "anna", "bert") as (anna, bert):
        await pair(anna, bert)
        with pytest.raises(PeerLLMError, match="no questions yet"):
            await anna.network.ask(bert.id, Release("d", 1), WAIT_S)

        async def answer(device: str, question: Question) -> Answer:
            assert device == anna.id and isinstance(question, Release)
            if question.epoch == 2:
                raise RefusedError("promised elsewhere")
            if question.epoch == 3:
                raise ZeroDivisionError("oops")
            if question.epoch == 4:
                await asyncio.Event().wait()
            if question.epoch == 5:
                return Answer(0, "NoSuchError", "strange", 7)
            return Answer(0, free_bytes=42)

        bert.network.answer_with(answer)
        assert (await anna.network.ask(bert.id, Release("d", 1), WAIT_S)).free_bytes == 42
        with pytest.raises(RefusedError, match="promised elsewhere"):
            await anna.network.ask(bert.id, Release("d", 2), WAIT_S)
        with pytest.raises(PeerLLMError, match="ZeroDivisionError: oops"):
            await anna.network.ask(bert.id, Release("d", 3), WAIT_S)
        with pytest.raises(LinkError, match="did not answer Release within"):
            await anna.network.ask(bert.id, Release("d", 4), 0.1)
        with pytest.raises(PeerLLMError, match="strange"):
            await anna.network.ask(bert.id, Release("d", 5), WAIT_S)
        waiting = asyncio.create_task(anna.network.ask(bert.id, Release("d", 4), WAIT_S))
        await asyncio.sleep(0)
        await bert.network.close()
        with pytest.raises(LinkError, match="went away"):
            await waiting
        with pytest.raises(LinkError, match="away"):
            await anna.network.ask(bert.id, Release("d", 1), WAIT_S)


async def test_told_messages_views_and_goodbye(tmp_path: Path) -> None:
    async with devices(tmp_path, "anna", "bert") as (anna, bert):
        anna.network.broadcast(VIEW)
        await pair(anna, bert)
        await bert.until(lambda: bert.network.peers()[anna.id].view == VIEW)

        def broken(device: str, message: object) -> None:
            raise ZeroDivisionError("a broken listener disturbs nobody")

        many = tuple(Holding("d" * 32, epoch, 1, 2) for epoch in range(4000))
        large = DeviceView(1, 2, "running", (), holdings=many)  # in parts, heartbeats in between
        bert.network.tell(anna.id, large)
        bert.network.tell(anna.id, Trouble("d", 1, "after"))
        await anna.until(lambda: (bert.id, Trouble("d", 1, "after")) in anna.told)
        views = [one for device, one in anna.told if device == bert.id and not isinstance(one, Goodbye)]
        assert views[-2:] == [large, Trouble("d", 1, "after")], "in order, though a thread has decoded the first"
        bert.network.listen(broken)
        await anna.network.close()
        await bert.until(lambda: bert.state(anna) == "left")
        assert (anna.id, Goodbye("going down")) in bert.told
        assert bert.vanished == [(anna.id, "going down")] and bert.network.peers()[anna.id].view is None
        bert.network.tell(anna.id, VIEW)  # forgotten, not raised


async def test_hello_again_is_an_update(tmp_path: Path) -> None:
    async with devices(tmp_path, "anna", "bert") as (anna, bert):
        await pair(anna, bert)
        anna.name = "anna the second"
        anna.network.set_hello_changed()
        await bert.until(lambda: bert.network.peers()[anna.id].name == "anna the second")


async def test_a_restarted_device_reconnects_by_itself(tmp_path: Path) -> None:
    async with devices(tmp_path, "anna", "bert") as (anna, bert):
        await pair(anna, bert)
        port = anna.network.port
        await anna.network.close()
        again = Device(tmp_path, "anna", port=port)
        assert again.id == anna.id
        try:
            await again.network.start()
            await again.sees(bert)  # it remembers where the other was
            await bert.sees(again)
        finally:
            await again.network.close()


async def test_static_peers_need_no_memory(tmp_path: Path) -> None:
    async with devices(tmp_path, "anna", "bert") as (anna, bert):
        await pair(anna, bert)
        await anna.network.close()
        (anna.directory / "peers.json").write_text("[broken")
        again = Device(tmp_path, "anna", peers=(("127.0.0.1", bert.network.port), ("127.0.0.1", 1)))
        try:
            await again.network.start()
            await again.sees(bert)
            await again.until(lambda: "--peer 127.0.0.1:1" in again.network.problem)
            assert f"{bert.network.port}" not in again.network.problem
        finally:
            await again.network.close()


async def test_another_protocol_is_named_but_not_used(tmp_path: Path) -> None:
    async with devices(tmp_path, "anna", "bert") as (anna, bert):
        await pair(anna, bert)
        port = anna.network.port
        await anna.network.close()
        again = Device(tmp_path, "anna", port=port, protocol=2)
        try:
            await again.network.start()
            await bert.until(lambda: "speaks protocol 2, this device 1" in bert.network.peers()[anna.id].problem)
            await again.until(lambda: "speaks protocol 1, this device 2" in again.network.peers()[bert.id].problem)
            assert bert.state(again) != "online" and again.state(bert) != "online"
        finally:
            await again.network.close()


async def test_a_damaged_roster_is_said_plainly(tmp_path: Path) -> None:
    (tmp_path / "anna").mkdir()
    (tmp_path / "anna" / "household.json").write_text("{}")
    with pytest.raises(BadInputError, match="damaged"):
        Device(tmp_path, "anna")


async def test_the_same_port_twice_is_said_plainly(tmp_path: Path) -> None:
    async with devices(tmp_path, "anna") as (anna,):
        other = Device(tmp_path, "bert", port=anna.network.port)
        with pytest.raises(BadInputError, match="in use"):
            await other.network.start()
        await other.network.close()


@pytest.mark.parametrize("datagrams", [True, False])
async def test_a_link_on_which_nothing_comes_is_made_anew_and_nobody_is_called_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, datagrams: bool
) -> None:
    if not datagrams:
        monkeypatch.setattr(HeartbeatThread, "start", lambda self, addresses: None)
    async with devices(tmp_path, "anna", "bert") as (anna, bert):
        await pair(anna, bert)
        both = ((anna, bert), (bert, anna))

        async def never(device: str, question: Question) -> Answer:
            await asyncio.Event().wait()
            raise AssertionError

        for here, there in both:
            here.network.answer_with(never)
            await here.until(lambda here=here, there=there: here.network.peers()[there.id].rtt_ms)  # type: ignore[misc]
        old = {here: here.network._links.channel(there.id) for here, there in both}
        asks = [asyncio.ensure_future(here.network.ask(there.id, Release("d", 1), WAIT_S)) for here, there in both]
        await asyncio.sleep(0)
        old[anna]._websocket._writer.transport.pause_reading()  # type: ignore[union-attr]
        await anna.until(lambda: anna.network._links.find(bert.id) is not old[anna])
        await bert.until(lambda: bert.network._links.find(anna.id) is not old[bert])
        for ask in asks:
            with pytest.raises(LinkError, match="made anew"):
                await ask
        states = ["online"] if datagrams else ["silent", "online"]
        assert [state for _, state, _ in anna.states] == ["online", *states]
        assert [renewed for *_, renewed in anna.states][1:] == [state == "online" for state in states]
        assert bert.states == [(anna.id, "online", True)] * 2
        assert not anna.vanished and not bert.vanished
        late = DeviceView(99, 2, "held up on the old link", ())
        anna.network._links._take(old[anna], late)
        assert anna.network.peers()[bert.id].view != late
        for here, there in both:
            large = Trouble("d", 1, "over the new link")
            here.network.tell(there.id, large)
            await there.until(lambda here=here, there=there, one=large: (here.id, one) in there.told)  # type: ignore[misc]


async def test_a_device_that_is_heard_again_is_told_what_it_missed(tmp_path: Path) -> None:
    async with devices(tmp_path, "anna", "bert") as (anna, bert):
        await pair(anna, bert)
        member = anna.network._links.membership._members[bert.id]
        member.state = "silent"
        anna.network.broadcast(VIEW)
        assert member.link is not None
        anna.network._links.feed(m.Heard(member.link))
        await bert.until(lambda: bert.network.peers()[anna.id].view == VIEW)


async def test_a_dial_that_was_not_needed_after_all_changes_nothing(tmp_path: Path) -> None:
    async with devices(tmp_path, "anna", "bert") as (anna, bert):
        await pair(anna, bert)
        links, before = anna.network._links, anna.network._links.channel(bert.id)
        await links._dial(m.Dial(bert.id, ("127.0.0.1",), bert.network.port))
        assert links.channel(bert.id) is before and list(links._channels.values()) == [before]
        assert (anna.states, bert.states) == ([(bert.id, "online", True)], [(anna.id, "online", True)])


@asynccontextmanager
async def program(directory: Path) -> AsyncIterator[asyncio.subprocess.Process]:
    """Another device as a program of its own; commands go to its stdin."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "tests.daemon.networks",
        str(directory),
        "bert",
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        cwd=ROOT,
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def joined(anna: Device, process: asyncio.subprocess.Process) -> str:
    """Have the program join anna's household; returns its id."""
    code, port = await anna.network.open_door()
    assert process.stdin is not None
    process.stdin.write(f"join {code} 127.0.0.1 {port}\n".encode())
    await anna.until(lambda: [p.state for p in anna.network.peers().values()] == ["online"], 30)
    device = next(iter(anna.network.peers()))
    await anna.until(lambda: anna.network.peers()[device].rtt_ms)
    return device


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
async def test_a_busy_device_is_slow_a_frozen_one_silent_and_waited_for_a_killed_one_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("peerllm.daemon.network.happy_eyeballs.ATTEMPT_TIMEOUT_S", 0.3)
    async with devices(tmp_path, "anna") as (anna,), program(tmp_path) as process:
        device = await joined(anna, process)
        os.kill(process.pid, signal.SIGSTOP)
        frozen = time.monotonic()
        await anna.until(lambda: anna.state(device) == "silent")
        assert time.monotonic() - frozen <= 1.5
        assert "silent" in anna.network.peers()[device].problem and not anna.vanished
        question = asyncio.ensure_future(anna.network.ask(device, Release("d", 1), WAIT_S))
        await anna.until(lambda: anna.network._links.membership.members[device].attempt.tries, 30)
        assert not question.done(), "though it was dialled anew in vain"
        os.kill(process.pid, signal.SIGCONT)
        await anna.until(lambda: anna.state(device) == "online", 30)
        with pytest.raises(PeerLLMError, match="no questions yet"):
            await question
        process.kill()
        killed = time.monotonic()
        await anna.until(lambda: anna.vanished)
        assert time.monotonic() - killed <= 1.0 and anna.state(device) == "offline"
        assert [state for _, state, _ in anna.states] == ["online", "silent", "online", "offline"]
        assert [renewed for *_, renewed in anna.states] == [True, False, False, False]


def test_what_is_due_already_is_no_fault_of_the_loop(tmp_path: Path) -> None:
    """Of what is due now uvloop's handles do not tell when; setting it again once ended a pairing half done."""
    if sys.platform == "win32":
        pytest.skip("no uvloop")
    import uvloop

    async def ticks() -> int:
        device = Device(tmp_path, "laptop")
        links, loop, ticked = device.network._links, asyncio.get_running_loop(), asyncio.Event()
        due: list[float | None] = [loop.time() - 1.0, loop.time() - 1.0, loop.time() - 0.5]
        count = 0

        def handle(event: object, now: float) -> tuple[()]:
            nonlocal count
            count += 1
            ticked.set()
            return ()

        links.membership.handle = handle  # type: ignore[method-assign, assignment]
        links.membership.deadline = lambda: due.pop() if due else None  # type: ignore[method-assign]
        for _ in range(3):
            links._arm()
        async with asyncio.timeout(WAIT_S):
            await ticked.wait()
        return count

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        assert runner.run(ticks()) == 1
