"""What only a deployment's source had: its options, the manifest of all tensors, and the model's small files.

A follower keeps it as a model directory without weights, whose tensors lie in its store, or are fetched by their hash.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from peerllm.chat_templates import abilities_in
from peerllm.codec import MAX_MESSAGE_BYTES, decode, encode
from peerllm.daemon.control_messages import HubFiles, TensorDigest
from peerllm.daemon.decide.assignments import MAX_TENSORS, check_tensor
from peerllm.daemon.decide.hub_places import check_hub, check_place
from peerllm.daemon.deployment.described_model import ModelAtHand
from peerllm.daemon.deployment.surroundings import Home
from peerllm.daemon.facade import RunOptions
from peerllm.daemon.threads import timed
from peerllm.daemon.weights.digests import Digests
from peerllm.daemon.weights.hub_outline import ABOUT
from peerllm.daemon.weights.weight_store import WeightStore
from peerllm.engine.messages import Inspected, TensorAt
from peerllm.errors import BadInputError, UnavailableError
from peerllm.regular_files import read_regular
from peerllm.saved_files import replace_file
from peerllm.stored_types import POOLING_FILE
from peerllm.types import DeploymentId

MANIFEST = "inheritance.json"
MODEL = "model"  # the directory beside it
FILES = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
    "chat_template.json", POOLING_FILE,
)  # fmt: skip
MAX_FILE_BYTES = 64 << 20
MOST_KEPT = 32  # inheritances; the longest unused go first


@dataclass(frozen=True, slots=True)
class Inheritance:
    """The tensors of `inspected` have no path, and where the hub has them their offset in one of its files."""

    options: RunOptions
    created: int
    form: str
    inspected: Inspected
    hashes: Mapping[str, str]  # SHA-256 by tensor name; "" for one on the hub that nobody has fetched
    hub: HubFiles | None = None
    hub_files: Mapping[str, int] = field(default_factory=dict)  # by tensor name, which of its files

    def digests(self, without: Collection[int] = ()) -> list[TensorDigest]:
        """Every tensor, but for those that only these layers need."""
        layers = [layer for number, layer in enumerate(self.inspected.tensors) if number not in without]
        found = {tensor.name: tensor for layer in layers for tensor in layer}
        return [
            TensorDigest(
                one.name,
                one.dtype,
                one.shape,
                one.nbytes,
                self.hashes.get(one.name, ""),
                self.hub_files.get(one.name, -1),
                one.offset if one.name in self.hub_files else 0,
            )
            for one in found.values()
        ]

    def check(self) -> None:
        """BadInputError unless what another device left makes sense."""
        if sum(map(len, self.inspected.tensors)) > MAX_TENSORS:
            raise BadInputError("it names too many tensors")
        if len(self.inspected.tensors) != len(self.inspected.profile.layers):
            raise BadInputError("its tensors are of other layers than the model's")
        check_hub(self.hub)
        for digest in self.digests():
            check_tensor(digest, own=False)
            check_place(self.hub, digest)


@dataclass(frozen=True, slots=True)
class InheritedModel:
    """An inheritance that is ready to be served from."""

    inheritance: Inheritance
    at_hand: ModelAtHand


async def leave(
    home: Home, digests: Digests, left: Path, inheritance: Inheritance, model_dir: Path, busy: Callable[[float], None]
) -> tuple[TensorDigest, ...]:
    """The files that a follower fetches; hashed and offered from now on. `inheritance` has no hashes yet.

    `busy` hears how many seconds a processor worked on it.
    """
    tensors = list({one.name: one for layer in inheritance.inspected.tensors for one in layer}.values())
    hashes = await home.hashes(tensors, lambda _: None)
    hub = await home.hub_places(tensors)
    bare = tuple(tuple(replace(one, path="") for one in layer) for layer in inheritance.inspected.tensors)
    whole = replace(
        inheritance,
        inspected=replace(inheritance.inspected, tensors=bare),
        hashes=hashes,
        hub=hub.origin if hub is not None else None,
        hub_files={one.name: hub.files[one.path] for one in tensors} if hub is not None else {},
    )
    data, busy_s = await timed(partial(encode, whole, Inheritance))
    busy(busy_s)
    if len(data) > MAX_MESSAGE_BYTES:
        raise BadInputError(
            f"its manifest has {len(data)} bytes; no device can follow with more than {MAX_MESSAGE_BYTES}"
        )
    manifest = left / MANIFEST
    await asyncio.to_thread(_write, manifest, data)
    files = [TensorAt(MANIFEST, "U8", (len(data),), str(manifest), 0, len(data))]
    for name in FILES:
        path = (model_dir / name).resolve()
        if path.is_file() and 0 < (nbytes := path.stat().st_size) <= MAX_FILE_BYTES:
            files.append(TensorAt(name, "U8", (nbytes,), str(path), 0, nbytes))
    found = await digests.of(files, lambda *_: None)
    return tuple(
        TensorDigest(one.name, one.dtype, one.shape, one.nbytes, found[one.path, one.offset, one.nbytes])
        for one in files
    )


def _write(manifest: Path, data: bytes) -> None:
    """Unless the same is there: its hash is known then."""
    try:
        if read_regular(manifest, MAX_MESSAGE_BYTES) == data:
            return
    except OSError:
        pass
    manifest.parent.mkdir(parents=True, exist_ok=True)
    replace_file(manifest, data)
    tidy(manifest.parent.parent, manifest.parent)


def tidy(root: Path, new: Path, used: Collection[DeploymentId] = ()) -> None:
    """Remove the folders that were written longest ago, beyond MOST_KEPT and those of deployments in use."""
    places = sorted(root.glob("[!.]*"), key=lambda place: place.stat().st_mtime)
    others = [place for place in places if place != new and place.name not in used]
    for place in others[: max(0, len(others) + 1 - MOST_KEPT)]:
        shutil.rmtree(place, ignore_errors=True)


def check_files(files: Iterable[TensorDigest]) -> list[TensorDigest]:
    """BadInputError unless a coordinator names files that are inherited, of bounded size."""
    files = list(files)
    names = [one.name for one in files]
    if MANIFEST not in names or len(set(names)) != len(names) or not set(names) <= {MANIFEST, *FILES}:
        raise BadInputError("what is left to this device has other files than those that are inherited")
    for one in files:
        check_tensor(one, own=False)
        if one.nbytes > MAX_FILE_BYTES:
            raise BadInputError(f"{one.name} has {one.nbytes} bytes; at most {MAX_FILE_BYTES} are inherited")
    return files


class InheritedModels:
    """The inheritances on this disk. `root` is a folder of the outlines, so that tensors on the hub are found."""

    def __init__(self, root: Path, store: WeightStore) -> None:
        self._root, self._store = root, store

    def adopt(
        self, deployment: DeploymentId, files: Mapping[str, Path], used: Collection[DeploymentId] = ()
    ) -> InheritedModel:
        """Make a model directory of files that were fetched; BadInputError, OSError. `used` deployments keep theirs."""
        inheritance = self._read(files[MANIFEST])
        inheritance.check()
        place = self._root / deployment
        self._root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self._root, prefix=".new-") as scratch:
            made = Path(scratch) / "made"
            (made / MODEL).mkdir(parents=True)
            shutil.copyfile(files[MANIFEST], made / MANIFEST)
            for name, path in files.items():
                if name != MANIFEST:
                    (made / MODEL / name).parent.mkdir(exist_ok=True)
                    shutil.copyfile(path, made / MODEL / name)
            if (hub := inheritance.hub) is not None:
                about = {"model": hub.model, "commit": hub.commit, "files": list(hub.files)}
                (made / ABOUT).write_text(json.dumps(about), encoding="utf-8")
            shutil.rmtree(place, ignore_errors=True)
            made.rename(place)
        tidy(self._root, place, used)
        return self._model(inheritance, place)

    def load(self, deployment: DeploymentId) -> InheritedModel:
        """One that was adopted before; UnavailableError if it is not here any more."""
        place = self._root / deployment
        try:
            return self._model(self._read(place / MANIFEST), place)
        except (OSError, BadInputError) as error:
            raise UnavailableError(f"what was inherited for it cannot be read: {error}") from error

    def _model(self, inheritance: Inheritance, place: Path) -> InheritedModel:
        directory, hub = place / MODEL, inheritance.hub

        def at(tensor: TensorAt) -> TensorAt:
            if hub is not None:
                name = hub.files[inheritance.hub_files[tensor.name]].rpartition("/")[2]
                return replace(tensor, path=str(directory / name))
            return replace(tensor, path=str(self._store.path(inheritance.hashes[tensor.name])), offset=0)

        tensors = tuple(tuple(map(at, layer)) for layer in inheritance.inspected.tensors)
        inspected = replace(inheritance.inspected, tensors=tensors)
        return InheritedModel(inheritance, ModelAtHand(inspected, directory, inheritance.form, abilities_in(directory)))

    @staticmethod
    def _read(manifest: Path) -> Inheritance:
        found: Inheritance = decode(read_regular(manifest, MAX_MESSAGE_BYTES), Inheritance)
        return found
