"""What other devices of the household may ask of this one's API: answers of the models started here, nothing else."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import aclosing
from functools import partial

import msgspec
from aiohttp import web

from peerllm.api.askers.request_log import logged
from peerllm.api.bodies import MAX_BODY_BYTES, most_bytes, read_body
from peerllm.api.core.answer_events import AnswerFails, AnswerWaits
from peerllm.api.core.asking import answer
from peerllm.api.core.caller import Caller
from peerllm.api.core.generation import checked
from peerllm.api.core.kept.repeat import Repeat, fingerprint
from peerllm.api.core.named_models import device_name
from peerllm.api.core.remote_answer import ANSWER_PATH, RelayedGeneration
from peerllm.api.core.telling import ending_well
from peerllm.api.error_answers import ErrorFacts, error_response, errors_as_json, household_error, refused
from peerllm.api.keys import TASKS
from peerllm.api.streams import KEEP_ALIVE_S, LINES, Stream, pulsed
from peerllm.errors import OverloadedError
from peerllm.types import DeviceId

MAX_OF_DEVICE = 256  # answers under way for one device: half of tasks.MAX_STREAMS, and as many as may wait for slots
STILL_HERE_S = KEEP_ALIVE_S + 0.7  # seconds without an event: what an answer waits for is repeated before, but not ...
STILL_HERE = AnswerWaits("working")  # ... while its prompt is prepared; a silent device counts as lost


class PeerApi:
    """A facade.PeerHandler over the API's application. A request that was relayed once is never relayed again."""

    def __init__(self, app: web.Application) -> None:
        self._app = app
        self._under_way: Counter[DeviceId] = Counter()

    async def __call__(self, request: web.Request, device: DeviceId) -> web.StreamResponse:
        if "/" + request.match_info["path"] != ANSWER_PATH or request.method != "POST":
            return refused(request, 404, "this is not answered for other devices")
        if self._under_way[device] >= MAX_OF_DEVICE:
            error = OverloadedError(f"{MAX_OF_DEVICE} answers for your device are under way already")
            return error_response(request, error)

        async def handler(request: web.Request) -> web.StreamResponse:
            return await self._answer(request, device)

        async def large(request: web.Request) -> web.StreamResponse:
            return await errors_as_json(request.clone(client_max_size=MAX_BODY_BYTES), handler)

        self._under_way[device] += 1
        try:
            return await logged(request, large, partial(device_name, self._app, device))
        finally:
            self._under_way[device] -= 1
            if not self._under_way[device]:
                del self._under_way[device]

    async def _answer(self, request: web.Request, device: DeviceId) -> web.StreamResponse:
        with self._app[TASKS].stream(device, most_bytes(request)):
            asked = await read_body(request, RelayedGeneration)
            wanted, caller = checked(asked.generation, {}), Caller(asked.client, device, asked.person)
            repeat = Repeat(asked.key, fingerprint(wanted), asked.had, asked.fleeting, asked.beyond)
            stream = Stream(request, LINES, _failing)
            events = pulsed(answer(self._app, wanted, caller, repeat), STILL_HERE_S)
            async with ending_well(self._app, stream), aclosing(events):
                async for event in events:
                    await stream.write(msgspec.json.encode(event or STILL_HERE) + b"\n")
        return await stream.end()


def _failing(facts: ErrorFacts) -> Iterator[object]:
    yield msgspec.to_builtins(AnswerFails(dict(household_error(facts)["error"])))
