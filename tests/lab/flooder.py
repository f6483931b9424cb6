"""What one machine can do to another's ports, in a process of its own.

`python -m tests.lab.flooder silent SECONDS COUNT HOST PORT...`: so many connections that say nothing, or little.
`python -m tests.lab.flooder member SECONDS DATA_DIR HOST PORT CERTIFICATE`: control messages with a member's identity,
and datagrams of garbage. It says how much it has sent.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import resource
import socket
import sys
import time
from pathlib import Path

import aiohttp

from peerllm import PROTOCOL_VERSION, __version__
from peerllm.codec import encode
from peerllm.daemon.control_messages import Ask, Control, DeviceView, Heartbeat, Hello, Profile, Release
from peerllm.daemon.network.control_channel import LAST, MORE, PART_BYTES
from peerllm.errors import AuthenticationError, LinkError
from peerllm.transport.dial import dial
from peerllm.transport.identity import certificate_device, load_or_create

SAID = (b"", b"G", b"GET / HTTP/1.1\r\nHost: x\r\n", b"\x16\x03\x01")  # nothing, a byte, a head without end, half a TLS
SOURCE = "127.0.0.2"  # another machine, as far as the other end can tell


async def silent(seconds: float, count: int, host: str, ports: list[int]) -> int:
    """Keep so many connections open, and open one anew for each that is cut; how many were opened."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 4 * count), hard))
    opened, end = 0, time.monotonic() + seconds

    async def one(number: int) -> None:
        nonlocal opened
        for turn in itertools.count(number):
            with contextlib.suppress(OSError):
                reader, writer = await asyncio.open_connection(
                    host, ports[turn % len(ports)], local_addr=(SOURCE, 0) if host == "127.0.0.1" else None
                )
                opened += 1
                writer.write(SAID[turn % len(SAID)])
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(max(0.01, end - time.monotonic())):
                        await reader.read()
                writer.close()
            if time.monotonic() >= end:
                return
            await asyncio.sleep(0.2)

    await asyncio.gather(*(one(number) for number in range(count)))
    return opened


def hello() -> Hello:
    return Hello(PROTOCOL_VERSION, __version__, {}, "rogue", 1, 1, 1, 1, {}, {}, (), ())


async def member(seconds: float, directory: Path, host: str, port: int, certificate_pem: str) -> int:
    """Send all that may be sent, and some that may not, over as many links as there may be; bytes sent."""
    identity, sent, end = load_or_create(directory), 0, time.monotonic() + seconds
    small = [
        encode(message, Control).decode()
        for message in (Heartbeat(1), Ask(1, Release("d" * 32, 1)), DeviceView(1, 1, "running", ()))
    ]
    profile = encode(Ask(2, Profile("x" * (15 << 20), "float32", ("block",), False)), Control)
    view = encode(DeviceView(1, 1, "x" * (15 << 20), ()), Control)

    async def link(number: int) -> None:
        nonlocal sent
        async with aiohttp.ClientSession() as session:
            for turn in itertools.count():
                with contextlib.suppress(LinkError, AuthenticationError, OSError, aiohttp.ClientError):
                    path = f"/control/{time.time_ns() // 1000 + number}"
                    device = certificate_device(certificate_pem)
                    websocket = await dial(session, identity, device, certificate_pem, host, port, path)
                    await websocket.send_str(encode(hello(), Control).decode())
                    while time.monotonic() < end:
                        for text in small if number % 2 else ():
                            await websocket.send_str(text)
                            sent += len(text)
                        if number % 2 == 0:
                            large = profile if turn % 2 else view
                            for start in range(0, len(large), PART_BYTES):
                                more = MORE if start + PART_BYTES < len(large) else LAST
                                await websocket.send_bytes(more + large[start : start + PART_BYTES])
                                sent += PART_BYTES
                        with contextlib.suppress(TimeoutError):
                            await websocket.receive(timeout=0.001)
                if time.monotonic() >= end:
                    return
                await asyncio.sleep(0.1)

    async def datagrams() -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            while time.monotonic() < end:
                for _ in range(500):
                    with contextlib.suppress(OSError):
                        sock.sendto(os.urandom(48), (host, port))
                await asyncio.sleep(0.01)

    async with asyncio.timeout(seconds + 20.0):
        await asyncio.gather(datagrams(), *(link(number) for number in range(4)), return_exceptions=True)
    return sent


if __name__ == "__main__":
    kind, seconds, *rest = sys.argv[1:]
    if kind == "silent":
        print(asyncio.run(silent(float(seconds), int(rest[0]), rest[1], [int(port) for port in rest[2:]])))
    else:
        directory, host, port, certificate = rest
        print(asyncio.run(member(float(seconds), Path(directory), host, int(port), Path(certificate).read_text())))
