"""A deployment's model: what is known of it before its weights are here, and where they lie once they are."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

from peerllm.chat_templates import abilities_in
from peerllm.daemon.decide.demand import check_options
from peerllm.daemon.deployment.model_files import dtype_of
from peerllm.daemon.deployment.negotiation import Surroundings
from peerllm.daemon.facade import RunOptions, short_name
from peerllm.daemon.weights.known_models import known_as
from peerllm.engine.messages import Inspected, TensorAt
from peerllm.planner.cost.byte_sizes import human_bytes

Say = Callable[[str, float | None], None]  # what is being done, and how much of it


@dataclass(frozen=True, slots=True)
class ModelAtHand:
    """A model that need not be looked for; `form` as in ModelOnDisk."""

    inspected: Inspected
    directory: Path
    form: str
    abilities: tuple[str, ...] = ()  # see chat_templates


class DescribedModel:
    """`inspected` and `model_dir` are None until they are found."""

    def __init__(self, options: RunOptions, around: Surroundings, say: Say, at_hand: ModelAtHand | None = None) -> None:
        self.inspected = at_hand.inspected if at_hand is not None else None
        self.model_dir = at_hand.directory if at_hand is not None else None
        self.form = at_hand.form if at_hand is not None else ""  # the quantisation of its GGUF files, see ModelOnDisk
        self.abilities = at_hand.abilities if at_hand is not None else ()  # see chat_templates
        self.parameters = 0 if self.inspected is None else _parameters(options.model, self.inspected)  # about
        self._missing_bytes = 0  # of its files, on this disk
        self._options, self._around, self._say = options, around, say

    async def describe(self) -> Inspected:
        """Find out what the model holds, once; what the hub tells of it suffices."""
        if self.inspected is None:
            model = self._options.model
            self._say(f"looking for {model}", None)
            async with self._around.looked_up(model, self._say) as found:
                self.inspected = await self._read(found.directory)
            self._missing_bytes, self.form = found.missing_bytes, found.form
            if not found.missing_bytes:
                self.model_dir = found.directory
        return self.inspected

    async def fetch(self) -> None:
        """Download the weights, for which there is a plan."""
        model, size = self._options.model, human_bytes(self._missing_bytes)

        def told(share: float) -> None:
            self._say(f"downloading {model}, {size}: {share:.0%}", share)

        told(0.0)
        directory = await self._around.resolve(model, told, self._missing_bytes)
        self.inspected = await self._read(directory)
        self.model_dir = directory

    def own_tensors(self) -> dict[str, TensorAt]:
        """Where the tensors lie on this device."""
        layers = self.inspected.tensors if self.inspected is not None else ()
        return {tensor.name: tensor for layer in layers for tensor in layer}

    async def _read(self, directory: Path) -> Inspected:
        options = self._options
        self._say(f"reading {options.model}", None)
        inspected = await self._around.inspect(directory, dtype_of(options.model, options.dtype), options.quantize)
        check_options(options, inspected)
        self.abilities = await asyncio.to_thread(abilities_in, directory)
        self.parameters = _parameters(options.model, inspected)
        named = replace(inspected.profile, name=short_name(options.model))  # not its directory, which may be a hash
        return replace(inspected, profile=named)


def _parameters(model: str, inspected: Inspected) -> int:
    """As its makers count them, or else the numbers in its tensors."""
    if (one := known_as(model)) is not None:
        return one.millions * 10**6
    tensors = {tensor.name: tensor for layer in inspected.tensors for tensor in layer}
    return sum(prod(tensor.shape) for tensor in tensors.values())
