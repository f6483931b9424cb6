"""Torch shards with made-up weights in a model's true shapes, to time its layers without its files."""

from __future__ import annotations

import torch

from peerllm.engine.kernels.accelerator import CPU
from peerllm.engine.measure import outline
from peerllm.engine.measure.outline import CONTEXT, Mockup
from peerllm.engine.messages import TimeLayers
from peerllm.engine.model.assembly import finish, make_up, strip
from peerllm.engine.model.config import DTYPES, max_context, parse_config, text_config
from peerllm.engine.model.division import Division, divide
from peerllm.engine.model.keeping import keeping
from peerllm.engine.model.probing import probe
from peerllm.engine.model.torch_inspect import block_kinds, working
from peerllm.engine.model.torch_shard import TorchShard
from peerllm.errors import BadInputError, RefusedError


class TorchOutline(outline.Sizes):
    """The sizes of a model's layers from config.json alone, and shards of them; see outline.Sizes."""

    def __init__(self, message: TimeLayers, device: torch.device = CPU) -> None:
        if message.dtype not in DTYPES:
            raise BadInputError(f"unknown dtype {message.dtype!r}")
        self._message, self._device = message, device
        division = self._divide()
        self._states = probe(division, range(len(division.blocks)))
        language = text_config(division.model.config)
        context = max(2, min(CONTEXT, max_context(division.model.config)))
        kept = keeping(division, (), message.quantize)
        layer_bytes: dict[int, int] = {}
        for name, tensor in division.sizes.items():
            layer = division.layer_of(name)
            layer_bytes[layer] = layer_bytes.get(layer, 0) + kept.nbytes(name, tensor)
        super().__init__(
            firsts=outline.firsts(block_kinds(division)),
            head=division.head,
            vocabulary=language.vocab_size,
            context=context,
            limit_bytes=message.limit_bytes,
            working=working(division, message.quantize),
            layer_bytes=layer_bytes,
            kv_bytes={
                layer: sum(self._states[number].nbytes(context) for number in unit)
                for layer, unit in enumerate(division.units, 1)
            },
        )

    def build(self, mockup: Mockup) -> TorchShard:
        """Build the shard; RefusedError if an accelerator's memory does not suffice."""
        try:
            return self._build(mockup)
        except torch.OutOfMemoryError as error:
            raise RefusedError(f"{mockup.kind}: {error}") from error

    def _build(self, mockup: Mockup) -> TorchShard:
        division = self._divide()
        whole, kept = division.owner.config, keeping(division, (), self._message.quantize)
        layers = mockup.layer, mockup.layer
        entry = strip(division, *layers)
        weights = make_up(division, *layers, kept, self._device)
        finish(division, whole, self._device)
        states = {number: self._states[number] for number in division.numbers(*layers)}
        slots = mockup.sequences + 1
        return TorchShard(division, *layers, states, slots, mockup.context, weights, entry, None, self._device)

    def _divide(self) -> Division:
        return divide(parse_config(self._message.config), DTYPES[self._message.dtype])
