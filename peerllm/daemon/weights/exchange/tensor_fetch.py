"""Fetching tensors from every place that has them at once: other devices, and the hub for what no device has.

Each place has a few lanes. A lane takes the next tensor that its place has; where none is left, it takes over half of
what another lane has still to bring. So fast places bring more than slow ones, and what a place that dies had left is
brought by the others. Tensors that only the source has, or only the hub, and that several devices need, are brought
into the household by the one that the manifest names; the others wait for that device.

Of a tensor whose hash nobody here knows, devices that fetched it from the hub themselves say one; it counts for this
fetch alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing

from peerllm.daemon.weights.exchange.holders import MAX_KEYS, ROUTE, HolderTable, WeightPeers, look
from peerllm.daemon.weights.exchange.hub_ranges import HubRanges
from peerllm.daemon.weights.exchange.wanted_tensor import Piece, WantedTensor
from peerllm.errors import LinkError, ModelError, NotFoundError, UnavailableError
from peerllm.types import DeviceId

HUB = "hub"  # stands for it among the places, which are device ids
LANES = 4  # requests at once to one place
MAX_LANES = 16  # in all
MAX_CUTS = 4  # connections lost in a row, without one byte between them, before a place is left out ...
OUT_S = 5.0  # ... for so long
CUT_WAIT_S = 0.25  # before the first new try; doubles each time
LOOK_S, LEAST_LOOK_S = 2.0, 0.25  # between two looks at who has what, while something is waited for
MAX_ASKED = MAX_KEYS  # tensors of one look; the others' turn comes when these are here
PATIENCE_S = 30.0  # without a byte from anywhere, before a fetch fails
BEGIN_S, FETCHER_MOST_S = 10.0, 3600.0  # until another device that fetches a tensor for all has begun, and is done
WRITE_BYTES = 1 << 20  # gathered before it is written
RUN_BYTES = 64 << 20  # neighbouring tensors of a file that one request to the hub brings
MAX_GAP_BYTES = 4096  # between neighbours; such bytes are skipped

log = logging.getLogger(__name__)

Finish = Callable[[WantedTensor], Awaitable[bool]]  # hash, compare, put in place; False: the bytes are others


class TensorFetch:
    """`run` it once; `count` hears of bytes that came (or were thrown away)."""

    def __init__(
        self,
        me: DeviceId,
        source: DeviceId,
        tensors: Sequence[WantedTensor],
        peers: WeightPeers,
        hub: HubRanges | None,
        finish: Finish,
        count: Callable[[int], None],
        here: Callable[[WantedTensor], bool] = lambda tensor: False,
    ) -> None:
        """`here`: whether a tensor's bytes lie on this disk already, now that it is said what they hash to."""
        self._here = here
        self._me, self._source, self._peers, self._hub = me, source, peers, hub
        self._finish, self._count = finish, count
        mine_first = sorted(tensors, key=lambda one: one.digest.fetcher not in ("", me))
        self._open = {tensor.key: tensor for tensor in mine_first}
        self._asked: list[WantedTensor] = []  # in the last look
        self._queues: dict[str, deque[WantedTensor]] = {}
        self._lanes: dict[str, int] = {}
        self._out: dict[str, float] = {}  # places that failed, and when they are tried again
        self._stirred = asyncio.Event()
        self._seen = HolderTable()
        self._began = self._came = time.monotonic()
        self._reason = "no device of the household has them"

    async def run(self) -> None:
        """Returns when all are here. What came stays in the partial files, whatever ends it."""
        try:
            async with asyncio.TaskGroup() as group:
                while self._open:
                    self._stirred.clear()
                    await self._look(group)
                    self._begin_lanes(group)
                    self._check_hope()
                    await self._wait()
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None
        finally:
            for tensor in self._open.values():
                tensor.keep_beginning()

    # ---- who has what ------------------------------------------------------------------------------------------

    async def _look(self, group: asyncio.TaskGroup) -> None:
        self._asked = [tensor for tensor in self._open.values() if not tensor.finishing][:MAX_ASKED]
        self._seen = await look(self._peers, [tensor.key for tensor in self._asked])
        for tensor in self._asked:
            self._hear(tensor)
        self._asked = [tensor for tensor in self._asked if tensor.key in self._open]
        said = [tensor.sha256 for tensor in self._asked if tensor.sha256 not in ("", tensor.key)]
        by_hash = await look(self._peers, said) if said else HolderTable()  # who has it, though not from the hub
        for tensor in self._asked:
            if tensor.finishing or tensor.key not in self._open:
                continue
            told = self._seen.held.get(tensor.key, {}) | by_hash.held.get(tensor.sha256, {})
            tensor.places = {device for device, sha in told.items() if sha == tensor.sha256} - tensor.unfit.keys()
            if tensor.whole:  # an earlier fetch left all of it
                group.create_task(self._completed(tensor), name=f"check {tensor.digest.name}")
        self._out = {place: until for place, until in self._out.items() if until > time.monotonic()}
        self._queue()

    def _hear(self, tensor: WantedTensor) -> None:
        """Go by what devices say that fetched the tensor from the hub; where they differ, the hub decides."""
        if tensor.sure or tensor.running or tensor.finishing or tensor.key not in self._open:
            return
        told = self._seen.held.get(tensor.key, {})
        said = {sha for device, sha in told.items() if device not in tensor.unfit}
        sha256 = said.pop() if len(said) == 1 and tensor.nbytes else ""
        if sha256 != tensor.sha256:
            self._count(tensor.believe(sha256))
            if sha256 and self._here(tensor):
                self._count(sum(piece.left for piece in tensor.free))
                del self._open[tensor.key]

    def _queue(self) -> None:
        """For each place the tensors that it should bring: what few have first, in an order of each device's own."""
        self._queues = {}
        free = [tensor for tensor in self._asked if tensor.free]
        random.shuffle(free)  # two devices that need the same soon have different parts of it
        for tensor in sorted(free, key=lambda one: -len(one.places)):
            for place in self._allowed(tensor):
                self._queues.setdefault(place, deque()).append(tensor)  # taken from the right
        if HUB in self._queues:
            order = sorted(self._queues[HUB], key=lambda one: (one.digest.file, one.digest.offset), reverse=True)
            self._queues[HUB] = deque(order)

    def _allowed(self, tensor: WantedTensor) -> set[str]:
        others = tensor.places - {self._source} - self._out.keys()
        if others:
            return others
        if self._left_to_another(tensor):
            return set()
        if here := tensor.places - self._out.keys():
            return here
        on_hub = self._hub is not None and tensor.digest.file >= 0 and HUB not in tensor.unfit
        return {HUB} if on_hub and HUB not in self._out else set()

    def _left_to_another(self, tensor: WantedTensor) -> bool:
        """Whether the manifest names another device that fetches it for all, and that one does or may soon."""
        fetcher = tensor.digest.fetcher
        if fetcher in ("", self._me) or fetcher in tensor.unfit or fetcher not in self._peers.devices():
            return False
        if fetcher in tensor.places:
            return False
        waited = time.monotonic() - self._began
        return waited < BEGIN_S or (waited < FETCHER_MOST_S and tensor.key in self._seen.coming.get(fetcher, ()))

    def _check_hope(self) -> None:
        """Raise if what is missing can come from nowhere."""
        waiting = False
        for tensor in self._asked:
            if tensor.unfit and tensor.free and not tensor.running and not self._allowed(tensor):
                why = ", ".join(f"{self._named(place)} {why}" for place, why in sorted(tensor.unfit.items()))
                raise ModelError(f"tensor {tensor.digest.name} cannot be had: {why}; check the model's files there")
            waiting = waiting or tensor.finishing or self._left_to_another(tensor)
        if not waiting and time.monotonic() - self._came > PATIENCE_S:
            raise UnavailableError(f"weights cannot be fetched: {self._reason}")

    async def _wait(self) -> None:
        """Until something happens that another look is worth."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LOOK_S if self._open else 0.0):
                await self._stirred.wait()
        if self._open:
            await asyncio.sleep(LEAST_LOOK_S)

    # ---- the lanes ---------------------------------------------------------------------------------------------

    def _begin_lanes(self, group: asyncio.TaskGroup) -> None:
        for place in sorted(self._queues, key=lambda one: (one == HUB, one == self._source)):
            wanted = min(LANES, len(self._queues[place]))
            while self._lanes.get(place, 0) < wanted and sum(self._lanes.values()) < MAX_LANES:
                self._lanes[place] = self._lanes.get(place, 0) + 1
                group.create_task(self._lane(place), name=f"weights from {place[:8]}")

    async def _lane(self, place: str) -> None:
        cuts = 0
        try:
            while place not in self._out and (pieces := self._take(place)):
                asked, missing = list(pieces), sum(piece.left for piece in pieces)
                try:
                    await self._bring(place, pieces)
                except NotFoundError as error:
                    self._reason = str(error)
                    for piece in pieces:
                        piece.tensor.unfit[place] = "does not give it"
                except (LinkError, UnavailableError, TimeoutError) as error:
                    self._reason = str(error) or type(error).__name__
                    cuts = 0 if sum(piece.left for piece in pieces) < missing else cuts + 1
                else:
                    cuts = 0
                finally:
                    for piece in asked:
                        piece.tensor.put_back(piece)
                queue = self._queues.setdefault(place, deque())
                queue.extend(piece.tensor for piece in reversed(pieces) if piece.tensor.free)
                if cuts >= MAX_CUTS:
                    log.warning("%s sends no weights: %s", self._named(place), self._reason)
                    self._out[place] = time.monotonic() + OUT_S
                elif cuts:
                    self._stirred.set()  # another place may have it
                    await asyncio.sleep(CUT_WAIT_S * 2**cuts)
        finally:
            self._lanes[place] -= 1
            self._stirred.set()

    def _named(self, place: str) -> str:
        return "the hub" if place == HUB else self._peers.name(place)

    def _take(self, place: str) -> list[Piece]:
        """What the place shall bring next: a tensor, from the hub several in a row; [] when nothing is left for it."""
        queue = self._queues.get(place, deque())
        while queue:
            tensor = queue.pop()
            if tensor.key not in self._open or place not in self._allowed(tensor):
                continue
            if (piece := tensor.take(place)) is not None:
                return [piece, *(self._neighbours(piece, queue) if place == HUB else ())]
        for tensor in self._open.values():
            stealing = tensor.running and place in tensor.places and place != self._source
            if stealing and (piece := tensor.steal(place)) is not None:
                return [piece]
        return []

    @staticmethod
    def _neighbours(first: Piece, queue: deque[WantedTensor]) -> list[Piece]:
        """Tensors behind the first one in the same file, as far as one request should go."""
        found: list[Piece] = []
        digest, total = first.tensor.digest, first.left
        while queue and first.stop == first.tensor.nbytes:
            following = queue[-1].digest
            gap = following.offset - digest.offset - digest.nbytes
            free = queue[-1].free
            if following.file != digest.file or not 0 <= gap <= MAX_GAP_BYTES or len(free) != 1 or free[0].at:
                break
            if total + gap + following.nbytes > RUN_BYTES:
                break
            piece = queue.pop().take(HUB)
            assert piece is not None
            found.append(piece)
            digest, total = following, total + gap + following.nbytes
        return found

    async def _bring(self, place: str, pieces: list[Piece]) -> None:
        """One request; `pieces` loses those that are complete, and keeps what is still missing."""
        blocks, at = self._blocks(place, pieces)
        gathered = bytearray()
        try:
            async with aclosing(blocks) as stream:  # type: ignore[type-var]
                async for block in stream:
                    self._came = time.monotonic()
                    gathered += block
                    while pieces and (len(gathered) >= WRITE_BYTES or self._ends(place, pieces[0], at, gathered)):
                        at = await self._write(place, pieces, at, gathered)
                    if not pieces:
                        return
        finally:
            while gathered and pieces:
                before = len(gathered)
                at = await self._write(place, pieces, at, gathered)
                if len(gathered) == before:
                    break

    def _blocks(self, place: str, pieces: list[Piece]) -> tuple[AsyncIterator[bytes], int]:
        """The bytes, and where the first one lies: in the tensor, of the hub's in the file."""
        first, last = pieces[0], pieces[-1]
        if place != HUB:
            path = ROUTE.format(sha256=first.tensor.sha256)
            return self._peers.get(place, path, first.at, first.left), first.at
        assert self._hub is not None
        start = first.tensor.digest.offset + first.at
        length = last.tensor.digest.offset + last.stop - start
        return self._hub.get(first.tensor.digest.file, start, length), start

    @staticmethod
    def _place_of(place: str, piece: Piece) -> int:
        return piece.at + (piece.tensor.digest.offset if place == HUB else 0)

    def _ends(self, place: str, piece: Piece, at: int, gathered: bytearray) -> bool:
        return at + len(gathered) >= self._place_of(place, piece) + piece.left

    async def _write(self, place: str, pieces: list[Piece], at: int, gathered: bytearray) -> int:
        """Write the beginning of what was gathered to the first piece; returns where the rest lies."""
        piece = pieces[0]
        skipped = max(0, self._place_of(place, piece) - at)  # between neighbours in a file
        if skipped:
            del gathered[:skipped]
            return at + skipped
        data = bytes(gathered[: piece.left])
        del gathered[: len(data)]
        if data:
            await asyncio.shield(asyncio.to_thread(piece.tensor.write, piece, data))
            self._count(len(data))
        if piece.left <= 0:
            pieces.pop(0)
            piece.tensor.put_back(piece)
            if piece.tensor.whole:
                await self._completed(piece.tensor)
        return at + len(data)

    async def _completed(self, tensor: WantedTensor) -> None:
        """All bytes are there: keep the tensor if they are the right ones, else find out who sends others."""
        tensor.finishing = True  # until it is in its place or begun anew: a look between would check it twice
        try:
            right = await self._finish(tensor)
            if not right:
                self._count(-tensor.nbytes)
                self._blame(tensor)
                await asyncio.to_thread(tensor.restart)
        finally:
            tensor.finishing = False
        if right:
            self._open.pop(tensor.key, None)
        if not right or not self._open:
            self._stirred.set()

    def _blame(self, tensor: WantedTensor) -> None:
        """Of bytes that only one place sent, it is known who sends others."""
        if len(tensor.senders) != 1 or "" in tensor.senders:
            return
        (place,) = tensor.senders
        tensor.unfit[place] = "sent other bytes than the manifest says"
        log.warning("%s sent other bytes for tensor %s than the manifest says; it is not asked for it again",
                    self._named(place), tensor.digest.name)  # fmt: skip
