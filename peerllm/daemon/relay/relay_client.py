"""Requests of this device's people, answered by the source of their model over the control port."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager

from peerllm.daemon.facade import RelayedAnswer
from peerllm.errors import LinkError
from peerllm.types import DeviceId

API_PREFIX = "/api"  # of the control port's paths that lead to the API

Post = Callable[[DeviceId, str, Mapping[str, str], bytes], AbstractAsyncContextManager[RelayedAnswer]]


class RelayClient:
    """`post` sends one request to a device; what waits for a device ends when `vanished` tells that it is gone."""

    def __init__(self, post: Post) -> None:
        self._post = post
        self._scopes: dict[DeviceId, set[asyncio.Timeout]] = {}

    @asynccontextmanager
    async def ask(
        self, device: DeviceId, path: str, headers: Mapping[str, str], body: bytes
    ) -> AsyncIterator[RelayedAnswer]:
        """The answer, as long as the device is there: a silent connection alone does not tell that it is not."""
        scope = asyncio.timeout(None)
        scopes = self._scopes.setdefault(device, set())
        try:
            async with scope:
                scopes.add(scope)
                async with self._post(device, API_PREFIX + path, headers, body) as answer:
                    yield answer
        except TimeoutError as error:
            if not scope.expired():
                raise
            raise LinkError("the device that answers for it is gone") from error
        finally:
            scopes.discard(scope)
            if not scopes and self._scopes.get(device) is scopes:
                del self._scopes[device]

    def vanished(self, device: DeviceId) -> None:
        """End with a LinkError whatever waits for this device."""
        for scope in self._scopes.pop(device, ()):
            scope.reschedule(0.0)
