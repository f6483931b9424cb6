"""One device's data plane: links it accepts for its stages, links it dials to the next ones."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence

import aiohttp
from aiohttp import web

from peerllm.errors import BadInputError, LinkError, PeerLLMError
from peerllm.transport.dial import dial, dialling_session
from peerllm.transport.identity import Identity, certificate_device
from peerllm.transport.links.echo import ECHO_LIMITS, ECHO_PATH, NOBODY, Timed, timed_frames
from peerllm.transport.links.link import MAX_ANSWER_BYTES, Link
from peerllm.transport.links.receiver import Deliver, Ingress, Receiver
from peerllm.transport.links.timing import OnTimed
from peerllm.transport.links.watch import NOBODY_WATCHES, Watch
from peerllm.transport.tls import TlsServer, request_device
from peerllm.types import DeploymentId, DeviceId

PATH = "/data/{deployment:[0-9a-f]{32}}/{epoch:[0-9]{1,10}}/{stage:[0-9]{1,5}}"
MAX_INGRESSES = 1024  # links this device expects at once; a plan has no more stages
STAGGER_S = 0.3  # head start of one address over the next
MAX_TIMED = 64  # timings of one echo that wait to be read

OnLost = Callable[[DeploymentId, DeviceId, str], None]
Key = tuple[DeploymentId, int, int]  # deployment, epoch, stage


class DataPlane:
    """Serves and dials `/data/{deployment}/{epoch}/{stage}`. All methods are for the loop it was started on.

    `on_lost` (on the loop; deployment, device, reason) tells of each link that broke, either way; of none that either
    side ended on purpose. One ingress has one connection: a new one of the same sender takes the old one's place.
    `on_echo` gets the frames with which others time their links to here (`echo`); `watch` hears of all others.
    """

    def __init__(
        self,
        identity: Identity,
        hosts: Iterable[str],
        port: int,
        on_lost: OnLost | None = None,
        on_echo: Deliver | None = None,
        watch: Watch = NOBODY_WATCHES,
    ) -> None:
        self._identity = identity
        self._watch = watch
        self._on_lost = on_lost or (lambda deployment, device, reason: None)
        self._expected: dict[Key, tuple[Ingress, Deliver]] = {}
        self._receivers: dict[Key, Receiver] = {}
        self._on_echo = on_echo or (lambda device, frame: None)
        self._echoes: dict[DeviceId, Receiver] = {}
        self._links: set[Link] = set()
        app = web.Application()
        app.router.add_get(PATH, self._accept)
        app.router.add_get(ECHO_PATH, self._accept_echo)
        self._server = TlsServer(app, identity, hosts, port)
        self._session: aiohttp.ClientSession | None = None

    @property
    def port(self) -> int:
        """The real port, also where 0 was asked for."""
        return self._server.port

    async def start(self) -> None:
        """Listen; nobody is trusted yet. BadInputError if the port is in use."""
        await self._server.start()
        if self._session is None:
            self._session = dialling_session()

    async def close(self) -> None:
        """Cut every link, tell of none, stop listening."""
        self._on_lost = lambda deployment, device, reason: None
        self._expected.clear()
        links = list(self._links)
        for link in links:
            link.abort("the data plane is closed")
        await self._server.close()
        await asyncio.gather(*(link.wait_closed() for link in links))
        if self._session is not None:
            await self._session.close()

    async def set_trusted(self, pems: Iterable[str]) -> None:
        """Exactly these devices' certificates (PEM) are trusted; links with others are cut and reported lost."""
        trusted = {certificate_device(pem): pem for pem in pems}
        for receiver in (*self._receivers.values(), *self._echoes.values()):
            if receiver.ingress.sender not in trusted:
                receiver.abort("the device was removed from the household")
        for link in list(self._links):
            if link.device not in trusted:
                link.abort("the device was removed from the household")
        await self._server.set_trusted(trusted.values())

    def expect(self, ingress: Ingress, deliver: Deliver) -> None:
        """From now on take frames within `ingress.limits` from `ingress.sender`; each is handed to `deliver`."""
        limits = ingress.limits
        key = (limits.deployment, limits.epoch, limits.stage)
        if key not in self._expected and len(self._expected) >= MAX_INGRESSES:
            raise BadInputError(f"this device already expects {MAX_INGRESSES} links")
        self._expected[key] = (ingress, deliver)

    async def forget(self, deployment: DeploymentId, epoch: int | None = None) -> None:
        """End the links of a deployment (of one epoch only, if given), both ways; none is reported lost."""

        def named(key_deployment: DeploymentId, key_epoch: int) -> bool:
            return key_deployment == deployment and epoch in (None, key_epoch)

        for key in [key for key in self._expected if named(*key[:2])]:
            del self._expected[key]
        receivers = [self._receivers.pop(key) for key in list(self._receivers) if named(*key[:2])]
        links = [link for link in self._links if named(link.deployment, link.epoch)]
        for link in links:
            link.close()
        await asyncio.gather(*(receiver.close() for receiver in receivers), *(link.wait_closed() for link in links))

    async def connect(
        self,
        device: DeviceId,
        certificate_pem: str,
        hosts: Iterable[str],
        port: int,
        deployment: DeploymentId,
        epoch: int,
        stage: int,
        timed: OnTimed | None = None,
    ) -> Link:
        """A link to a stage, over the first address that answers. LinkError or AuthenticationError if none does.

        `timed` hears how long some of its frames took.
        """
        websocket = await self._dial(device, certificate_pem, hosts, port, f"/data/{deployment}/{epoch}/{stage}")
        link = Link(websocket, device, deployment, epoch, stage, self._link_ended, timed, self._watch)
        self._links.add(link)
        return link

    async def echo(
        self, device: DeviceId, certificate_pem: str, hosts: Iterable[str], port: int, sizes: Sequence[int]
    ) -> list[Timed]:
        """How long a frame of each size takes to that device's stages. LinkError or AuthenticationError if it fails."""
        results: asyncio.Queue[Timed] = asyncio.Queue(MAX_TIMED)

        def timed(nbytes: int, seconds: float) -> None:
            if not results.full():
                results.put_nowait((nbytes, seconds))

        websocket = await self._dial(device, certificate_pem, hosts, port, ECHO_PATH)
        link = Link(websocket, device, NOBODY, 0, 0, lambda link, reason: self._links.discard(link), timed)
        self._links.add(link)
        try:
            return await timed_frames(link, results, sizes)
        finally:
            link.close()
            await link.wait_closed()

    async def _dial(
        self, device: DeviceId, certificate_pem: str, hosts: Iterable[str], port: int, path: str
    ) -> aiohttp.ClientWebSocketResponse:
        assert self._session is not None, "start() comes first"
        session = self._session

        async def attempt(host: str, delay_s: float) -> aiohttp.ClientWebSocketResponse:
            await asyncio.sleep(delay_s)
            return await dial(
                session,
                self._identity,
                device,
                certificate_pem,
                host,
                port,
                path,
                max_message_bytes=MAX_ANSWER_BYTES,
                autoping=False,  # PONGs time the frames
            )

        attempts = [
            asyncio.create_task(attempt(host, number * STAGGER_S), name=f"dial {device[:8]} at {host}")
            for number, host in enumerate(dict.fromkeys(hosts))
        ]
        if not attempts:
            raise LinkError(f"no address is known of {device[:8]}")
        return await _first(attempts)

    async def _accept(self, request: web.Request) -> web.StreamResponse:
        key = (request.match_info["deployment"], int(request.match_info["epoch"]), int(request.match_info["stage"]))
        ingress, deliver = self._expected.get(key, (None, None))
        if ingress is None or deliver is None:
            raise web.HTTPNotFound
        if request_device(request) != ingress.sender:
            raise web.HTTPForbidden
        receiver = Receiver(request, ingress, deliver, self._receiver_ended, self._watch)
        previous = self._receivers.get(key)
        self._receivers[key] = receiver
        if previous is not None:
            previous.replace()
        return await receiver.run()

    async def _accept_echo(self, request: web.Request) -> web.StreamResponse:
        """Any device of the household may time its link to here, over one connection at a time."""
        sender = request_device(request)
        receiver = Receiver(request, Ingress(sender, ECHO_LIMITS), self._on_echo, self._echo_ended)
        previous = self._echoes.get(sender)
        self._echoes[sender] = receiver
        if previous is not None:
            previous.replace()
        return await receiver.run()

    def _echo_ended(self, receiver: Receiver) -> None:
        if self._echoes.get(receiver.ingress.sender) is receiver:
            del self._echoes[receiver.ingress.sender]

    def _receiver_ended(self, receiver: Receiver) -> None:
        limits = receiver.ingress.limits
        key = (limits.deployment, limits.epoch, limits.stage)
        if self._receivers.get(key) is receiver:
            del self._receivers[key]
        if receiver.reason:
            self._on_lost(limits.deployment, receiver.ingress.sender, receiver.reason)

    def _link_ended(self, link: Link, reason: str) -> None:
        self._links.discard(link)
        if reason:
            self._on_lost(link.deployment, link.device, reason)


async def _first(
    attempts: list[asyncio.Task[aiohttp.ClientWebSocketResponse]],
) -> aiohttp.ClientWebSocketResponse:
    """The first that comes up; the others are called off. If none does, the first one's error."""
    pending = set(attempts)
    try:
        while pending:
            done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            for attempt in done:
                if attempt.exception() is None:
                    winner = attempt
                    attempts.remove(winner)
                    return winner.result()
        error = attempts[0].exception()
        assert isinstance(error, PeerLLMError | Exception)
        raise error
    finally:
        for attempt in attempts:
            attempt.cancel()
        for result in await asyncio.gather(*attempts, return_exceptions=True):
            if isinstance(result, aiohttp.ClientWebSocketResponse):
                await result.close()
