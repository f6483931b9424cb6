"""The least a hop can take here: two processes that compute and hand 4 KB on, with nothing of peerllm between.

Each is pinned to a core in its own network namespace (1 Gbit/s). One thread each computes a pass over `megabytes` of
weights, writes to a TLS 1.3 socket, and waits for what comes back, asleep or looking again and again: no event loop,
no second thread, no websocket, no checks. Timed from the end of the pass to the start of the next one on the other side
(one host, one clock). Without a pass between, the same code runs with warm caches. Needs root (namespaces).
"""

from __future__ import annotations

import argparse
import ctypes
import json
import select
import socket
import ssl
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch

from peerllm.transport.identity import load_or_create
from tests.lab.netns import Lab, require_lab

TRIES, PAUSE_S = 100, 0.1  # to connect
MBPS, PORT, NBYTES, TURNS, WARM_UPS, TIMEOUT_MS = 1000, 7777, 4096, 300, 20, 20_000
MATRIX_MB = 2048 * 8192 * 2 / 1e6
HEADER = struct.Struct("<Q")


def connected(server: bool, address: str, directory: Path) -> ssl.SSLSocket:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    if server:
        identity = load_or_create(directory)
        context.load_cert_chain(identity.certificate_path, identity.key_path)
        with socket.create_server((address, PORT)) as door:
            plain, _ = door.accept()
    else:
        for _ in range(TRIES):
            try:
                plain = socket.create_connection((address, PORT))
                break
            except OSError:
                time.sleep(PAUSE_S)
    plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return context.wrap_socket(plain, server_side=server)


def side(role: str, address: str, directory: Path, matrices: int, awake: bool) -> None:
    """Prints the microseconds of its hops as JSON."""
    torch.set_num_threads(1)
    weights = [torch.randn(2048, 8192).bfloat16() for _ in range(matrices)]
    row, hidden = torch.randn(1, 2048).bfloat16(), torch.randn(1, NBYTES // 2).bfloat16()
    link = connected(role == "server", address, directory)
    poll, buffer = select.poll(), bytearray(HEADER.size + NBYTES)
    poll.register(link.fileno(), select.POLLIN)
    hops = []
    if awake:
        link.setblocking(False)

    def compute() -> None:
        for weight in weights:
            torch.mm(row, weight)

    def send() -> None:
        began = time.perf_counter_ns()
        link.send(HEADER.pack(began) + ctypes.string_at(hidden.data_ptr(), NBYTES))

    def receive() -> None:
        got = 0
        while got < len(buffer):
            if not awake and not link.pending():
                poll.poll(TIMEOUT_MS)
            try:
                got += link.recv_into(memoryview(buffer)[got:])
            except ssl.SSLWantReadError:
                continue
        torch.frombuffer(buffer, dtype=torch.bfloat16, offset=HEADER.size).view(1, -1)
        hops.append((time.perf_counter_ns() - HEADER.unpack_from(buffer)[0]) / 1e3)

    for _ in range(TURNS):
        if role == "server":
            compute()
            send()
        receive()
        if role == "client":
            compute()
            send()
    print(json.dumps(hops[WARM_UPS:]))


def measure(matrices: int, awake: bool) -> float:
    """Median microseconds of a hop."""
    require_lab()
    with tempfile.TemporaryDirectory() as directory, Lab(2) as lab:
        load_or_create(Path(directory))
        for host in range(2):
            lab.limit(host, MBPS)
        sides = [
            subprocess.Popen(
                [*lab.argv(host, [], core), sys.executable, "-m", "benchmarks.hop_floor", "--role", role,
                 "--address", lab.address(0), "--directory", directory, "--matrices", str(matrices),
                 *(["--awake"] if awake else [])],
                stdout=subprocess.PIPE, text=True)
            for host, (role, core) in enumerate((("server", 0), ("client", 1)))
        ]  # fmt: skip
        return median(hop for one in sides for hop in json.loads(one.communicate(timeout=120)[0]))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--role", choices=("server", "client"), help=argparse.SUPPRESS)
    parser.add_argument("--address", help=argparse.SUPPRESS)
    parser.add_argument("--directory", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--matrices", type=int, default=4, help="of 33.6 MB, in a pass")
    parser.add_argument("--awake", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.role:
        side(args.role, args.address, args.directory, args.matrices, args.awake)
        return
    found = {
        f"{'awake' if awake else 'asleep'}, {count * MATRIX_MB:.0f} MB read between": f"{measure(count, awake):.0f} us"
        for awake in (False, True)
        for count in (0, args.matrices)
    }
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
