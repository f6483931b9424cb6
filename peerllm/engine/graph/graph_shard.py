"""A shard of a model of a known family at work: a few graphs, and the keys and values that they read and write."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from peerllm.engine.base import Reach, StateForms, StatePart
from peerllm.engine.graph.blocks.block import add_block
from peerllm.engine.graph.blocks.builder import Builder, normalise, rope_name
from peerllm.engine.graph.matrix_product import Product, add_product
from peerllm.engine.graph.nodes import BoundSession, Graph
from peerllm.engine.graph.rotation import tables
from peerllm.engine.graph.row_maker import Embedding
from peerllm.engine.graph.structure import Head, Model
from peerllm.engine.graph.weights import BlockWeights, norm_weights
from peerllm.engine.state.arriving_state import state_forms
from peerllm.engine.state.kv_slots import Batch, KVSlots
from peerllm.engine.state.state_kinds import LayerState, reach_of
from peerllm.engine.weights.tensors import Floats, Tensors
from peerllm.errors import EngineError
from peerllm.transport.frames.token_run import TokenRun

MAX_BOUND = 64  # pass shapes (sequences, tokens, first place) whose bindings are kept
LEAST_ROWS = 16  # the least rows of the two buffers between graphs


@dataclass(frozen=True, slots=True)
class BlockRange:
    """Blocks first..last (numbered from 0, both included) that are one graph."""

    first: int
    last: int
    session: Any


class GraphShard:
    """Implements base.Shard. A pass is one token each of several sequences, or one chunk of one prompt."""

    form = "graph"

    def __init__(
        self, model: Model, states: Mapping[int, LayerState], slots: int, context: int,
        embedding: Embedding | None, spans: Sequence[BlockRange], head: Sequence[Any], weight_bytes: int, chunk: int,
        norm: Any = None,
    ) -> None:  # fmt: skip
        """`head`: the sessions that compute logits (last shard only); `states`: what each block keeps.

        `norm`: the session of the norm before the head alone.
        """
        first = min(states, default=len(model.blocks))
        self.hidden_size, self.vocabulary = model.width(0 if embedding else first), model.vocabulary
        self.weight_bytes = weight_bytes
        self.weights: Mapping[int, int] = {id(self): weight_bytes}
        self.reach: Reach | None = reach_of(model.states())
        self._model, self._embedding, self._spans, self._head = model, embedding, spans, head
        self._norm = norm
        self._slots = KVSlots(states, slots, context)
        self.kv_bytes = self._slots.nbytes
        self._windows = tuple(self._slots.groups)
        self._tables = rotation_tables(model, spans, context)
        self._bound: OrderedDict[tuple[int, int, int], _Pass] = OrderedDict()
        self._buffers = self._make_buffers(max(LEAST_ROWS, min(chunk, context), slots))

    def forward(self, inputs: npt.NDArray[Any], runs: Sequence[TokenRun]) -> npt.NDArray[Any]:
        """Ids int64 [n] or hidden states float32 [n, hidden] to hidden states, or logits of the runs to sample."""
        self._check(inputs, runs)
        if len(runs) == 1 and runs[0].length > self._slots.longest:
            return self._in_pieces(inputs, runs[0])
        hidden, order = self._through(inputs, runs)
        if not self._head:
            out = np.empty_like(hidden)
            out[order if len(runs) > 1 else slice(None)] = hidden
            return out
        length = runs[0].length
        ends = {row: (place + 1) * length - 1 for place, row in enumerate(order)}
        wanted = [ends[row] for row, run in enumerate(runs) if run.sample]
        return self._logits(hidden[wanted])

    def last_states(self, inputs: npt.NDArray[Any], run: TokenRun) -> Floats:
        """See base.Shard."""
        self._check(inputs, [run])
        outs, longest = [], self._slots.longest
        for start in range(0, run.length, longest):
            part = self._part(run, start, min(longest, run.length - start))
            hidden, _ = self._through(inputs[start : start + part.length], [part])
            x = np.ascontiguousarray(hidden)[None]
            outs.append(x[0].copy() if self._norm is None else self._norm.run(None, {"x": x})[0][0])
        return np.concatenate(outs)

    def _through(self, inputs: npt.NDArray[Any], runs: Sequence[TokenRun]) -> tuple[Floats, list[int]]:
        """Hidden states [b·n, hidden] after this shard's blocks, which the next pass overwrites, and their order."""
        batch = self._slots.seek(runs)
        order, length = list(batch.order), runs[0].length
        rows = inputs if len(runs) == 1 else inputs[order]
        starts = [runs[row].position for row in order]
        places = np.array([range(start, start + length) for start in starts], np.int64)  # [b, n]
        hidden = self._blocks(rows, places, batch)  # [b·n, hidden]
        self._slots.advance(runs)
        for run in runs:
            if run.snapshot:
                self._slots.keep_snapshot(run.slot)
        return hidden, order

    def state_forms(self, first_layer: int, last_layer: int) -> StateForms:
        """See base.Shard."""
        return state_forms(self._slots.states, self._model.units[max(first_layer, 1) - 1 : last_layer])

    def held(self, slot: int, block: int) -> range:
        """See base.Shard."""
        return self._slots.held(slot, block)

    def steady(self, slot: int) -> int:
        """See base.Shard."""
        return self._slots.steady(slot)

    def export_part(self, slot: int, block: int, start: int, stop: int) -> StatePart:
        """See base.Shard."""
        return self._slots.part(slot, block, start, stop)

    def export_fixed(self, slot: int, block: int, position: int) -> StatePart:
        """See base.Shard."""
        return self._slots.fixed_part(slot, block, position)

    def import_part(self, slot: int, part: StatePart) -> None:
        """See base.Shard."""
        self._slots.add(slot, part)

    def settle(self, slot: int) -> tuple[int, int]:
        """See base.Shard."""
        return self._slots.settle(slot)

    def release(self, slot: int) -> None:
        """Forget the slot's sequence."""
        self._slots.release(slot)

    def close(self) -> None:
        """Free weights and KV; may be called twice."""
        self._bound.clear()
        self._spans, self._head, self._embedding, self._norm = (), (), None, None
        self._slots.close()

    def _check(self, inputs: npt.NDArray[Any], runs: Sequence[TokenRun]) -> None:
        """EngineError before anything has moved: the graphs read and write by address what they are told to."""
        lengths = [run.length for run in runs]
        if not lengths or min(lengths) < 1 or max(lengths) > 1 < len(lengths):
            raise EngineError("a pass is one token each of several sequences, or a chunk of one")
        if self._embedding is not None:
            self._embedding.check(inputs, sum(lengths))
        elif inputs.dtype != np.float32 or inputs.shape != (sum(lengths), self.hidden_size):
            wanted = f"float32 [{sum(lengths)}, {self.hidden_size}]"
            raise EngineError(f"hidden states are {wanted}, not {inputs.dtype} {list(inputs.shape)}")
        self._slots.check(runs)

    def _in_pieces(self, inputs: npt.NDArray[Any], whole: TokenRun) -> npt.NDArray[Any]:
        """A chunk longer than a window's room takes."""
        outs, longest = [], self._slots.longest
        for start in range(0, whole.length, longest):
            part = self._part(whole, start, min(longest, whole.length - start))
            outs.append(self.forward(inputs[start : start + part.length], [part]))
        return outs[-1] if self._head else np.concatenate(outs)

    def _part(self, whole: TokenRun, start: int, length: int) -> TokenRun:
        last = start + length == whole.length
        after = {"sample": whole.sample and last, "snapshot": whole.snapshot and last}
        return replace(whole, position=whole.position + start, length=length, **after)

    def _blocks(self, rows: npt.NDArray[Any], places: npt.NDArray[np.int64], batch: Batch) -> Floats:
        """Rows through this shard's blocks: [b·n, hidden]. The next pass overwrites the result."""
        flat = places.reshape(-1)
        x = self._embedding(rows, flat) if self._embedding is not None else rows
        if not self._spans:
            return x
        run = self._pass(places.shape[0], places.shape[1], batch.first)
        run.take(x, places, batch)
        return run.go()

    def _logits(self, hidden: Floats) -> Floats:
        """Logits float32 [k, vocabulary] of hidden states [k, hidden]."""
        if not len(hidden):
            return np.empty((0, self.vocabulary), np.float32)
        x = np.ascontiguousarray(hidden)[None]
        logits = [session.run(None, {"x": x})[0][0] for session in self._head]
        return logits[0] if len(logits) == 1 else np.concatenate(logits, axis=1)

    def _pass(self, sequences: int, tokens: int, first: int) -> _Pass:
        key = sequences, tokens, first
        if key in self._bound:
            self._bound.move_to_end(key)
            return self._bound[key]
        if sequences * tokens * self.hidden_size > len(self._buffers[0]):
            self._bound.clear()  # their bindings point into the smaller buffers
            self._buffers = self._make_buffers(sequences * tokens)
        made = self._bound[key] = _Pass(self, sequences, tokens, first)
        if len(self._bound) > MAX_BOUND:
            self._bound.popitem(last=False)
        return made

    def _make_buffers(self, rows: int) -> list[Floats]:
        return [np.empty(rows * self.hidden_size, np.float32) for _ in range(2)]


