"""One tensor while it is fetched: the ranges that are missing, who sends them, and the file for them."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

from peerllm.daemon.control_messages import TensorDigest

STEAL_BYTES = 8 << 20  # what is left of a range is divided between two senders if it is at least this


class Piece:
    """A range of a tensor that one place sends: bytes `at` to `stop` are still missing."""

    __slots__ = ("at", "stop", "tensor")

    def __init__(self, tensor: WantedTensor, at: int, stop: int) -> None:
        self.tensor, self.at, self.stop = tensor, at, stop

    @property
    def left(self) -> int:
        return self.stop - self.at


class WantedTensor:
    """`sha256` is what its bytes must hash to. The manifest or `known`, what this device found before, make it `sure`;
    else it is what other devices say of a place on the hub, "" where they say nothing.

    A partial file keeps the tensor's beginning over a restart.
    """

    def __init__(self, digest: TensorDigest, key: str, folder: Path, known: str = "") -> None:
        self.digest, self.key, self._folder = digest, key, folder
        self.sha256 = digest.sha256 or known
        self.sure = bool(self.sha256)
        self.free: list[Piece] = []
        self.running: list[Piece] = []
        self.places: set[str] = set()  # devices that have it
        self.unfit: dict[str, str] = {}  # places that are not asked again, and why
        self.senders: set[str] = set()
        self.alone = False  # one place sends all of it, so that damage has one name
        self.finishing = False  # it is whole and being hashed

    @property
    def nbytes(self) -> int:
        return self.digest.nbytes

    @property
    def path(self) -> Path:
        """The partial file. Of a place on the hub, what devices send lies apart from what the hub alone has sent."""
        if self.digest.sha256 or not self.sha256:
            return self._folder / self.key
        return self._folder / hashlib.sha256(f"{self.key} {self.sha256}".encode()).hexdigest()

    def believe(self, sha256: str) -> int:
        """Go by what other devices say now, or by nothing (""); returns by how much what is here grew or shrank."""
        before = self.nbytes - sum(piece.left for piece in self.free)
        self.sha256 = sha256
        self.senders.clear()
        return self.resume() - before

    def resume(self) -> int:
        """Plan for what is missing; the bytes that are there from before."""
        have = 0
        with contextlib.suppress(FileNotFoundError):
            have = self.path.stat().st_size
        if have > self.nbytes:
            self.path.unlink()
            have = 0
        if have:
            self.senders.add("")  # an earlier fetch
        self.running.clear()
        self.free[:] = [Piece(self, have, self.nbytes)] if have < self.nbytes else []
        return have

    def restart(self) -> None:
        """Throw away what came; from now on one place sends all of it."""
        self.alone = True
        with contextlib.suppress(FileNotFoundError):
            self.path.unlink()
        self.senders.clear()
        self.resume()

    def take(self, place: str) -> Piece | None:
        """A range for that place to send."""
        if not self.free:
            return None
        piece = self.free.pop()
        self.running.append(piece)
        self.senders.add(place)
        return piece

    def steal(self, place: str) -> Piece | None:
        """The second half of what another place sends."""
        piece = max(self.running, key=lambda one: one.left, default=None)
        if piece is None or self.alone or piece.left < STEAL_BYTES:
            return None
        middle = piece.at + piece.left // 2
        stolen = Piece(self, middle, piece.stop)
        piece.stop = middle
        self.running.append(stolen)
        self.senders.add(place)
        return stolen

    def put_back(self, piece: Piece) -> None:
        """The place sends no more of this; another one may."""
        if piece in self.running:
            self.running.remove(piece)
            if piece.left > 0:
                self.free.append(piece)

    @property
    def whole(self) -> bool:
        return not self.free and not self.running

    def write(self, piece: Piece, data: bytes) -> None:
        """Write what came at its place in the file; in a thread."""
        descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            while data:
                written = os.pwrite(descriptor, data, piece.at)
                piece.at += written
                data = data[written:]
        finally:
            os.close(descriptor)

    def keep_beginning(self) -> None:
        """Cut the file where the first missing range begins, which is where the next fetch continues."""
        first = min((piece.at for piece in (*self.free, *self.running)), default=self.nbytes)
        with contextlib.suppress(FileNotFoundError):
            if self.path.stat().st_size > first:
                os.truncate(self.path, first)


def bytes_of(tensors: Iterable[WantedTensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)
