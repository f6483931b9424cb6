"""Two devices' APIs: one serves the model, the other relays to it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp

from peerllm.api.server import ApiServer
from peerllm.daemon.facade import ServedModel
from tests.api.fake import FakeHousehold, make_model_dir

PATH = "/v1/chat/completions"
ASK: Any = {"model": "builtin", "messages": [{"role": "user", "content": "hi"}]}
LAPTOP, MINI = "a" * 64, "b" * 64


class Pair:
    """The laptop serves the model, the mini PC relays."""

    def __init__(self, laptop: FakeHousehold, mini: FakeHousehold, here: str, control: str, server: ApiServer) -> None:
        self.laptop, self.mini, self.here, self.control, self.server = laptop, mini, here, control, server
        self.session: aiohttp.ClientSession
        self.cut: Callable[[], Awaitable[None]]  # closes the laptop's control port

    def elsewhere(self, **what: Any) -> ServedModel:
        """The laptop's model as the mini PC sees it."""
        return replace(self.laptop.model, model_dir=None, stop_ids=(), source=LAPTOP, **what)


@asynccontextmanager
async def relay_pair(tmp_path: Path) -> AsyncIterator[Pair]:
    async with AsyncExitStack() as stack:
        laptop, mini = (FakeHousehold(make_model_dir(tmp_path / name)) for name in ("laptop", "mini"))
        mini.id = MINI
        servers = [
            ApiServer(one, "127.0.0.1", 0, tmp_path / f"data{index}", in_process=True)
            for index, one in enumerate((laptop, mini))
        ]
        for server in servers:
            await server.start()
            stack.push_async_callback(server.close)
        ports = await stack.enter_async_context(AsyncExitStack())
        control = await ports.enter_async_context(laptop.control_port())
        found = Pair(laptop, mini, servers[1].url, control, servers[0])
        mini.served, mini.peers = [found.elsewhere()], {LAPTOP: control}
        found.cut = ports.aclose
        found.session = await stack.enter_async_context(aiohttp.ClientSession(found.here))
        yield found