class _Pass:
    """The graphs, bound to memory for `sequences` × `tokens` tokens in the slots at places from `first` on."""

    def __init__(self, shard: GraphShard, sequences: int, tokens: int, first: int) -> None:
        count, width = sequences * tokens, shard._model.width

        def rows(number: int) -> Floats:
            """Those before graph `number`, in one buffer and the other by turns."""
            spans = shard._spans
            numbers = width(spans[number].first if number < len(spans) else spans[-1].last + 1)
            return shard._buffers[number % 2][: count * numbers].reshape(count, numbers)

        self._entry, self._exit = rows(0), rows(len(shard._spans))
        self._places = np.empty((sequences, tokens), np.int64)
        self._last = [np.empty(sequences, np.int32) for _ in shard._windows]
        self._total = [np.empty(1, np.int32) for _ in shard._windows]
        self._runs = []
        windows = shard._model.windows
        for number, span in enumerate(shard._spans):
            bound = BoundSession(span.session)
            asked = {entry.name for entry in span.session.get_inputs()}
            given: dict[str, npt.NDArray[Any]] = {
                "x": rows(number).reshape(sequences, tokens, -1), "positions": self._places, **shard._tables,
            }  # fmt: skip
            for group, window in enumerate(shard._windows):
                given[f"last {windows.index(window)}"] = self._last[group]
                given[f"total {windows.index(window)}"] = self._total[group]
            given |= {name: store[first : first + sequences] for name, store in shard._slots.stores.items()}
            for name in asked:
                bound.give(name, given[name])
            bound.want("y", rows(number + 1).reshape(sequences, tokens, -1))
            for output in {entry.name for entry in span.session.get_outputs()} - {"y"}:
                bound.want(output, given[output.partition(" ")[2]])  # "new keys 3" is written where "keys 3" was read
            self._runs.append(bound)

    def take(self, x: Floats, places: npt.NDArray[np.int64], batch: Batch) -> None:
        """Write the next run's inputs into the bound memory."""
        self._entry[:] = x
        self._places[:] = places
        for mine, given in zip((*self._last, *self._total), (*batch.last, *batch.total), strict=True):
            mine[:] = given

    def go(self) -> Floats:
        """Run the graphs one after the other; hidden states [b·n, hidden]."""
        for bound in self._runs:
            bound.run()
        return self._exit


