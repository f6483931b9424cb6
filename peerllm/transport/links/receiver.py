"""The receiving end of a link: one websocket, read until it ends."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from time import perf_counter, perf_counter_ns

import aiohttp
from aiohttp import web

from peerllm.errors import FrameError, PeerLLMError
from peerllm.transport.dial import CLOSE_TIMEOUT_S
from peerllm.transport.frames import Decoder, Frame, FrameLimits
from peerllm.transport.links.link import close_reason
from peerllm.transport.links.pulse import Pulse
from peerllm.transport.links.timing import answer
from peerllm.transport.links.watch import NOBODY_WATCHES, Watch
from peerllm.types import DeviceId

# Runs on the loop and must be cheap. What it raises (a PeerLLMError) ends the link; what it returns, if anything, is
# awaited before the next frame is read, so that a stage with too much to do holds back its sender.
Deliver = Callable[[DeviceId, Frame], Awaitable[None] | None]


@dataclass(frozen=True, slots=True)
class Ingress:
    """Who may send to a stage, and what."""

    sender: DeviceId
    limits: FrameLimits


class Receiver:
    """Reads one link; `reason` is why it broke, empty after an orderly end."""

    def __init__(
        self,
        request: web.Request,
        ingress: Ingress,
        deliver: Deliver,
        ended: Callable[[Receiver], None],
        watch: Watch = NOBODY_WATCHES,
    ) -> None:
        self.ingress = ingress
        self.delivered = 0  # frames
        self.reason = ""
        self._request = request
        self._deliver = deliver
        self._ended = ended
        self._watch = watch
        self._orderly = False
        self._websocket = web.WebSocketResponse(
            max_msg_size=ingress.limits.max_bytes + 1,  # aiohttp refuses what reaches the limit
            autoping=False,  # answers say how long they waited
            compress=False,
            timeout=CLOSE_TIMEOUT_S,
        )

    async def run(self) -> web.WebSocketResponse:
        """Serve the link to its end."""
        await self._websocket.prepare(self._request)
        pulse = Pulse(self._websocket)
        beat = asyncio.create_task(pulse.run(self.abort), name=f"link from {self.ingress.sender[:8]} beat")
        try:
            await self._read(pulse)
        except PeerLLMError as error:  # a frame the plan does not allow, or no room for it
            self.reason = self.reason or str(error)
            self._end()  # before the goodbye, whose answer may take its time
            refused = isinstance(error, FrameError)
            code = aiohttp.WSCloseCode.POLICY_VIOLATION if refused else aiohttp.WSCloseCode.INTERNAL_ERROR
            await self._say_goodbye(code, self.reason)
        except Exception as error:  # a fault of ours must not end a link in silence
            self.reason = self.reason or f"{type(error).__name__}: {error}"
            raise
        finally:
            self._end()
            beat.cancel()
            await asyncio.gather(beat, return_exceptions=True)
        return self._websocket

    def abort(self, reason: str) -> None:
        """Cut the connection now."""
        self.reason = self.reason or reason
        if self._request.transport is not None:
            self._request.transport.abort()

    def replace(self) -> None:
        """Make way for a new connection of the same sender; lost only if frames may be missing."""
        self._orderly = not self.delivered
        self.abort("replaced by a new connection" if self.delivered else "")

    async def close(self) -> None:
        """Tell the sender that nothing more is expected here; not reported as lost."""
        self._orderly = True
        await self._say_goodbye(aiohttp.WSCloseCode.OK, "no longer expected")

    async def _read(self, pulse: Pulse) -> None:
        limits, sender = self.ingress.limits, self.ingress.sender
        decoder = Decoder(limits)
        taken = perf_counter()
        while True:
            message = await self._websocket.receive()
            pulse.arrived()
            match message.type:
                case aiohttp.WSMsgType.BINARY:
                    self.delivered += 1
                    came = perf_counter_ns() if self._watch.on else 0
                    frame = decoder.decode(message.data)
                    rest = self._deliver(sender, frame)
                    taken = perf_counter()
                    if came:
                        handed_on = perf_counter_ns()
                        self._watch.received(sender, frame, self.delivered, len(message.data), came, handed_on)
                    if rest is not None:
                        pulse.reading = False
                        await rest
                        pulse.reading = True
                        pulse.arrived()
                        if came:
                            ours = limits.deployment, sender, limits.stage
                            self._watch.held(*ours, handed_on, perf_counter_ns())
                case aiohttp.WSMsgType.PING:
                    await self._websocket.pong(answer(bytes(message.data), taken, perf_counter()))
                case aiohttp.WSMsgType.PONG:
                    pass  # the sender's beat
                case aiohttp.WSMsgType.CLOSE if message.data == aiohttp.WSCloseCode.OK:
                    return
                case aiohttp.WSMsgType.ERROR:
                    if not self._orderly:
                        self.reason = self.reason or f"the connection broke: {message.data}"
                    return
                case aiohttp.WSMsgType.CLOSE | aiohttp.WSMsgType.CLOSED | aiohttp.WSMsgType.CLOSING:
                    if not self._orderly:
                        self.reason = self.reason or message.extra or "the connection broke"
                    return
                case _:
                    raise FrameError("a link carries binary frames only")

    def _end(self) -> None:
        ended, self._ended = self._ended, lambda receiver: None
        ended(self)

    async def _say_goodbye(self, code: int, reason: str) -> None:
        await self._websocket.close(code=code, message=close_reason(reason))
