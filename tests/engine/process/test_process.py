"""The engine as a process: it must not outlive its daemon, whatever either is doing."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from peerllm.codec import MAX_MESSAGE_BYTES
from peerllm.daemon.engine_link.engine_child import EngineChild, environment
from peerllm.engine.messages import Done, Failed, FromEngine, QueryLoad, ToEngine
from peerllm.engine.process.engine_line import MemoryChannel, SocketChannel
from peerllm.errors import LinkError

pytestmark = pytest.mark.timeout(120)
GONE_S = 1.0  # an engine whose daemon died exits within a second

PARENT = """
import asyncio, json, sys
from pathlib import Path
sys.path.insert(0, {root!r})
from tests.engine.engines import Device, deploy

async def main():
    device = Device(Path({directory!r}))
    await device.start()
    deployed = await deploy([device], Path({model!r}), ((0, 0, 5),), context=4096, chunk=4096)
    if {busy}:
        deployed.submit(list(range(97)) * 41, 10)  # one chunk that takes far longer than a second
        await asyncio.sleep(0.3)
    print(json.dumps(device.host.pid), flush=True)
    await asyncio.sleep(600)

asyncio.run(main())
"""


def ended(process: psutil.Process) -> bool:
    """Also if nobody has asked for its exit status yet: the system may have no init that does."""
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@pytest.mark.parametrize("busy", [False, True])
def test_an_engine_ends_with_its_daemon(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, busy: bool) -> None:
    from tests.engine.tiny import make_llama

    model = make_llama(tmp_path_factory.mktemp("model"), hidden=256 if busy else 32)
    code = PARENT.format(
        root=str(Path(__file__).parents[3]), directory=str(tmp_path / "device"), model=str(model), busy=busy
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    try:
        assert parent.stdout is not None
        engine = psutil.Process(json.loads(parent.stdout.readline()))
        assert engine.is_running()
        parent.send_signal(signal.SIGKILL)
        killed = time.monotonic()
        while not ended(engine):
            assert time.monotonic() - killed < GONE_S, engine.status()
            time.sleep(0.01)
    finally:
        parent.kill()
        parent.wait()
        parent.stdout.close()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        struct.pack(">I", 5) + b"{",
        struct.pack(">I", MAX_MESSAGE_BYTES + 1),
        struct.pack(">I", 2) + b"{}",
        struct.pack(">I", 4) + b"\xff\xfe\x00\x01",
        struct.pack(">I", 18) + b'{"type": "Nothing"',
    ],
)
async def test_an_engine_ends_when_the_line_does_or_carries_nonsense(data: bytes) -> None:
    child = await EngineChild.start(1)
    try:
        with child.socket:
            child.socket.sendall(data)
            child.socket.shutdown(socket.SHUT_WR)
            await asyncio.wait_for(child.process.wait(), 60)
        assert child.process.returncode in (0, 70)
        if child.process.returncode == 70:
            assert "message" in await child.ended()
    finally:
        await child.close()


async def test_signals_meant_for_the_daemon_do_not_end_its_engine() -> None:
    child = await EngineChild.start(1)
    try:
        channel = await SocketChannel.on(child.socket, ToEngine, FromEngine)
        channel.send(QueryLoad(7))  # refused before Configure, but answered
        assert (await asyncio.wait_for(channel.receive(), 60)).kind == "EngineError"
        os.kill(child.pid, signal.SIGINT)
        os.kill(child.pid, signal.SIGTERM)
        channel.send(QueryLoad(8))
        answer = await asyncio.wait_for(channel.receive(), 60)
        assert isinstance(answer, Failed) and answer.request == 8
        channel.close()
        await asyncio.wait_for(child.process.wait(), GONE_S + 4)
        assert child.process.returncode == 0
    finally:
        await child.close()


def test_the_daemons_half_imports_no_torch() -> None:
    modules = "peerllm.daemon.engine_link.engine_host, peerllm.engine.process.launch"
    code = f"import sys, {modules}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment(1), check=True)
    assert done.stdout.strip() == "False"


async def test_a_reader_that_sleeps_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peerllm.engine.process.engine_line.MAX_UNSENT_BYTES", 1 << 16)
    left, right = socket.socketpair()
    with right:
        channel = await SocketChannel.on(left, FromEngine, ToEngine)

        def flood() -> None:
            for _ in range(1000):
                channel.send(Failed(1, "EngineError", "x" * 10_000))

        with pytest.raises(LinkError, match="does not read"):
            flood()
        await asyncio.sleep(0)
        with pytest.raises(LinkError):
            channel.send(Done(1))
        assert await channel.receive() is None
        channel.close()
        channel.close()


async def test_the_memory_channel_between_two_loops(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = MemoryChannel.pair()

    async def echo() -> None:
        while (message := await theirs.receive()) is not None:
            theirs.send(message)

    thread = asyncio.create_task(asyncio.to_thread(asyncio.run, echo()))
    for number in range(2000):
        ours.send(number)
    assert [await asyncio.wait_for(ours.receive(), 10) for _ in range(2000)] == list(range(2000))
    ours.close()
    await asyncio.wait_for(thread, 10)
    with pytest.raises(LinkError):
        theirs.send(1)
    lonely, deaf = MemoryChannel.pair()
    monkeypatch.setattr("peerllm.engine.process.engine_line.MAX_UNREAD_MESSAGES", 3)
    for number in range(3):
        lonely.send(number)
    with pytest.raises(LinkError, match="does not read"):
        lonely.send(4)
    lonely.close()
    assert [await deaf.receive() for _ in range(4)] == [0, 1, 2, None]
