"""An engine as a process of its own, on one end of a socketpair; and as threads of the daemon's."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from typing import NoReturn

from peerllm.engine.messages import FromEngine, ToEngine
from peerllm.engine.process.engine_line import MemoryChannel, SocketChannel
from peerllm.errors import PeerLLMError

SWITCH_INTERVAL_S = 0.0005  # the I/O thread gets the interpreter this fast from a compute thread that runs Python
EXIT_OK, EXIT_FAILED = 0, 70
_PR_SET_PDEATHSIG = 1


def serve(fd: int, parent: int) -> NoReturn:
    """Serves the daemon at the other end of socket `fd`; the process ends when the daemon does (`parent`: its pid)."""
    _die_with(parent)
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    # Ctrl-C and a service's stop reach the whole group: the daemon decides when its engine ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sock = socket.socket(fileno=fd)
    sock.set_inheritable(False)
    try:
        with asyncio.Runner(loop_factory=_loop_factory()) as runner:
            runner.run(_serve(sock))
    except PeerLLMError as error:
        _exit(EXIT_FAILED, f"engine: {error}")
    except BaseException as error:
        _exit(EXIT_FAILED, f"engine: {type(error).__name__}: {error}")
    _exit(EXIT_OK)


async def _serve(sock: socket.socket) -> None:
    from peerllm.engine.backends import Backends
    from peerllm.engine.process.runtime import Engine

    channel = await SocketChannel.on(sock, FromEngine, ToEngine)
    try:
        await Engine(channel, Backends()).run()
    except PeerLLMError as error:
        _exit(EXIT_FAILED, f"engine: {error}")
    # Threads may be inside a kernel for long, and the system takes back what they hold.
    _exit(EXIT_OK)


def _exit(code: int, line: str = "") -> NoReturn:
    if line:
        sys.stderr.write(line + "\n")
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.flush()
    os._exit(code)


def _die_with(parent: int) -> None:
    """Linux kills this process when its parent dies, whatever it is doing; elsewhere the closed line has to do."""
    if sys.platform != "linux":
        return
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it died before that
        _exit(EXIT_OK)


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop]:
    try:
        import uvloop
    except ImportError:
        return asyncio.SelectorEventLoop  # everywhere: that of Windows watches no sockets but its own
    return uvloop.new_event_loop


def start_in_process(ended: Callable[[str], None]) -> tuple[MemoryChannel, threading.Thread]:
    """An engine in threads of this process: (the daemon's end, the thread of its loop).

    `ended` is called in that thread when the engine has ended, with the reason if it failed.
    """
    ours, theirs = MemoryChannel.pair()

    async def body() -> None:
        from peerllm.engine.backends import Backends
        from peerllm.engine.process.runtime import Engine

        engine = Engine(theirs, Backends())
        try:
            await engine.run()
        finally:
            await engine.close()

    def run() -> None:
        reason = ""
        try:
            with asyncio.Runner(loop_factory=_loop_factory()) as runner:
                runner.run(body())
        except BaseException as error:  # a thread has nobody above it: the daemon must hear of everything
            reason = str(error) if isinstance(error, PeerLLMError) else f"{type(error).__name__}: {error}"
        finally:
            theirs.close()
            ended(reason)

    thread = threading.Thread(target=run, name="engine-io", daemon=True)
    thread.start()
    return ours, thread
