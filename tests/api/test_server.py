"""The listening socket itself."""

from __future__ import annotations

import socket
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from peerllm.api.server import BACKLOG, ApiServer

_SOMAXCONN = Path("/proc/sys/net/core/somaxconn")
KERNEL_MOST = int(_SOMAXCONN.read_text()) if _SOMAXCONN.exists() else 0  # connections it lets wait on any socket


@pytest.mark.skipif(sys.platform != "linux", reason="other systems count waiting connections in their own way")
async def test_as_many_connections_wait_as_the_backlog_says(server: ApiServer) -> None:
    """No connection is accepted while this test holds the loop, so all of them wait in the kernel's queue."""
    with ExitStack() as held:
        for number in range(min(BACKLOG, KERNEL_MOST)):
            one = held.enter_context(socket.socket())
            one.settimeout(0.5)  # the kernel asks again after 1 s where its queue is full
            try:
                one.connect(("127.0.0.1", server.port))
            except TimeoutError:
                pytest.fail(f"only {number} connections could wait")
