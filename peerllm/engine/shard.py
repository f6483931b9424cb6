"""A shard: layers first..last of a model, loaded, with room for its sequences; a smaller model of the same kind."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from transformers.cache_utils import Cache

from peerllm.engine import attention
from peerllm.engine.absent import Absent
from peerllm.engine.assembly import Filled, fill, finish, fusions, plan, strip
from peerllm.engine.base import Progress, Reach, Segment
from peerllm.engine.cache import Slots, kv_bytes
from peerllm.engine.config import DTYPES, parse_config, text_config
from peerllm.engine.division import Division, divide
from peerllm.engine.dryrun import accepted
from peerllm.engine.kernels.packed import Packed
from peerllm.engine.loader import is_mapped
from peerllm.engine.messages import LoadStage
from peerllm.engine.packing import PackedSlots
from peerllm.engine.place import CPU, turn
from peerllm.engine.probing import probe
from peerllm.engine.reach import reach_of
from peerllm.engine.states import LayerState
from peerllm.engine.wiring import obstacle
from peerllm.errors import BadInputError, EngineError, RefusedError


class TorchShard:
    """See base.Shard. Segments run as one packed row where the model allows it, else one after the other."""

    def __init__(
        self,
        division: Division,
        spec: LoadStage,
        states: Mapping[int, LayerState],
        filled: Filled,
        entry: nn.Module,
        unpacked: str | None = None,
        reach: Reach | None = None,
        device: torch.device = CPU,
    ) -> None:
        """`unpacked` says why its tokens cannot be packed (`wiring.obstacle`); None: they can."""
        self._device, self._turn = device, turn(device)
        self.first_layer, self.last_layer = spec.first_layer, spec.last_layer
        self.weight_bytes = filled.tensor_bytes + filled.packed_bytes
        # Beside a form with threads of its own torch's would spin, and take the processors from it.
        single = filled.form is not None and filled.form.single_thread
        self._threads = 1 if single else torch.get_num_threads()
        text = text_config(division.model.config)
        self.hidden_size: int = text.hidden_size
        self.vocabulary: int = text.vocab_size
        kept = [p for p in division.model.parameters() if not p.is_meta and not is_mapped(p)]
        packed = {id(division): filled.packed_bytes} if filled.packed_bytes else {}
        self.weights: Mapping[int, int] = {**{p.data_ptr(): p.nbytes for p in kept}, **packed}
        self.context = spec.context
        self.dtype = division.dtype
        self.unpacked, self.reach = unpacked, reach
        self._division: Any = division
        self._model: Any = division.model
        self._base: Any = division.model.base_model
        self._has_embedding, self._has_head = spec.first_layer == 0, spec.last_layer == division.head
        with self._turn:
            self._slots = self._room(text, spec, states)
        self.kv_bytes = self._slots.kv_bytes
        self._entering: torch.Tensor | None = None
        if not self._has_embedding:
            self._enter_at(entry)
        matrix = self._model.get_output_embeddings() if self._has_head else None
        if isinstance(matrix, nn.Linear | Packed):
            matrix.register_forward_pre_hook(_with_plain_strides)
        self._dynamic = [m for m in self._model.modules() if getattr(m, "rope_type", "") == "dynamic"]

    def _room(self, text: Any, spec: LoadStage, states: Mapping[int, LayerState]) -> PackedSlots | Slots:
        from transformers.cache_utils import get_layer_types_and_kwargs

        if self.unpacked is None:
            attention.register()
            attention.adopt(self._model, attention.PACKED)
            return PackedSlots(states, spec.slots, spec.context, self.dtype, self._device)
        return Slots(*get_layer_types_and_kwargs(text), states, spec.slots, spec.context, self._device)

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
    def forward(self, inputs: Any, segments: Sequence[Segment]) -> Any:
        """Token ids int64 [n] or hidden states [n, hidden] in; hidden states, or float32 logits per sample, out.

        All of these lie in the machine's memory, wherever the shard computes. Arrays in, an array out.
        """
        if isinstance(inputs, np.ndarray):
            return _array(self._forward(_tensor(inputs), segments))
        return self._forward(inputs, segments)

    def _forward(self, inputs: torch.Tensor, segments: Sequence[Segment]) -> torch.Tensor:
        if self._model is None:
            raise EngineError("the shard is closed")
        if torch.get_num_threads() != self._threads:
            torch.set_num_threads(self._threads)
        self._check(inputs, segments)
        with self._turn:
            return self._rows(inputs, segments)

    def _rows(self, inputs: torch.Tensor, segments: Sequence[Segment]) -> torch.Tensor:
        rows = self._slots.rows(segments)
        if len(rows) == 1:
            return self._row(inputs, [piece for _, piece in rows[0]])
        parts: dict[int, torch.Tensor] = {}  # by where its first token stands in the row
        for row in rows:
            pieces = [piece for _, piece in row]
            output = self._row(torch.cat([inputs[start : start + piece.length] for start, piece in row]), pieces)
            told = [(start, 1 if self._has_head else piece.length) for start, piece in row if self._tells(piece)]
            parts.update(
                zip((start for start, _ in told), torch.split(output, [count for _, count in told]), strict=True)
            )
        return torch.cat([parts[start] for start in sorted(parts)]) if parts else self._nothing()

    def _tells(self, piece: Segment) -> bool:
        return piece.sample or not self._has_head

    def _nothing(self) -> torch.Tensor:
        if self._has_head:
            return torch.empty(0, self.vocabulary, dtype=torch.float32)
        return torch.empty(0, self.hidden_size, dtype=self.dtype)

    def _check(self, inputs: torch.Tensor, segments: Sequence[Segment]) -> None:
        total = sum(segment.length for segment in segments)
        if not segments or inputs.shape[0] != total or any(segment.length < 1 for segment in segments):
            raise BadInputError(f"a row of {inputs.shape[0]} tokens for segments of {total}")
        for segment in segments:
            end = segment.position + segment.length
            if not 0 <= segment.slot < self._slots.count or segment.position < 0 or end > self.context:
                raise BadInputError(f"slot {segment.slot}, positions {segment.position}..{end - 1}: no such room")
        if self._has_embedding:
            if inputs.dtype != torch.int64 or int(inputs.min()) < 0 or int(inputs.max()) >= self.vocabulary:
                raise BadInputError(f"token ids must be int64 from 0 to {self.vocabulary - 1}")
        elif inputs.dim() != 2 or inputs.shape[1] != self.hidden_size:
            raise BadInputError(f"hidden states must be [n, {self.hidden_size}], not {list(inputs.shape)}")

    def _row(self, inputs: torch.Tensor, pieces: Sequence[Segment]) -> torch.Tensor:
        """One row through the model. If it fails, its slots still hold what came before it."""
        cache = self._slots.seek(pieces)
        if self.first_layer == self.last_layer and not any(map(self._tells, pieces)):
            output = self._nothing()
        else:
            output = self._run(inputs, pieces, cache)
        self._slots.advance(pieces)
        return output

    def positions(self, segments: Sequence[Segment]) -> torch.Tensor:
        """int64 [n]: where each token of a row stands in its sequence."""
        ranges = [range(segment.position, segment.position + segment.length) for segment in segments]
        return torch.tensor(list(itertools.chain.from_iterable(ranges)))

    def _run(self, inputs: torch.Tensor, pieces: Sequence[Segment], cache: Cache) -> torch.Tensor:
        """A row [n] or [n, hidden] through the model: [n, hidden], or [pieces to sample after, vocabulary]."""
        wanted = _lasts(pieces) if self._has_head else []  # rows whose logits are wanted
        model = self._model if wanted else self._base
        given: dict[str, Any] = {
            "position_ids": self.positions(pieces).to(self._device).unsqueeze(0),
            "past_key_values": cache,
            "use_cache": True,
        }
        if self._has_embedding:
            given["input_ids"] = inputs.to(self._device).unsqueeze(0)
        else:
            given["inputs_embeds"] = self._entering = inputs.to(self._device, self.dtype).unsqueeze(0)
        if wanted:
            given["logits_to_keep"] = 1 if wanted == [len(inputs) - 1] else torch.tensor(wanted).to(self._device)
        for module in self._dynamic:  # its scale follows the longest sequence seen; each is to have its own
            module.max_seq_len_cached = module.original_max_seq_len + 1
        getattr(self._division.owner, self._division.attribute).begun = False
        try:
            with attention.computing(cache):
                output = model(**accepted(model, **given))
        finally:
            self._entering = None
        if wanted:
            logits: torch.Tensor = output.logits[0]
            return (logits if len(logits) == len(wanted) else logits[wanted]).float().to(CPU)
        hidden: torch.Tensor = output[0][0]
        return self._nothing() if self._has_head else hidden.to(CPU)

    def release(self, slot: int) -> None:
        """Forget the slot's sequence."""
        with torch.inference_mode(), self._turn:
            self._slots.release(slot)

    def close(self) -> None:
        """Free weights and KV; may be called twice."""
        self._model = self._base = self._division = None
        self._slots.close()


