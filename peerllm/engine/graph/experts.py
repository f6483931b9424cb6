"""The experts of a block: their tensors, and how tokens are sent through them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from peerllm.engine.graph.matrix_product import Layout, require
from peerllm.engine.graph.nodes import CONTRIB, INT8_ACTIVATIONS, Graph, packed_zeros
from peerllm.engine.graph.structure import Experts
from peerllm.engine.weights.formats.coded_rows import CodedRows, WeightForm
from peerllm.engine.weights.rounding import BLOCKS, halves, rounded
from peerllm.engine.weights.tensors import Floats, Tensors

LAYERS: tuple[Literal[0], Literal[1]] = (0, 1)  # gate and up together, and down
Layer = Literal[0, 1]


@dataclass(frozen=True, slots=True)
class Stacks:
    """The tensors of a block's experts: one for each expert ("mlp.experts.{}.gate_proj"), or stacks `up` and `down`."""

    gate: str
    up: str
    down: str
    # "halves": `up` is [experts, 2I, H], first all of gate, then all of up; `down` is [experts, H, I].
    # "interleaved": `up` is [experts, H, 2I], gate and up alternating; `down` is [experts, I, H]; both have biases.
    # "apart": `gate` and `up` are [experts, I, H], `down` is [experts, H, I]; all have biases, or none has.
    form: Literal["each", "interleaved", "halves", "apart"] = "each"
    # How gate, up and down are stored. Of "interleaved" `up` stands for both, as rows of a matrix [experts · 2I, H].
    forms: tuple[WeightForm | None, ...] = (None, None, None)
    kept: bool = False  # see Part

    def layout(self, experts: Experts, hidden: int, bits: int) -> Layout:
        """How all matrices are held: one operator takes all in so many bits and in blocks of one size."""
        kept = [form for form in self.forms if self.kept and bits and form is not None and form.bits]
        exact = [form for form in kept if _exact(form)]
        alike = len(exact) == sum(len(self._parts(layer)) for layer in LAYERS)
        block = min((form.block for form in kept), default=BLOCKS[0])
        fitting = (size for size in (*BLOCKS, 16) if size <= block and not hidden % size and not experts.wide % size)
        found = next(fitting, None)
        if not bits or found is None or (not kept and found not in BLOCKS):
            return Layout(0)
        zeros = any(form.zeros for form in exact)
        return Layout(max(form.bits for form in exact) if alike else 8 if kept else bits, found, zeros)

    def nbytes(self, experts: Experts, hidden: int, bits: int) -> int:
        return self.layout(experts, hidden, bits).nbytes(3 * experts.count * experts.wide, hidden)

    def tensors(self, experts: Experts, hidden: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Names and shapes of the experts' tensors."""
        count, wide = experts.count, experts.wide
        if self.form == "interleaved":
            yield from self.coded_tensors(experts, hidden)
            if self.forms[1] is None:
                yield self.up, (count, hidden, 2 * wide)
            if self.forms[2] is None:
                yield self.down, (count, wide, hidden)
            yield f"{self.up}_bias", (count, 2 * wide)
            yield f"{self.down}_bias", (count, hidden)
        elif self.form == "halves":
            yield self.up, (count, 2 * wide, hidden)
            yield self.down, (count, hidden, wide)
        elif self.form == "apart":
            yield f"{self.gate}.weight", (count, wide, hidden)
            yield f"{self.up}.weight", (count, wide, hidden)
            yield f"{self.down}.weight", (count, hidden, wide)
        else:
            yield from self.coded_tensors(experts, hidden)
            sizes = self._sizes(experts, hidden)
            for name, form, size in zip((self.gate, self.up, self.down), self.forms, sizes, strict=True):
                if form is None:
                    yield from ((f"{name.format(number)}.weight", size) for number in range(count))

    def coded_tensors(self, experts: Experts, hidden: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Names and shapes of the tensors that are stored in a form."""
        sizes = self._sizes(experts, hidden)
        for name, form, (rows, columns) in zip((self.gate, self.up, self.down), self.forms, sizes, strict=True):
            if form is None:
                continue
            if self.form == "apart":
                yield f"{name}.weight", (experts.count, rows, columns)
            elif self.form == "interleaved":
                yield from form.tensors(name, experts.count * rows, columns)
            else:
                for number in range(experts.count):
                    yield from form.tensors(f"{name.format(number)}.weight", rows, columns)

    def _sizes(self, experts: Experts, hidden: int) -> list[tuple[int, int]]:
        """Rows and columns of one expert's gate, up and down."""
        wide = experts.wide
        return [(wide, hidden), (2 * wide if self.form == "interleaved" else wide, hidden), (hidden, wide)]

    def _stored(self, which: int, number: int, rows: int) -> tuple[str, slice]:
        """Which rows of which matrix are gate, up or down of one expert."""
        name = (self.gate, self.up, self.down)[which]
        if self.form == "each":
            return f"{name.format(number)}.weight", slice(None)
        return name if self.form == "interleaved" else f"{name}.weight", slice(number * rows, (number + 1) * rows)

    def floats(self, tensors: Tensors, experts: Experts, hidden: int, number: int, layer: Layer) -> Floats:
        """A layer of one expert: gate and up, rows alternating, [2I, H], or down [H, I]."""
        read = []
        for which in self._parts(layer):
            form, (rows, columns) = self.forms[which], self._sizes(experts, hidden)[which]
            if form is not None:
                name, some = self._stored(which, number, rows)
                read.append(tensors.decoded(form, name, some, rows, columns))
            elif self.form == "each":
                read.append(tensors.floats(self._stored(which, number, rows)[0], slice(None)))
            elif self.form == "apart":
                read.append(tensors.floats(self._stored(which, number, rows)[0], number))
            else:
                made = tensors.floats((self.gate, self.up, self.down)[which], number)
                read.append(np.ascontiguousarray(made.T) if self.form == "interleaved" else made)
        if self.form == "halves" and not layer:
            read = list(read[0].reshape(2, experts.wide, hidden))
        return read[0] if len(read) == 1 else _alternating(*read)

    def _parts(self, layer: Layer) -> tuple[int, ...]:
        """Which of gate, up and down a layer is made of."""
        return (2,) if layer else (1,) if self.form in ("interleaved", "halves") else (0, 1)

    def coded(
        self, tensors: Tensors, experts: Experts, hidden: int, number: int, layer: Layer, layout: Layout
    ) -> CodedRows:
        """A layer of one expert in a layout, its rows as in `floats`; what has minima or an order is rounded."""
        parts = self._parts(layer)
        forms = [self.forms[which] for which in parts]
        if not self.kept or any(form is None or not form.bits or not _exact(form) for form in forms):
            codes, scales = rounded(self.floats(tensors, experts, hidden, number, layer), layout.bits, layout.block)
            return widened(CodedRows(layout.bits, layout.block, codes, scales), layout)
        read = []
        for which, form in zip(parts, forms, strict=True):
            rows, columns = self._sizes(experts, hidden)[which]
            name, some = self._stored(which, number, rows)
            assert form is not None
            read.append(widened(tensors.coded(form, name, some, rows, columns), layout))
        if len(read) == 1:
            return read[0]
        zeros = [made.zeros for made in read if made.zeros is not None]
        return CodedRows(
            layout.bits, layout.block, _alternating(*(made.codes for made in read)),
            _alternating(*(made.scales for made in read)), _alternating(*zeros) if zeros else None,
        )  # fmt: skip

    def bias(self, tensors: Tensors, layer: Layer) -> Floats | None:
        """The biases of all experts' layers, [experts, rows]; None if there are none."""
        if self.form == "interleaved":
            return tensors.floats(f"{(self.up, self.down)[layer]}_bias", slice(None))
        if self.form != "apart" or tensors.shape(f"{self.down}.bias") is None:
            return None
        if layer:
            return tensors.floats(f"{self.down}.bias", slice(None))
        both = [tensors.floats(f"{name}.bias", slice(None)) for name in (self.gate, self.up)]
        return np.stack(both, axis=2).reshape(len(both[0]), -1)


def _alternating(first: np.ndarray[Any, Any], second: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The rows of two matrices in turns."""
    return np.stack((first, second), axis=1).reshape(2 * len(first), -1)


def _exact(form: WeightForm) -> bool:
    """Whether the operator takes the form's numbers as they are."""
    return not form.minima and not form.ordered


def widened(coded: CodedRows, layout: Layout) -> CodedRows:
    """The same weights in a layout of no fewer bits and no larger blocks; with zeros if the layout has them."""
    codes, zeros, each = coded.codes, coded.zeros, coded.block // layout.block
    if layout.zeros and zeros is None:
        zeros = np.full(coded.scales.shape, 1 << (coded.bits - 1), np.uint8)
    if coded.bits < layout.bits:
        codes = halves(codes)
        if zeros is None:
            codes = codes + np.uint8((1 << (layout.bits - 1)) - (1 << (coded.bits - 1)))
    zeros = None if zeros is None else np.repeat(zeros, each, axis=1)
    return CodedRows(layout.bits, layout.block, codes, np.repeat(coded.scales, each, axis=1), zeros)


def add_experts(
    graph: Graph, rows: str, scores: str, experts: Experts, stacks: Stacks, hidden: int, tensors: Tensors, bits: int
) -> str:
    """Send rows [n, H] through the experts that scores [n, experts] choose; only those experts are computed."""
    for name, shape in stacks.tensors(experts, hidden):
        require(tensors, name, shape)
    layout = stacks.layout(experts, hidden, bits)
    inputs, zero_points = [rows, scores], []
    for layer in LAYERS:
        count, columns = (hidden, experts.wide) if layer else (2 * experts.wide, hidden)
        if not layout.bits:
            stack = np.empty((experts.count, count, columns), np.float32)
            for number in range(experts.count):
                stack[number] = stacks.floats(tensors, experts, hidden, number, layer)
            inputs.append(graph.weight(stack))
        else:
            codes = np.empty((experts.count, count, columns * layout.bits // 8), np.uint8)
            scales = np.empty((experts.count, count, columns // layout.block), np.float32)
            zeros = np.empty((experts.count, count, -(-scales.shape[2] * layout.bits // 8)), np.uint8)
            for number in range(experts.count):
                made = stacks.coded(tensors, experts, hidden, number, layer, layout)
                codes[number], scales[number] = made.codes, made.scales
                if made.zeros is not None:
                    zeros[number] = packed_zeros(made.zeros, layout.bits)
            inputs += [graph.weight(codes), graph.weight(scales)]
            zero_points += [graph.weight(zeros)] if layout.zeros else []
        bias = stacks.bias(tensors, layer)
        inputs.append("" if bias is None else graph.weight(bias))
    about: dict[str, Any] = {
        "k": experts.used, "activation_type": "swiglu", "swiglu_fusion": 1, "activation_alpha": experts.alpha,
        "activation_beta": experts.beta, "normalize_routing_weights": int(experts.normalised),
    }  # fmt: skip
    if experts.limit:
        about["swiglu_limit"] = experts.limit
    if not layout.bits:
        return graph.add("MoE", *inputs, domain=CONTRIB, **about)
    inputs += ["", "", "", *zero_points] if zero_points else []
    about |= {"expert_weight_bits": layout.bits, "block_size": layout.block, "accuracy_level": INT8_ACTIVATIONS}
    return graph.add("QMoE", *inputs, domain=CONTRIB, **about)
