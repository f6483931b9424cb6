"""What a model of a known family is made of, as its graphs are built: blocks, positions, embedding, head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Placement = Literal["before attention", "after attention", "before mlp", "after mlp", "final"]
Activation = Literal["silu", "gelu", "gelu_tanh", "relu", "relu2", "quick_gelu"]


@dataclass(frozen=True, slots=True)
class Norm:
    """A normalisation over the last dimension: x · (weight + offset) [+ bias], after centring if kind is "layer"."""

    kind: Literal["rms", "layer"]
    eps: float
    offset: float = 0.0
    weighted: bool = True  # False: the model keeps no weight for it


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotation of queries and keys by position; `scaling` is config.json's rope_parameters without theta."""

    width: int  # numbers of a head that are rotated, its first
    theta: float
    interleaved: bool = False  # neighbours are a pair; else halves are
    scaling: tuple[tuple[str, object], ...] = ()

    def __post_init__(self) -> None:
        if self.width % 2 or self.width < 2:
            raise ValueError(f"a rotation turns pairs of numbers, not {self.width}")


@dataclass(frozen=True, slots=True)
class Attention:
    """Causal attention of `heads` queries over `groups` keys and values, all `width` wide."""

    heads: int
    groups: int
    width: int
    scale: float
    rope: Rope | None = None
    window: int | None = None  # tokens that a query sees, itself included
    softcap: float = 0.0
    sinks: bool = False
    clip: float | None = None  # queries, keys and values are cut off at ± this
    norm: Norm | None = None  # of queries and keys ...
    # ... of each head with one weight, of each with a weight of its own, or of all heads together
    norm_over: Literal["head", "each", "heads"] = "head"
    norm_after_rope: bool = False


@dataclass(frozen=True, slots=True)
class Experts:
    """Of `count` gated feed-forwards each token uses the `used` likeliest; weights by softmax."""

    count: int
    used: int
    wide: int
    normalised: bool = True  # the weights of those used sum to one
    alpha: float = 1.0  # gate · sigmoid(alpha · gate) · (up + beta), both limited
    beta: float = 0.0
    limit: float = 0.0  # 0: none
    shared: int = 0  # width of a feed-forward that every token uses as well
    shared_gated: bool = False  # ... weighted by a sigmoid of its own


@dataclass(frozen=True, slots=True)
class FeedForward:
    """Gated: down(act(gate(x)) · up(x)); plain: down(act(up(x))); or experts."""

    wide: int
    activation: Activation
    gated: bool = True
    experts: Experts | None = None

    @property
    def widest(self) -> int:
        """Of the vectors between up and down that one token has at once."""
        return self.wide if self.experts is None else max(self.experts.wide, self.experts.shared)


@dataclass(frozen=True, slots=True)
class Block:
    """One decoder block: which norms it has and where follows from `norms`."""

    attention: Attention
    mlp: FeedForward
    norms: tuple[tuple[Placement, Norm], ...]
    parallel: bool = False  # attention and feed-forward both read the block's input
    residual: float = 1.0  # what both add to the residual is multiplied by this

    def norm(self, place: Placement) -> Norm | None:
        return dict(self.norms).get(place)


@dataclass(frozen=True, slots=True)
class Head:
    """Final norm and output matrix; logits are multiplied by `scale`, then capped."""

    norm: Norm | None
    scale: float = 1.0
    softcap: float = 0.0


@dataclass(frozen=True, slots=True)
class Model:
    """All of it. `blocks` are in order; `family` names the line of the table."""

    family: str
    hidden: int
    vocabulary: int
    max_context: int
    blocks: tuple[Block, ...]
    head: Head
    embedding_scale: float = 1.0
    position_offset: int | None = None  # learned positions: the row of position 0; None: there are none

    @property
    def windows(self) -> tuple[int | None, ...]:
        """The different windows of its blocks, in order of appearance."""
        return tuple(dict.fromkeys(block.attention.window for block in self.blocks))

    @property
    def ropes(self) -> tuple[Rope, ...]:
        """The different rotations of its blocks, in order of appearance."""
        return tuple(dict.fromkeys(b.attention.rope for b in self.blocks if b.attention.rope is not None))
