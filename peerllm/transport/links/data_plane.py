"""One device's data plane: links it accepts for its stages, links it dials to the next ones."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from http import HTTPStatus
from typing import Any

from peerllm.errors import BadInputError
from peerllm.transport.identity import Identity, certificate_device
from peerllm.transport.links.acceptor import Acceptor, Admit
from peerllm.transport.links.channels import ECHO, Deliver, Inlet, LinkChannel
from peerllm.transport.links.connection import Connection
from peerllm.transport.links.dialling import dial_link
from peerllm.transport.links.echo import ECHO_LIMITS, ECHO_PATH, NOBODY, FrameTime, timed_frames
from peerllm.transport.links.frame_timer import OnTimed
from peerllm.transport.links.link import Link
from peerllm.transport.links.observer import NO_OBSERVER, LinkObserver
from peerllm.transport.links.poller import Poller, shared_poller
from peerllm.transport.websocket.upgrade import DeclinedError
from peerllm.types import DeploymentId, DeviceId

PATH = re.compile(r"/(data|state)/([0-9a-f]{32})/([0-9]{1,10})/([0-9]{1,5})")  # deployment, epoch, stage
MAX_EXPECTED = 16_384  # links this device expects at once; each of 64 coordinators has its share, of 256
MAX_TIMED = 64  # timings of one echo that wait to be read

OnLost = Callable[[Link], None]
OnAccepted = Callable[[Link], None]
# Deployment, epoch, stage; and the sender, if it brings slots' state, which several may.
Key = tuple[DeploymentId, int, int] | tuple[DeploymentId, int, int, DeviceId]
ECHO_KEY: Key = (NOBODY, 0, 0)


class DataPlane:
    """Serves and dials `/data/{deployment}/{epoch}/{stage}`. All methods are for the loop it was started on.

    `on_lost` (on the loop) tells of each link that broke, either way, and why (`lost`); of none that either side ended
    on purpose. What is expected has one connection: a new one of the same sender takes the old one's place.
    `/state/...` brings a stage sequences' state, from several senders; nobody is told of how those links end.
    `on_echo` gets the frames with which others time their links to here (`echo`); `observer` hears of all others.
    """

    def __init__(
        self,
        identity: Identity,
        hosts: Iterable[str],
        port: int,
        on_lost: OnLost | None = None,
        on_echo: Deliver | None = None,
        observer: LinkObserver = NO_OBSERVER,
    ) -> None:
        self._identity = identity
        self._observer = observer
        self._on_lost = on_lost or (lambda link: None)
        self._on_echo = on_echo or (lambda delivery: delivery.taken())
        self._expected: dict[Key, tuple[DeviceId, Sequence[Inlet], OnAccepted]] = {}
        self._accepted: dict[Key | DeviceId, Link] = {}  # by what they were expected for; echoes by device
        self._links: set[Link] = set()  # both ways; also those that only say goodbye
        loop = asyncio.get_running_loop()
        self.poller = shared_poller(loop)  # with what a thread may read the links that take frames in
        self._loop_poller = Poller(loop)
        self._poller = self.poller or self._loop_poller
        self._acceptor = Acceptor(identity, hosts, port, self._route)

    @property
    def port(self) -> int:
        """The real port, also where 0 was asked for."""
        return self._acceptor.port

    async def start(self) -> None:
        """Listen; nobody is trusted yet. BadInputError if the port is in use."""
        await self._acceptor.start()

    async def close(self) -> None:
        """End every link, tell of none, stop listening."""
        self._on_lost = lambda link: None
        self._expected.clear()
        links = list(self._links)
        for link in links:
            link.abort("the data plane is closed")
        await self._acceptor.close()
        await asyncio.gather(*(link.wait_closed() for link in links))
        if self.poller is not None:
            self.poller.close()

    async def set_trusted(self, pems: Iterable[str]) -> None:
        """Exactly these devices' certificates (PEM) are trusted; links with others are ended and reported lost."""
        trusted = {certificate_device(pem): pem for pem in pems}
        for link in self._links:
            if link.device not in trusted:
                link.abort("the device was removed from the household")
        self._acceptor.set_trusted(trusted)

    def expect(
        self, sender: DeviceId, *inlets: Inlet, carries: bool = False, accepted: OnAccepted | None = None
    ) -> None:
        """From now on `sender` may dial the link that the inlets' limits name, and its frames are taken in there.

        `carries`: it brings state, as other senders may. `accepted` gets each link that is dialled, to send on it, too.
        """
        limits = inlets[0].limits
        key: Key = (limits.deployment, limits.epoch, limits.stage)
        if carries:
            key = (*key, sender)
        if key not in self._expected and len(self._expected) >= MAX_EXPECTED:
            raise BadInputError(f"this device already expects {MAX_EXPECTED} links")
        self._expected[key] = (sender, inlets, accepted or (lambda link: None))

    async def forget(self, deployment: DeploymentId, epoch: int | None = None, only: bool = False) -> None:
        """End the links of a deployment, both ways; none is reported lost.

        `epoch`: those of epochs up to that one, or of that one alone.
        """

        def named(key_deployment: DeploymentId, key_epoch: int) -> bool:
            over = epoch is None or (key_epoch == epoch if only else key_epoch <= epoch)
            return key_deployment == deployment and over

        for key in [key for key in self._expected if named(*key[:2])]:
            del self._expected[key]
        links = [link for link in self._links if named(link.deployment, link.epoch)]
        for link in links:
            link.close("no longer expected")
        await asyncio.gather(*(link.wait_closed() for link in links))

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
        bounds: Mapping[LinkChannel, int] | None = None,
        inlets: Sequence[Inlet] = (),
        carries: bool = False,
    ) -> Link:
        """A link to a stage, over the first address that answers. LinkError or AuthenticationError if none does.

        `timed` hears how long some of its frames took; `bounds` replace the channels' own; `inlets` are what is taken
        in at this end. `carries`: it brings state.
        """
        path = f"/{'state' if carries else 'data'}/{deployment}/{epoch}/{stage}"
        connection = await dial_link(self._identity, device, certificate_pem, hosts, port, path)
        key: Key = (deployment, epoch, stage, self._identity.device) if carries else (deployment, epoch, stage)
        return self._dialled(connection, key, inlets=inlets, bounds=bounds, timed=timed, observer=self._observer)

    async def echo(
        self, device: DeviceId, certificate_pem: str, hosts: Iterable[str], port: int, sizes: Sequence[int]
    ) -> list[FrameTime]:
        """How long a frame of each size takes to that device's stages. LinkError or AuthenticationError if it fails."""
        results: asyncio.Queue[FrameTime] = asyncio.Queue(MAX_TIMED)

        def timed(nbytes: int, seconds: float) -> None:
            if not results.full():
                results.put_nowait((nbytes, seconds))

        connection = await dial_link(self._identity, device, certificate_pem, hosts, port, ECHO_PATH)
        link = self._dialled(connection, ECHO_KEY, timed=timed)
        try:
            return await timed_frames(link, results, sizes)
        finally:
            link.close()
            await link.wait_closed()

    def _route(self, device: DeviceId, path: str) -> Admit:
        """What is to become of a connection for `path`."""
        if path == ECHO_PATH:  # any device of the household may time its link to here, over one connection at a time
            return partial(self._accept, ECHO_KEY, (Inlet(ECHO, ECHO_LIMITS, self._on_echo),), NO_OBSERVER)
        found = PATH.fullmatch(path)
        if found is None:
            raise DeclinedError(HTTPStatus.NOT_FOUND)
        key: Key = found[2], int(found[3]), int(found[4])
        if found[1] == "state":
            key = (*key, device)
        if (expected := self._expected.get(key)) is None:
            raise DeclinedError(HTTPStatus.NOT_FOUND)
        sender, inlets, accepted = expected
        if device != sender:
            raise DeclinedError(HTTPStatus.FORBIDDEN)
        return partial(self._accept, key, inlets, self._observer, accepted=accepted)

    def _accept(
        self,
        key: Key,
        inlets: Sequence[Inlet],
        observer: LinkObserver,
        connection: Connection,
        accepted: OnAccepted = lambda link: None,
    ) -> None:
        """It takes the place of the one before."""
        place = connection.device if key == ECHO_KEY else key
        previous = self._accepted.get(place)

        def ended(link: Link) -> None:
            if self._accepted.get(place) is link:
                del self._accepted[place]
            if len(key) == len(ECHO_KEY):
                self._ended(link)

        poller = self._poller if len(key) == len(ECHO_KEY) else self._loop_poller
        link = Link(connection, *key[:3], ended, poller, dialled=False, inlets=inlets, observer=observer)
        self._accepted[place] = self._kept(link)
        if previous is not None:
            previous.replace()
        accepted(link)

    def _dialled(self, connection: Connection, key: Key, inlets: Sequence[Inlet] = (), **how: Any) -> Link:
        """Where no frames come back the loop reads: grants and PONGs must not wake who waits for frames."""
        poller = self._poller if inlets else self._loop_poller
        ended = self._ended if len(key) == len(ECHO_KEY) else lambda link: None
        return self._kept(Link(connection, *key[:3], ended, poller, dialled=True, inlets=inlets, **how))

    def _kept(self, link: Link) -> Link:
        self._links.add(link)
        link.task.add_done_callback(lambda _: self._links.discard(link))
        return link

    def _ended(self, link: Link) -> None:
        if link.lost and link.deployment != NOBODY:
            self._on_lost(link)
