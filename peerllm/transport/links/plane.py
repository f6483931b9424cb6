"""One device's data plane: links it accepts for its stages, links it dials to the next ones."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from http import HTTPStatus
from typing import TypeVar

from peerllm.errors import BadInputError
from peerllm.transport.identity import Identity, certificate_device
from peerllm.transport.links.acceptor import Acceptor, Admit
from peerllm.transport.links.connection import Connection
from peerllm.transport.links.dialling import dial_link
from peerllm.transport.links.echo import ECHO_LIMITS, ECHO_PATH, NOBODY, Timed, timed_frames
from peerllm.transport.links.lead import Lead, readers
from peerllm.transport.links.link import Link
from peerllm.transport.links.receiver import Deliver, Ingress, Receiver
from peerllm.transport.links.timing import OnTimed
from peerllm.transport.links.upgrade import DeclinedError
from peerllm.transport.links.watch import NOBODY_WATCHES, Watch
from peerllm.types import DeploymentId, DeviceId

PATH = re.compile(r"/data/([0-9a-f]{32})/([0-9]{1,10})/([0-9]{1,5})")  # deployment, epoch, stage
MAX_INGRESSES = 1024  # links this device expects at once; a plan has no more stages
MAX_TIMED = 64  # timings of one echo that wait to be read

OnLost = Callable[[DeploymentId, DeviceId, str], None]
Key = tuple[DeploymentId, int, int]  # deployment, epoch, stage
K = TypeVar("K")


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
        self._open: set[Receiver] = set()  # also those that only say goodbye
        self._links: set[Link] = set()
        self._readers = readers(asyncio.get_running_loop())
        self._acceptor = Acceptor(identity, hosts, port, self._route)

    @property
    def port(self) -> int:
        """The real port, also where 0 was asked for."""
        return self._acceptor.port

    @property
    def lead(self) -> Lead | None:
        """With what a thread may read the links that come in, where the system has it."""
        return self._readers if isinstance(self._readers, Lead) else None

    async def start(self) -> None:
        """Listen; nobody is trusted yet. BadInputError if the port is in use."""
        await self._acceptor.start()

    async def close(self) -> None:
        """Cut every link, tell of none, stop listening."""
        self._on_lost = lambda deployment, device, reason: None
        self._expected.clear()
        links = list(self._links)
        for link in links:
            link.abort("the data plane is closed")
        receivers = list(self._open)
        for receiver in receivers:
            receiver.abort("the data plane is closed")
        await self._acceptor.close()
        await asyncio.gather(*(link.wait_closed() for link in links), *(one.wait_closed() for one in receivers))
        self._readers.close()

    async def set_trusted(self, pems: Iterable[str]) -> None:
        """Exactly these devices' certificates (PEM) are trusted; links with others are cut and reported lost."""
        trusted = {certificate_device(pem): pem for pem in pems}
        for receiver in list(self._open):
            if receiver.ingress.sender not in trusted:
                receiver.abort("the device was removed from the household")
        for link in list(self._links):
            if link.device not in trusted:
                link.abort("the device was removed from the household")
        self._acceptor.set_trusted(trusted.values())

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
        path = f"/data/{deployment}/{epoch}/{stage}"
        connection = await dial_link(self._identity, device, certificate_pem, hosts, port, path)
        link = Link(connection, deployment, epoch, stage, self._link_ended, timed, self._watch)
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

        connection = await dial_link(self._identity, device, certificate_pem, hosts, port, ECHO_PATH)
        link = Link(connection, NOBODY, 0, 0, lambda link, reason: self._links.discard(link), timed)
        self._links.add(link)
        try:
            return await timed_frames(link, results, sizes)
        finally:
            link.close()
            await link.wait_closed()

    def _route(self, device: DeviceId, path: str) -> Admit:
        """What is to become of a connection for `path`."""
        if path == ECHO_PATH:
            return self._admit_echo
        found = PATH.fullmatch(path)
        key = None if found is None else (found[1], int(found[2]), int(found[3]))
        if key is None or (expected := self._expected.get(key)) is None:
            raise DeclinedError(HTTPStatus.NOT_FOUND)
        if device != expected[0].sender:
            raise DeclinedError(HTTPStatus.FORBIDDEN)
        return partial(self._admit, key, *expected)

    def _admit(self, key: Key, ingress: Ingress, deliver: Deliver, connection: Connection) -> None:
        receiver = Receiver(connection, ingress, deliver, self._receiver_ended, self._readers, self._watch)
        self._serve(receiver, self._receivers, key)

    def _admit_echo(self, connection: Connection) -> None:
        """Any device of the household may time its link to here, over one connection at a time."""
        ingress = Ingress(connection.device, ECHO_LIMITS)
        receiver = Receiver(connection, ingress, self._on_echo, self._echo_ended, self._readers)
        self._serve(receiver, self._echoes, connection.device)

    def _serve(self, receiver: Receiver, among: dict[K, Receiver], key: K) -> None:
        """It takes the place of the one before."""
        self._open.add(receiver)
        receiver.when_closed(self._open.discard)
        previous, among[key] = among.get(key), receiver
        if previous is not None:
            previous.replace()

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
