"""The description of a model that its graphs are built from: blocks, positions, embedding, head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from peerllm.engine.state import state_kinds
from peerllm.engine.state.state_kinds import LayerState, keys_and_values

Placement = Literal["before attention", "after attention", "before mlp", "after mlp", "final"]
Activation = Literal["silu", "gelu", "gelu_tanh", "relu", "relu2", "quick_gelu"]


@dataclass(frozen=True, slots=True)
class Norm:
    """A normalisation over the last dimension: x · (weight + offset) [+ bias], after centring if kind is "layer"."""

    kind: Literal["rms", "layer"]
    eps: float
    offset: float = 0.0
    weighted: bool = True  # False: the model has no weight for it


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotation of queries and keys by position; `scaling` is config.json's rope_parameters without theta."""

    width: int  # how many of a head's first numbers are rotated
    theta: float
    interleaved: bool = False  # pairs are neighbours; else one number from each half
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
    clip: float | None = None  # queries, keys and values are limited to ± this
    norm: Norm | None = None  # of queries and keys
    # "head": each head is normalised, with one weight for all; "each": with its own weight; "heads": all heads together
    norm_over: Literal["head", "each", "heads"] = "head"
    norm_after_rope: bool = False

    def state(self, half: bool) -> LayerState:
        """What a layer keeps; `half`: keys and values in float16."""
        return keys_and_values(self.groups, self.width, "float16" if half else "float32", self.window)


@dataclass(frozen=True, slots=True)
class Experts:
    """`count` gated feed-forwards, of which each token uses the `used` likeliest, weighted by softmax."""

    count: int
    used: int
    wide: int
    normalised: bool = True  # the weights of the used experts sum to one
    alpha: float = 1.0  # gate · sigmoid(alpha · gate) · (up + beta), gate and up limited
    beta: float = 0.0
    limit: float = 0.0  # 0: no limit
    shared: int = 0  # width of a feed-forward that every token uses as well; 0: none
    shared_gated: bool = False  # the shared feed-forward is weighted by its own sigmoid


@dataclass(frozen=True, slots=True)
class FeedForward:
    """A feed-forward. Gated: down(act(gate(x)) · up(x)); plain: down(act(up(x))); or experts."""

    wide: int
    activation: Activation
    gated: bool = True
    experts: Experts | None = None

    @property
    def widest(self) -> int:
        """The width of the widest vector between up and down."""
        return self.wide if self.experts is None else max(self.experts.wide, self.experts.shared)


@dataclass(frozen=True, slots=True)
class Block:
    """One decoder block; `norms` says where it has norms."""

    attention: Attention
    mlp: FeedForward
    norms: tuple[tuple[Placement, Norm], ...]
    parallel: bool = False  # attention and feed-forward both read the block's input
    residual: float = 1.0  # factor for what attention and feed-forward add to the residual

    def norm(self, place: Placement) -> Norm | None:
        return dict(self.norms).get(place)

    def state(self, half: bool) -> LayerState:
        """What the block keeps of a sequence; `half`: keys and values in float16."""
        return self.attention.state(half)


@dataclass(frozen=True, slots=True)
class Head:
    """Final norm and output matrix. Logits are multiplied by `scale`, then capped."""

    norm: Norm | None
    scale: float = 1.0
    softcap: float = 0.0


@dataclass(frozen=True, slots=True)
class Model:
    """A whole model. `family` names its line in the table."""

    family: str
    hidden: int
    vocabulary: int
    max_context: int
    blocks: tuple[Block, ...]
    head: Head
    embedding_scale: float = 1.0
    position_offset: int | None = None  # the row of position 0 among learned positions; None: no learned positions

    def states(self, half: bool = False) -> list[LayerState]:
        """What each block keeps of a sequence."""
        return [block.state(half) for block in self.blocks]

    @property
    def windows(self) -> tuple[int | None, ...]:
        """The distinct windows of the blocks that keep tokens, in order of appearance."""
        return state_kinds.windows(self.states())

    @property
    def ropes(self) -> tuple[Rope, ...]:
        """The distinct rotations of the blocks, in order of appearance."""
        return tuple(dict.fromkeys(b.attention.rope for b in self.blocks if b.attention.rope is not None))
