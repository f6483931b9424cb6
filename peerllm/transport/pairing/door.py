"""The inviting side: a port that is open for two minutes, three tries or one success, whichever is first."""

from __future__ import annotations

import asyncio
import hmac
import socket
import ssl
from collections.abc import Callable, Iterable
from contextlib import suppress
from weakref import WeakValueDictionary

from peerllm.errors import LinkError, PairingError, PeerLLMError
from peerllm.transport.identity import Identity, certificate_device, verify
from peerllm.transport.listening.accepting import accept_all
from peerllm.transport.listening.waiting_connections import WaitingConnections, share_of
from peerllm.transport.pairing.code import door_name, make_code
from peerllm.transport.pairing.pairing_messages import (
    PAIRING_VERSION,
    Challenge,
    Confirm,
    Introduction,
    JoinRequest,
    PairingChannel,
    PairingDone,
    PairingRefused,
    Possession,
    Welcome,
)
from peerllm.transport.pairing.pake import Keys, Pake
from peerllm.transport.roster.entry import MAX_COUNTER, clean_name
from peerllm.transport.roster.roster import Roster
from peerllm.transport.tls.contexts import door_context
from peerllm.transport.tls.listen import listen
from peerllm.types import DeviceId

PAIRING_WINDOW_S = 120.0
TRIES = 3
ATTEMPT_TIMEOUT_S = 10.0  # one attempt at a time holds the door, and no longer
MAX_WAITING = 8  # connections, besides the one being served; one more, and the oldest of the address with most goes
REFUSE_TIMEOUT_S = 1.0  # what telling a refusal, or saying goodbye, may take
CLOSED = "the pairing window is closed; run peerllm invite again"


