"""What other devices of the household may ask of this one's API: answers of the models started here, nothing else."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping

from aiohttp import web

from peerllm.api.error_answers import error_object, error_response, errors_as_json, json_response
from peerllm.api.fields import MAX_BODY_BYTES
from peerllm.api.openai.completions import CHAT_PATH, answer_chat
from peerllm.api.peers.caller import MAX_CLIENT_CHARS, Caller
from peerllm.api.peers.remote_answer import CLIENT_HEADER
from peerllm.api.streams import KEEP_ALIVE_S, STREAM
from peerllm.errors import OverloadedError
from peerllm.types import DeviceId

MAX_OF_DEVICE = 128  # answers under way for one device: a quarter of tasks.MAX_STREAMS

Answer = Callable[[web.Application, web.Request, Caller], Awaitable[web.StreamResponse]]
ROUTES: Mapping[str, Answer] = {CHAT_PATH: answer_chat}


class PeerApi:
    """A facade.PeerHandler over the API's application. A request that was relayed once is never relayed again."""

    def __init__(self, app: web.Application) -> None:
        self._app = app
        self._under_way: Counter[DeviceId] = Counter()

    async def __call__(self, request: web.Request, device: DeviceId) -> web.StreamResponse:
        answer = ROUTES.get("/" + request.match_info["path"])
        if answer is None or request.method != "POST":
            return json_response(error_object(404, "this is not answered for other devices"), 404)
        if self._under_way[device] >= MAX_OF_DEVICE:
            return error_response(OverloadedError(f"{MAX_OF_DEVICE} answers for your device are under way already"))
        caller = Caller(request.headers.get(CLIENT_HEADER, "")[:MAX_CLIENT_CHARS], device)

        async def handler(request: web.Request) -> web.StreamResponse:
            return await answer(self._app, request, caller)

        self._under_way[device] += 1
        taken = request.clone(client_max_size=MAX_BODY_BYTES)
        patience = asyncio.create_task(_patience(taken), name=f"api: patience of {device[:8]}")
        try:
            return await errors_as_json(taken, handler)
        finally:
            patience.cancel()
            self._under_way[device] -= 1
            if not self._under_way[device]:
                del self._under_way[device]


async def _patience(request: web.Request) -> None:
    """Say from time to time that an answer is being made, until it begins: a silent device counts as lost."""
    with contextlib.suppress(ConnectionError):
        while True:
            await asyncio.sleep(KEEP_ALIVE_S)
            stream = request.get(STREAM)
            if stream is not None and not await stream.stay():
                return