def _tensor(array: npt.NDArray[Any]) -> torch.Tensor:
    array = array if array.flags.writeable else array.copy()  # torch knows no tensor that must not be written to
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def _array(tensor: torch.Tensor) -> npt.NDArray[Any]:
    tensor = tensor.contiguous()
    if tensor.dtype is torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def _lasts(pieces: Sequence[Segment]) -> list[int]:
    """Where in their row the last tokens of those pieces stand that a token is picked after."""
    ends = itertools.accumulate(piece.length for piece in pieces)
    return [end - 1 for piece, end in zip(pieces, ends, strict=True) if piece.sample]


def _with_plain_strides(_: nn.Module, args: tuple[Any, ...]) -> Any:
    """The last row cut out of many keeps their stride, for which torch copies the whole output matrix (seconds)."""
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
    numbers = range(max(first, 1) - 1, min(last, division.head - 1))
    every, whole = probe(division, range(len(division.blocks))), division.owner.config
    states = {number: every[number] for number in numbers}
    needed = kv_bytes(states, spec.slots, spec.context)
    unpacked, reach = obstacle(division, every), reach_of(division.model, every)
    work = plan(division, first, last, spec.tensors, spec.quantize)
    if spec.limit_bytes is not None and work.nbytes + needed > spec.limit_bytes:
        held = f"weights of {work.nbytes} bytes and KV of {needed}"
        raise RefusedError(f"{held} are asked for, {spec.limit_bytes} are promised")
    fused = fusions(division, numbers, work.kept, unpacked, device)
    entry = strip(division, first, last, numbers)
    filled = fill(division, first, work, fused, torch.get_num_threads(), progress, device)
    finish(division, whole, device)
    return TorchShard(division, spec, states, filled, entry, unpacked, reach, device)
