"""What other devices of the household relay to this one's API, taken at the control port."""

from __future__ import annotations

from aiohttp import web

from peerllm.daemon.facade import PeerHandler
from peerllm.transport.tls.contexts import peer_device

ROUTE = "/api/{path:.*}"


class RelayDoor:
    """Hands requests to the API's handler, with the device that sent them; 503 while there is none."""

    def __init__(self) -> None:
        self.handler: PeerHandler | None = None

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """The listener has proved who asks; the handler decides what it may have."""
        if self.handler is None:
            raise web.HTTPServiceUnavailable(text="this device answers nobody yet")
        return await self.handler(request, peer_device(request))