def rotation_tables(model: Model, spans: Iterable[BlockRange], context: int) -> dict[str, npt.NDArray[Any]]:
    """The cosines and sines that the graphs take as inputs, by the inputs' names."""
    asked = {entry.name for span in spans for entry in span.session.get_inputs()}
    made: dict[str, npt.NDArray[Any]] = {}
    for rope in model.ropes:
        both = tables(rope, context)
        for what, table in zip(("cos", "sin"), both, strict=True):
            for dtype in ("float32", "float16"):
                if (name := f"{what} {dtype} {rope_name(rope)}") in asked:
                    made[name] = np.ascontiguousarray(table.astype(dtype))
    return made


def make_span(
    model: Model, numbers: range, weights: Sequence[BlockWeights], tensors: Tensors, bits: int, context: int
) -> BlockRange:
    """Build blocks `numbers` as one graph; `weights` are those blocks' weights, in order."""
    graph = Graph()
    entering, leaving = model.width(numbers.start), model.width(numbers.stop)
    x, later, inputs = graph.input("x", "b", "n", entering), "", [""] * len(numbers)
    if entering > model.hidden:
        each = [model.blocks[number].own_input for number in numbers]
        sizes = [model.hidden, *each, *([leaving - model.hidden] if leaving > model.hidden else [])]
        x, *inputs = graph.split(x, sizes)
        later = inputs.pop() if leaving > model.hidden else ""
    for number, own, read in zip(numbers, weights, inputs, strict=True):
        x = add_block(Builder(graph, own, tensors, bits, context, model.windows, number), x, read)
    if later:
        graph.add("Concat", x, later, output="y", axis=-1)
    else:
        graph.add("Identity", x, output="y")
    graph.output("y", "b", "n", leaving)
    return BlockRange(numbers.start, numbers.stop - 1, graph.session())


def make_norm(about: Head, hidden: int, norm: str, tensors: Tensors) -> Any:
    """Build the session of the norm before the head: x [1, k, hidden] to the same shape; None where there is none."""
    if about.norm is None:
        return None
    graph = Graph()
    x = graph.input("x", 1, "k", hidden)
    made = norm_weights(graph, tensors, about.norm, norm, (hidden,))
    graph.add("Identity", normalise(graph, x, about.norm, *made), output="y")
    graph.output("y", 1, "k", hidden)
    return graph.session()


def make_head(about: Head, hidden: int, product: Product, norm: str, tensors: Tensors, bits: int) -> Any:
    """Build the session that turns hidden states x [1, k, hidden] into logits [1, k, rows of the product]."""
    graph = Graph()
    x = graph.input("x", 1, "k", hidden)
    if about.norm is not None:
        made = norm_weights(graph, tensors, about.norm, norm, (hidden,))
        x = normalise(graph, x, about.norm, *made)
    out = add_product(graph, x, product, tensors, bits)
    if about.scale != 1.0:
        out = graph.add("Mul", out, graph.number(about.scale))
    if about.softcap:
        cap = graph.number(about.softcap)
        out = graph.add("Mul", graph.add("Tanh", graph.add("Div", out, cap)), cap)
    graph.add("Identity", out, output="logits")
    graph.output("logits", 1, "k", product.rows)
    return graph.session()
