"""The daemon and its API in this process, until a signal."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import signal
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from functools import partial
from typing import Any

from peerllm.api.guard import is_loopback
from peerllm.api.server import ApiServer
from peerllm.api.token import TOKEN_FILE
from peerllm.cli.device import DAEMON_FILE, daemon_note
from peerllm.cli.service.sleep_watch import sleep_watched
from peerllm.cli.service.systemd_notify import notify, watchdog_fed
from peerllm.cli.terminal import tell
from peerllm.daemon.daemon import Daemon
from peerllm.daemon.settings import Settings
from peerllm.planner.cost.byte_sizes import human_bytes
from peerllm.saved_files import SavedFile

FAREWELL_S = 10.0  # for others to take over what this device holds, and for answers under way here
INTERRUPTED_S = 2.0  # that at Ctrl-C
SLEEP_S = 4.0  # before the machine sleeps: logind waits for 5

log = logging.getLogger(__name__)


def live(settings: Settings, api_names: list[str], exit_with_parent: bool, expected: str) -> None:
    """Returns when the device was stopped; BadInputError if it cannot start."""
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        runner.run(serve(settings, api_names, exit_with_parent, expected))


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.new_event_loop


async def serve(settings: Settings, api_names: list[str], exit_with_parent: bool, expected: str = "") -> None:
    """API, then daemon, then the ready line; a signal ends them with a farewell, a second one without.

    The API tells from the first second what goes on.
    """
    stop, hurry = asyncio.Event(), asyncio.Event()
    farewell_s = FAREWELL_S
    loop = asyncio.get_running_loop()

    def asked_to_end(within_s: float) -> None:
        nonlocal farewell_s
        if stop.is_set():
            hurry.set()
        else:
            farewell_s = within_s
            stop.set()

    loop.add_signal_handler(signal.SIGTERM, asked_to_end, FAREWELL_S)
    loop.add_signal_handler(signal.SIGINT, asked_to_end, INTERRUPTED_S)
    if exit_with_parent:
        _watch_stdin(loop, stop, hurry)
    daemon = Daemon(settings)
    api = ApiServer(
        daemon, settings.api_host, settings.api_port, settings.data_dir, api_names, expected, settings.in_process
    )
    try:
        await api.reserve()
        await daemon.claim()
        await api.start()
        async with watchdog_fed(), _announced(settings, api.url):
            if await _unless(stop, daemon.start(), "start daemon"):
                tell(ready_text(settings, daemon.status()["devices"][0]))
                print(f"ready {api.url}", flush=True)
                settle()
                notify("READY=1")
                async with sleep_watched(partial(daemon.sleep, SLEEP_S), daemon.wake):
                    await stop.wait()
                log.info("stopping")
                notify("STOPPING=1")
                await _unless(hurry, daemon.farewell("going down", farewell_s), "say farewell")
    finally:
        await api.close()
        await daemon.close()


def settle() -> None:
    """All that the device is made of stays: garbage is sought elsewhere, where a tenth of a second was taken for it."""
    gc.collect()
    gc.freeze()


@contextlib.asynccontextmanager
async def _announced(settings: Settings, url: str) -> AsyncIterator[None]:
    """The other commands find this device, which says that it starts, and where."""
    note = SavedFile(settings.data_dir / DAEMON_FILE, "where other commands find this device")
    await note.save(daemon_note(url))
    try:
        tell(f"The page of {settings.name}, which says how far it is: {url}")
        if not is_loopback(settings.api_host):
            tell(f"From other machines the page asks for a token: {url}/?token=TOKEN, see {TOKEN_FILE} in the data")
        yield
    finally:
        await note.close()
        (settings.data_dir / DAEMON_FILE).unlink(missing_ok=True)


def ready_text(settings: Settings, me: Mapping[str, Any]) -> str:
    """What the device lends; where its owner asked for more than there is, what became of that."""
    lent, wish = me["lent_bytes"], settings.memory_bytes
    text = f"{settings.name} is ready and lends {human_bytes(lent)} of its {human_bytes(me['memory_bytes'])}"
    return text if wish is None or wish <= lent else f"{text}: --memory {human_bytes(wish)} is more than it can lend"


async def _unless(stop: asyncio.Event, work: Coroutine[Any, Any, None], name: str) -> bool:
    """True when `work` is done, False if `stop` came first."""
    doing = asyncio.create_task(work, name=name)
    waiting = asyncio.create_task(stop.wait(), name="wait for a signal")
    try:
        await asyncio.wait({doing, waiting}, return_when=asyncio.FIRST_COMPLETED)
        if doing.done():
            doing.result()
            return True
        return False
    finally:
        for task in (doing, waiting):
            task.cancel()
        await asyncio.wait({doing, waiting})


def _watch_stdin(loop: asyncio.AbstractEventLoop, stop: asyncio.Event, hurry: asyncio.Event) -> None:
    """Stops at once when standard input ends: the parent that held its other side is gone."""

    def wait_for_end() -> None:
        with contextlib.suppress(OSError, RuntimeError):  # RuntimeError: the loop ended first
            while os.read(0, 4096):
                pass
            loop.call_soon_threadsafe(hurry.set)
            loop.call_soon_threadsafe(stop.set)

    threading.Thread(target=wait_for_end, name="wait for parent", daemon=True).start()
