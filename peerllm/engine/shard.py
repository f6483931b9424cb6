"""A shard: layers first..last of a model, loaded, with room for its sequences; a smaller model of the same kind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from peerllm.engine.absent import Absent
from peerllm.engine.assembly import fill, finish, strip
from peerllm.engine.base import Progress, Segment
from peerllm.engine.cache import Slots, kv_bytes
from peerllm.engine.config import DTYPES, parse_config, text_config
from peerllm.engine.division import Division, divide
from peerllm.engine.dryrun import accepted
from peerllm.engine.messages import LoadStage
from peerllm.engine.probing import probe
from peerllm.engine.states import LayerState
from peerllm.errors import BadInputError, EngineError, RefusedError


class TorchShard:
    """See base.Shard. Each segment is run by itself over its slot's cache: exact, whatever else is in the row."""

    def __init__(
        self,
        division: Division,
        spec: LoadStage,
        states: Mapping[int, LayerState],
        weight_bytes: int,
        entry: nn.Module,
    ) -> None:
        from transformers.cache_utils import get_layer_types_and_kwargs

        self.first_layer, self.last_layer, self.weight_bytes = spec.first_layer, spec.last_layer, weight_bytes
        text = text_config(division.model.config)
        self.hidden_size: int = text.hidden_size
        self.vocabulary: int = text.vocab_size
        self.weights: Mapping[int, int] = {p.data_ptr(): p.nbytes for p in division.model.parameters() if not p.is_meta}
        self.context = spec.context
        self.dtype = division.dtype
        self._division: Any = division
        self._model: Any = division.model
        self._base: Any = division.model.base_model
        self._has_embedding, self._has_head = spec.first_layer == 0, spec.last_layer == division.head
        kinds, arguments = get_layer_types_and_kwargs(text)
        self._slots = Slots(kinds, arguments, states, spec.slots, spec.context)
        self.kv_bytes = self._slots.kv_bytes
        self._entering: torch.Tensor | None = None
        if not self._has_embedding:
            self._enter_at(entry)
        matrix = self._model.get_output_embeddings() if self._has_head else None
        if isinstance(matrix, nn.Linear):
            matrix.register_forward_pre_hook(_with_plain_strides)
        self._dynamic = [m for m in self._model.modules() if getattr(m, "rope_type", "") == "dynamic"]

    @property
    def blocks(self) -> tuple[nn.Module, ...]:
        """The blocks it runs."""
        return tuple(getattr(self._division.owner, self._division.attribute))

    @property
    def final_norms(self) -> tuple[nn.Module, ...]:
        """What runs after the last block and is no output matrix."""
        modules = [self._model.get_submodule(name) for name in self._division.after]
        return tuple(module for module in modules if not isinstance(module, nn.Linear | nn.Dropout | Absent))

    def _enter_at(self, module: nn.Module) -> None:
        """Hidden states from the stage before take the place of what `module`, the first of this shard, is given."""

        def swap(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if args:
                return (self._entering, *args[1:]), kwargs
            name = next(iter(kwargs))
            return args, {**kwargs, name: self._entering}

        module.register_forward_pre_hook(swap, with_kwargs=True)

    @torch.inference_mode()
    def forward(self, inputs: torch.Tensor, segments: Sequence[Segment]) -> torch.Tensor:
        """Token ids int64 [n] or hidden states [n, hidden] in; hidden states, or float32 logits per sample, out."""
        if self._model is None:
            raise EngineError("the shard is closed")
        total = sum(segment.length for segment in segments)
        if inputs.shape[0] != total or any(segment.length < 1 for segment in segments):
            raise BadInputError(f"a row of {inputs.shape[0]} tokens for segments of {total}")
        outputs, start = [], 0
        for segment in segments:
            result = self._segment(inputs[start : start + segment.length], segment)
            start += segment.length
            if result is not None:
                outputs.append(result)
        if outputs:
            return torch.cat(outputs)
        width = self.vocabulary if self._has_head else self.hidden_size
        return torch.empty(0, width, dtype=torch.float32 if self._has_head else self.dtype)

    def _segment(self, rows: torch.Tensor, segment: Segment) -> torch.Tensor | None:
        end = segment.position + segment.length
        if not 0 <= segment.slot < len(self._slots.caches) or segment.position < 0 or end > self.context:
            raise BadInputError(f"slot {segment.slot}, positions {segment.position}..{end - 1}: no such room")
        cache = self._slots.caches[segment.slot]
        cache.seek(segment.position)
        for module in self._dynamic:  # its scale follows the longest sequence seen; each is to have its own
            module.max_seq_len_cached = module.original_max_seq_len + 1
        if self._has_head and not segment.sample and self.first_layer == self.last_layer:
            cache.advance(segment.length)
            return None
        result = self._run(rows, segment, cache)
        cache.advance(segment.length)
        return result

    def positions(self, segment: Segment) -> torch.Tensor:
        """int64 [length]: where the segment's tokens stand in their sequence."""
        return torch.arange(segment.position, segment.position + segment.length)

    def _run(self, rows: torch.Tensor, segment: Segment, cache: Any) -> torch.Tensor | None:
        """One segment through the model; rows [n] or [n, hidden] in, [n, hidden], [1, vocabulary] or nothing out."""
        wants_logits = self._has_head and segment.sample
        model = self._model if wants_logits else self._base
        given: dict[str, Any] = {
            "position_ids": self.positions(segment).unsqueeze(0),
            "past_key_values": cache,
            "use_cache": True,
        }
        if self._has_embedding:
            if rows.dtype != torch.int64 or int(rows.min()) < 0 or int(rows.max()) >= self.vocabulary:
                raise BadInputError(f"token ids must be int64 from 0 to {self.vocabulary - 1}")
            given["input_ids"] = rows.unsqueeze(0)
        else:
            if rows.dim() != 2 or rows.shape[1] != self.hidden_size:
                raise BadInputError(f"hidden states must be [n, {self.hidden_size}], not {list(rows.shape)}")
            given["inputs_embeds"] = self._entering = rows.to(self.dtype).unsqueeze(0)
        if wants_logits:
            given["logits_to_keep"] = 1
        getattr(self._division.owner, self._division.attribute).begun = False
        try:
            output = model(**accepted(model, **given))
        finally:
            self._entering = None
        if wants_logits:
            logits: torch.Tensor = output.logits[0, -1:]
            return logits.float()
        hidden: torch.Tensor = output[0][0]
        return None if self._has_head else hidden

    def release(self, slot: int) -> None:
        """Forget the slot's sequence."""
        with torch.inference_mode():
            self._slots.caches[slot].seek(0)

    def close(self) -> None:
        """Free weights and KV; may be called twice."""
        self._model = self._base = self._division = None
        self._slots.caches.clear()


def _with_plain_strides(_: nn.Module, args: tuple[Any, ...]) -> Any:
    """The last row cut out of many keeps their stride, for which torch copies the whole output matrix (seconds)."""
    hidden = args[0]
    return (hidden.reshape(-1, hidden.shape[-1]).view(hidden.shape), *args[1:])


def load_shard(spec: LoadStage, progress: Progress = lambda done, total: None) -> TorchShard:
    """Layers spec.first_layer..last_layer from the files that spec.tensors names; ModelError if they do not fit."""
    if spec.dtype not in DTYPES:
        raise BadInputError(f"unknown dtype {spec.dtype!r}")
    division = divide(parse_config(spec.config), DTYPES[spec.dtype])
    first, last = spec.first_layer, spec.last_layer
    if not 0 <= first <= last <= division.head:
        raise BadInputError(f"layers {first}..{last} of a model whose last is {division.head}")
    numbers = range(max(first, 1) - 1, min(last, division.head - 1))
    states, whole = probe(division, numbers), division.owner.config
    needed = kv_bytes(states, spec.slots, spec.context)
    if spec.kv_limit_bytes is not None and needed > spec.kv_limit_bytes:
        raise RefusedError(f"KV of {needed} bytes is asked for, {spec.kv_limit_bytes} are promised")
    entry = strip(division, first, last, numbers)
    weight_bytes = fill(division, first, last, spec.tensors, progress)
    finish(division, whole)
    return TorchShard(division, spec, states, weight_bytes, entry)
