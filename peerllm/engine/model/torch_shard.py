"""A shard in torch: layers first..last of a model as a smaller model of the same kind, with room for sequences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from transformers.cache_utils import get_layer_types_and_kwargs

from peerllm.engine.base import Progress, Reach, StateForms, StatePart
from peerllm.engine.kernels.accelerator import CPU, turn
from peerllm.engine.messages import LoadStage
from peerllm.engine.model.assembly import fill, finish, plan, strip
from peerllm.engine.model.blocks import accepted
from peerllm.engine.model.config import DTYPES, parse_config, text_config
from peerllm.engine.model.division import Division, divide
from peerllm.engine.model.loader import as_array, as_tensor
from peerllm.engine.model.packed import Packed
from peerllm.engine.model.probing import probe, reach_of
from peerllm.engine.model.rows import Rows
from peerllm.engine.state.arriving_state import ArrivingSlot, state_forms
from peerllm.engine.state.kv_cache import SlotCache, slot_caches
from peerllm.engine.state.state_kinds import LayerState, slot_bytes
from peerllm.errors import BadInputError, EngineError, RefusedError
from peerllm.transport.frames.token_run import TokenRun


class TorchShard:
    """Implements base.Shard. Segments run one after the other through transformers' own modules."""

    form = "torch"

    def __init__(
        self,
        division: Division,
        first: int,
        last: int,
        states: Mapping[int, LayerState],
        slots: int,
        context: int,
        weights: Mapping[int, int],
        entry: nn.Module,
        reach: Reach | None,
        device: torch.device,
    ) -> None:
        self._units, self._device, self._turn = division.units, device, turn(device)
        self.first_layer, self.last_layer = first, last
        self.weights, self.weight_bytes = weights, sum(weights.values())
        # torch's threads would spin and take the processors from onnxruntime's.
        packed = any(isinstance(module, Packed) for module in division.model.modules())
        self._threads = 1 if packed and device == CPU else torch.get_num_threads()
        text = text_config(division.model.config)
        layout, numbers = division.layout, division.numbers(first, last)
        self.hidden_size: int = layout.width(numbers.start)
        self.vocabulary: int = text.vocab_size
        self.context = context
        self.dtype = division.dtype
        self.reach = reach
        self._model: Any = division.model
        self._base: Any = division.model.base_model
        self.blocks: Any = getattr(division.owner, division.attribute)
        self._has_embedding, self._has_head = first == 0, last == division.head
        with self._turn:
            self._caches = slot_caches(*get_layer_types_and_kwargs(text), states, slots, context, device)
        self.states = states
        self.kv_bytes = slot_bytes(states.values(), slots, context)
        self._arriving: dict[int, ArrivingSlot] = {}
        self._entering: torch.Tensor | None = None
        self._rows = None if layout.plain else Rows(layout, division.owner, self.blocks, numbers, self._has_embedding)
        if not self._has_embedding:
            self._enter_at(entry)
        matrix = self._model.get_output_embeddings() if self._has_head else None
        if isinstance(matrix, nn.Linear):
            matrix.register_forward_pre_hook(_with_plain_strides)
        self._dynamic = [m for m in self._model.modules() if getattr(m, "rope_type", "") == "dynamic"]

    def _enter_at(self, module: nn.Module) -> None:
        """Let `module`, the first of this shard, take the hidden states of the stage before as its input."""

        def swap(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if args:
                return (self._entering, *args[1:]), kwargs
            name = next(iter(kwargs))
            return args, {**kwargs, name: self._entering}

        module.register_forward_pre_hook(swap, with_kwargs=True)

    def forward(self, inputs: NDArray[Any], runs: Sequence[TokenRun]) -> NDArray[Any]:
        """Token ids int64 [n] or hidden states [n, hidden] in; hidden states, or float32 logits per sample, out."""
        self._begin(inputs, runs)
        outputs, start, rows = [], 0, as_tensor(inputs)
        with torch.inference_mode(), self._turn:
            for run in runs:
                outputs.append(as_array(self._compute(rows[start : start + run.length], run)))
                start += run.length
        return outputs[0] if len(outputs) == 1 else np.concatenate(outputs)

    def last_states(self, inputs: NDArray[Any], run: TokenRun) -> NDArray[np.float32]:
        """See base.Shard."""
        self._begin(inputs, [run])
        with torch.inference_mode(), self._turn:
            cache = self._caches[run.slot]
            cache.seek(run.position)
            output = self._run(as_tensor(inputs), run, cache, whole=True)
            cache.advance(run.length)
            made: NDArray[np.float32] = as_array(output.float())
            return made

    def _begin(self, inputs: NDArray[Any], runs: Sequence[TokenRun]) -> None:
        if self._model is None:
            raise EngineError("the shard is closed")
        self._check(inputs, runs)
        if torch.get_num_threads() != self._threads:
            torch.set_num_threads(self._threads)

    def _check(self, inputs: NDArray[Any], runs: Sequence[TokenRun]) -> None:
        total = sum(run.length for run in runs)
        if not runs or inputs.shape[0] != total or any(run.length < 1 for run in runs):
            raise BadInputError(f"{inputs.shape[0]} tokens for runs of {total}")
        for run in runs:
            end = run.position + run.length
            if not 0 <= run.slot < len(self._caches) or run.position < 0 or end > self.context:
                raise BadInputError(f"slot {run.slot}, positions {run.position}..{end - 1}: no such room")
        if self._has_embedding:
            if inputs.dtype != np.int64 or int(inputs.min()) < 0 or int(inputs.max()) >= self.vocabulary:
                raise BadInputError(f"token ids must be int64 from 0 to {self.vocabulary - 1}")
        elif inputs.ndim != 2 or inputs.shape[1] != self.hidden_size:
            raise BadInputError(f"hidden states must be [n, {self.hidden_size}], not {list(inputs.shape)}")

    def _compute(self, inputs: torch.Tensor, run: TokenRun) -> torch.Tensor:
        """[n] or [n, hidden] to what `forward` tells of it. If it fails, its slot still holds what came before it."""
        cache = self._caches[run.slot]
        cache.seek(run.position)
        tells = run.sample or not self._has_head
        if tells or self.first_layer < self.last_layer:
            output = self._run(inputs, run, cache)
        cache.advance(run.length)
        if run.snapshot:
            cache.keep_snapshot()
        return output if tells else torch.empty(0, self.vocabulary)

    def positions(self, run: TokenRun) -> torch.Tensor:
        """int64 [n]: where each of its tokens stands in the sequence."""
        return torch.arange(run.position, run.position + run.length)

    def _run(self, inputs: torch.Tensor, run: TokenRun, cache: SlotCache, whole: bool = False) -> torch.Tensor:
        """[n] or [n, hidden] through the model: float32 logits [1, vocabulary] for a sample, else [n, hidden].

        `whole`: the hidden states that the head is given, of all tokens.
        """
        wanted = self._has_head and run.sample and not whole
        model = self._model if wanted else self._base
        given: dict[str, Any] = {
            "position_ids": self.positions(run).to(self._device).unsqueeze(0),
            "past_key_values": cache,
            "use_cache": True,
        }
        carried: dict[str, torch.Tensor] = {}
        if self._has_embedding:
            given["input_ids"] = inputs.to(self._device).unsqueeze(0)
        elif self._rows is not None:
            self._entering, carried = self._rows.take(inputs.to(self._device, self.dtype))
        else:
            given["inputs_embeds"] = self._entering = inputs.to(self._device, self.dtype).unsqueeze(0)
        if wanted:
            given["logits_to_keep"] = 1
        for module in self._dynamic:  # reset: else the scale would follow the longest sequence so far
            module.max_seq_len_cached = module.original_max_seq_len + 1
        self.blocks.begun = False
        try:
            output = model(**accepted(model, **given), **carried)
        finally:
            self._entering = None
        if wanted:
            told: torch.Tensor = output.logits[0, -1:].float()
        else:
            told = output[0][0] if self._rows is None or whole else self._rows.made()
        return told.to(CPU).contiguous()

    def state_forms(self, first_layer: int, last_layer: int) -> StateForms:
        """See base.Shard. Shards with recurrent blocks give none: transformers' own layers hold those."""
        forms = state_forms(self.states, self._units[max(first_layer, 1) - 1 : last_layer])
        return StateForms({}, {}) if any(state.fixed for state in self.states.values()) else forms

    def held(self, slot: int, block: int) -> range:
        """See base.Shard."""
        return self._caches[slot].held(block)

    def steady(self, slot: int) -> int:
        """See base.Shard."""
        return self._caches[slot].length

    def export_part(self, slot: int, block: int, start: int, stop: int) -> StatePart:
        """See base.Shard."""
        with torch.inference_mode(), self._turn:
            rows = self._caches[slot].part(block, start, stop, self.states[block])
            return StatePart(block, start, {name: as_array(one.to(CPU)) for name, one in rows.items()})

    def export_fixed(self, slot: int, block: int, position: int) -> StatePart:
        """See base.Shard."""
        raise EngineError("recurrent states are not taken from here")

    def import_part(self, slot: int, part: StatePart) -> None:
        """See base.Shard."""
        cache = self._caches[slot]
        if cache.length:
            raise EngineError(f"slot {slot} holds a sequence")
        where = self._arriving.setdefault(slot, ArrivingSlot(self.states, self.context)).place(part)
        if where is None:
            raise EngineError("recurrent states are not taken in here")
        with torch.inference_mode(), self._turn:
            cache.add(part.block, {name: as_tensor(one).to(self._device) for name, one in part.rows.items()}, *where)

    def settle(self, slot: int) -> tuple[int, int]:
        """See base.Shard."""
        arriving, cache = self._arriving.pop(slot, None), self._caches[slot]
        if arriving is None or cache.length:
            raise EngineError(f"nothing has arrived for slot {slot}")
        tokens, furthest, starts = arriving.settle()
        if tokens:
            cache.begin(tokens, starts)
        return tokens, furthest

    def release(self, slot: int) -> None:
        """Forget the slot's sequence."""
        self._arriving.pop(slot, None)
        with torch.inference_mode(), self._turn:
            self._caches[slot].seek(0)

    def close(self) -> None:
        """Free weights and KV; may be called twice."""
        self._model = self._base = self.blocks = None
        self._caches.clear()


def _with_plain_strides(_: nn.Module, args: tuple[Any, ...]) -> Any:
    """Give a cut-out row plain strides: with those of its source torch copies the whole output matrix (seconds)."""
    hidden = args[0]
    return (hidden.reshape(-1, hidden.shape[-1]).view(hidden.shape), *args[1:])


def load_shard(
    spec: LoadStage, progress: Progress = lambda done, total: None, device: torch.device = CPU
) -> TorchShard:
    """Layers spec.first_layer..last_layer from the files that spec.tensors names; ModelError if they do not fit."""
    if spec.dtype not in DTYPES:
        raise BadInputError(f"unknown dtype {spec.dtype!r}")
    division = divide(parse_config(spec.config), DTYPES[spec.dtype])
    first, last = spec.first_layer, spec.last_layer
    if not 0 <= first <= last <= division.head:
        raise BadInputError(f"layers {first}..{last} of a model whose last is {division.head}")
    every, whole = probe(division, range(len(division.blocks))), division.owner.config
    states = {number: every[number] for number in division.numbers(first, last)}
    needed = slot_bytes(states.values(), spec.slots, spec.context)
    reach = reach_of(division, every)
    work = plan(division, first, last, spec.tensors, spec.quantize)
    if spec.limit_bytes is not None and work.nbytes + needed > spec.limit_bytes:
        held = f"weights of {work.nbytes} bytes and KV of {needed}"
        raise RefusedError(f"{held} are asked for, {spec.limit_bytes} are promised")
    entry = strip(division, first, last)
    weights = fill(division, first, work, progress, device)
    finish(division, whole, device)
    return TorchShard(division, first, last, states, spec.slots, spec.context, weights, entry, reach, device)