class PairingDoor:
    """Invites one device. `roster` is asked for the household's list at the moment of success, and changed.

    `on_paired` (the roster holds the newcomer by then) and `on_closed` (with the reason) run on the loop, the latter
    exactly once per `open`.
    """

    def __init__(
        self,
        identity: Identity,
        roster: Callable[[], Roster],
        name: str,
        hosts: Iterable[str],
        port: int,
        on_paired: Callable[[], None],
        on_closed: Callable[[str], None],
    ) -> None:
        self._identity = identity
        self._roster = roster
        self._name = clean_name(name)
        self._hosts = tuple(hosts)
        self._wanted_port = port
        self._on_paired = on_paired
        self._on_closed = on_closed
        self._sockets: list[socket.socket] = []
        self._accepting: list[asyncio.Task[None]] = []
        self._stopping: asyncio.Task[None] | None = None
        self._visits: set[asyncio.Task[None]] = set()
        self._waiting: WaitingConnections[asyncio.Task[None]] = WaitingConnections(MAX_WAITING)
        self._lines: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()  # of each address one waits ...
        self._turn = asyncio.Lock()  # ... for this
        self._expiry: asyncio.TimerHandle | None = None
        self._code = ""
        self._tries_left = 0
        self.port = 0  # the real one while open, also where 0 was asked for
        self.closed_reason = CLOSED

    @property
    def is_open(self) -> bool:
        return bool(self._code)

    @property
    def door(self) -> str:
        """The public part of the code, for the advertisement; empty while closed."""
        return door_name(self._code) if self._code else ""

    async def open(self) -> str:
        """Listen, and return the code to tell the other device's owner. BadInputError if the port is in use."""
        await self.close()
        self._sockets = await listen(self._hosts, self._wanted_port)
        self.port = int(self._sockets[0].getsockname()[1])
        self._code, self._tries_left, self.closed_reason = make_code(), TRIES, ""
        context = door_context(self._identity)

        def take(sock: socket.socket, host: str) -> None:
            self._take(sock, host, context)

        loop = asyncio.get_running_loop()
        accepting = [accept_all(sock, take, self._make_way) for sock in self._sockets]
        self._accepting = [loop.create_task(one, name="pairing door") for one in accepting]
        self._expiry = loop.call_later(PAIRING_WINDOW_S, self._shut, CLOSED)
        return self._code

    async def close(self) -> None:
        """Shut the door now, whatever the state; cuts an attempt that has not succeeded yet."""
        self._shut("the invitation was withdrawn; run peerllm invite again")
        visits = [visit for visit in self._visits if visit is not asyncio.current_task()]
        for visit in visits:
            visit.cancel()
        await asyncio.gather(*visits, return_exceptions=True)
        if self._stopping is not None:
            await self._stopping

    def _shut(self, reason: str) -> None:
        """No more visitors; those that wait are told."""
        if not self._code:
            return
        self._code, self.closed_reason = "", reason
        if self._expiry is not None:
            self._expiry.cancel()
        for sock in self._sockets:
            with suppress(OSError):  # not every system does this; there it is closed in a moment
                sock.shutdown(socket.SHUT_RDWR)
        self._stopping = asyncio.get_running_loop().create_task(self._stop_listening(), name="pairing door closing")
        self._on_closed(reason)

    async def _stop_listening(self) -> None:
        for task in self._accepting:
            task.cancel()
        await asyncio.gather(*self._accepting, return_exceptions=True)
        for sock in self._sockets:
            sock.close()

    def _take(self, sock: socket.socket, host: str, context: ssl.SSLContext) -> None:
        if not self._code:  # it came while the door was being shut
            sock.close()
            return
        visit = asyncio.get_running_loop().create_task(self._visit(sock, host, context), name="pairing visit")
        self._visits.add(visit)
        visit.add_done_callback(self._visits.discard)
        visit.add_done_callback(self._waiting.discard)
        visit.add_done_callback(lambda _: sock.close())
        if (crowded := self._waiting.add(visit, host)) is not None:
            crowded.cancel()

    def _make_way(self) -> None:
        if (visit := self._waiting.make_way()) is not None:
            visit.cancel()

    async def _visit(self, sock: socket.socket, host: str, context: ssl.SSLContext) -> None:
        try:
            reader, writer = await _secured(sock, context)
        except OSError:  # a TLS refusal, or its time is over
            return
        try:
            await self._serve(PairingChannel(reader, writer), host)
        finally:
            writer.close()
            try:
                async with asyncio.timeout(REFUSE_TIMEOUT_S):
                    await writer.wait_closed()
            except (TimeoutError, OSError):  # the other side does not say goodbye
                pass
            finally:
                writer.transport.abort()

    async def _serve(self, channel: PairingChannel, host: str) -> None:
        visit, line = asyncio.current_task(), self._lines.setdefault(share_of(host), asyncio.Lock())
        assert visit is not None
        try:
            async with asyncio.timeout(ATTEMPT_TIMEOUT_S):  # who says nothing has no turn
                hello, hello_bytes = await channel.receive(JoinRequest)
            async with line, self._turn:
                self._waiting.discard(visit)
                try:
                    async with asyncio.timeout(ATTEMPT_TIMEOUT_S):
                        await self._attempt(channel, hello, hello_bytes)
                finally:
                    if self._tries_left <= 0:
                        self._shut(f"{TRIES} tries are spent; run peerllm invite again")
        except TimeoutError:
            await self._refuse(channel, f"the pairing took longer than {ATTEMPT_TIMEOUT_S:g} s; try again")
        except PeerLLMError as error:
            await self._refuse(channel, str(error))

    async def _refuse(self, channel: PairingChannel, reason: str) -> None:
        with suppress(LinkError, TimeoutError):
            async with asyncio.timeout(REFUSE_TIMEOUT_S):
                await channel.send(PairingRefused(reason[:200]))

    async def _attempt(self, channel: PairingChannel, hello: JoinRequest, hello_bytes: bytes) -> None:
        if not self._code:
            raise PairingError(self.closed_reason)
        if hello.version != PAIRING_VERSION:
            raise PairingError(f"pairing version {hello.version} is not {PAIRING_VERSION}; update both devices")
        joiner = certificate_device(hello.certificate_pem)
        clean_name(hello.name)  # one that cannot be is refused here, before it costs a try
        if joiner == self._identity.device:
            raise PairingError("a device cannot be paired with itself")
        if not 0 <= hello.counter <= MAX_COUNTER // 2:
            raise PairingError("the joining device's list is damaged; run peerllm leave there first")
        pake = await asyncio.to_thread(Pake, self._code, self._identity.device, joiner, True)
        challenge_bytes = await channel.send(Challenge(PAIRING_VERSION, pake.share))
        keys = await asyncio.to_thread(pake.finish, hello.share, hello_bytes, challenge_bytes)
        confirm, _ = await channel.receive(Confirm)
        self._check_proof(confirm.proof, keys)
        await channel.send(Confirm(keys.inviter_proof))
        channel.authenticate(send_key=keys.inviter_mac, receive_key=keys.joiner_mac)
        await self._exchange(channel, hello, joiner, keys)

    def _check_proof(self, proof: str, keys: Keys) -> None:
        """Spends a try, right or wrong: from here on the other side may learn which it was."""
        if not self._code:  # shut while this attempt was on its way
            raise PairingError(self.closed_reason)
        self._tries_left -= 1
        if hmac.compare_digest(proof.encode(), keys.joiner_proof.encode()):
            return
        if self._tries_left <= 0:
            self._shut(f"the code was wrong {TRIES} times; run peerllm invite again")
            raise PairingError(self.closed_reason)
        left = f"{self._tries_left} {'try' if self._tries_left == 1 else 'tries'} left"
        raise PairingError(f"the code is wrong; {left}")

    async def _exchange(self, channel: PairingChannel, hello: JoinRequest, joiner: DeviceId, keys: Keys) -> None:
        possession, _ = await channel.receive(Possession)
        verify(hello.certificate_pem, possession.signature, b"joiner" + keys.transcript)
        roster = self._roster()
        entry = roster.introduce(self._identity, hello.certificate_pem, hello.name, above=hello.counter)
        entries = (*(known for known in roster.vouch(self._identity) if known.device != joiner), entry)
        signature = self._identity.sign(b"inviter" + keys.transcript)
        await channel.send(Welcome(self._name, signature, entries))
        introduction, _ = await channel.receive(Introduction)
        theirs = introduction.entry
        if (theirs.device, theirs.introducer, theirs.removed) != (self._identity.device, joiner, False):
            raise PairingError("the joining device did not introduce this one")
        roster.merge((entry, theirs))
        if not roster.is_member(joiner):
            raise PairingError("the household would not take the device in; remove it there first, then try again")
        self._shut("paired")
        self._on_paired()
        await channel.send(PairingDone(joiner))


async def _secured(sock: socket.socket, context: ssl.SSLContext) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """The connection once TLS is done, for which it has ATTEMPT_TIMEOUT_S; OSError."""
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader()
    protocol = asyncio.StreamReaderProtocol(reader)
    transport, _ = await loop.connect_accepted_socket(
        lambda: protocol, sock, ssl=context, ssl_handshake_timeout=ATTEMPT_TIMEOUT_S
    )
    return reader, asyncio.StreamWriter(transport, protocol, reader, loop)
