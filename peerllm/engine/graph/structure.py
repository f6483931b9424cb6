"""The description of a model that its graphs are built from: blocks, positions, embedding, head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from peerllm.engine.state import state_kinds
from peerllm.engine.state.state_kinds import LayerState, SequenceArray, TokenArray, keys_and_values

Placement = Literal["before attention", "after attention", "before mlp", "after mlp", "after own input", "final"]
Activation = Literal["silu", "gelu", "gelu_tanh", "relu", "relu2", "quick_gelu"]
MOST = {"channels": 1 << 20, "taps": 64, "state": 1 << 24}  # numbers that are plausible, since memory is taken for them


def _limit(**counts: int) -> None:
    """ValueError unless each count is plausible."""
    for name, count in counts.items():
        if not 1 <= count <= MOST[name]:
            raise ValueError(f"{name} of {count}")


def seen(channels: int, taps: int) -> SequenceArray:
    """What a convolution over `taps` tokens keeps of the tokens before the next."""
    return SequenceArray("convolution", (taps - 1, channels))


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
    gated: bool = False  # what each head gives is multiplied by the sigmoid of a gate that is made beside its query
    value_norm: Norm | None = None  # of each head's values, without a weight
    keys_as_values: bool = False  # values are what keys are before their norm and rotation
    maker: int | None = None  # the block whose keys and values are used; this one makes none

    @property
    def widest(self) -> int:
        """The width of the vectors that a block has several of at once, beside those of the hidden size."""
        return self.heads * self.width

    def state(self, half: bool) -> LayerState:
        """What a layer keeps; `half`: keys and values in float16."""
        return self.read(half) if self.maker is None else LayerState()

    def read(self, half: bool) -> LayerState:
        """What a layer reads, of its own or of its maker's."""
        return keys_and_values(self.groups, self.width, "float16" if half else "float32", self.window)


@dataclass(frozen=True, slots=True)
class ShortConvolution:
    """c · convolution(b · x) over the last `taps` tokens, channel by channel; b, c and x are made from the input."""

    channels: int
    taps: int

    def __post_init__(self) -> None:
        _limit(channels=self.channels, taps=self.taps)

    @property
    def widest(self) -> int:
        return self.channels

    def state(self, half: bool) -> LayerState:
        """What a layer keeps, always in float32."""
        return LayerState(fixed=(seen(self.channels, self.taps),))


@dataclass(frozen=True, slots=True)
class DeltaRule:
    """Linear attention whose state each token decays and corrects (the gated delta rule), after a short convolution.

    A key head serves `heads` / `key_heads` value heads, each with a state [key_width, value_width].
    """

    key_heads: int
    heads: int
    key_width: int
    value_width: int
    taps: int  # tokens that the convolution of queries, keys and values sees
    eps: float  # of the norm of what the heads give
    tiled: bool = False  # value head j belongs to key head j % key_heads, not to j // (heads / key_heads)
    decays_stored: bool = False  # files hold -exp(A_log) in the place of A_log

    def __post_init__(self) -> None:
        _limit(channels=self.channels, state=self.heads * self.key_width * self.value_width, taps=self.taps)
        if self.heads % self.key_heads:
            raise ValueError(f"{self.key_heads} key heads do not divide {self.heads} value heads")

    @property
    def keys(self) -> int:
        """The width of all keys, and of all queries."""
        return self.key_heads * self.key_width

    @property
    def values(self) -> int:
        return self.heads * self.value_width

    @property
    def channels(self) -> int:
        """Of the convolution: queries, keys and values."""
        return 2 * self.keys + self.values

    @property
    def widest(self) -> int:
        return self.keys + self.values

    def state(self, half: bool) -> LayerState:
        """What a layer keeps, always in float32: sums over thousands of tokens."""
        recurrent = SequenceArray("recurrent", (self.heads, self.key_width, self.value_width))
        return LayerState(fixed=(seen(self.channels, self.taps), recurrent))


@dataclass(frozen=True, slots=True)
class StateSpace:
    """Mamba-2: linear attention whose states decay, after a short convolution; keys and queries are a group's."""

    heads: int
    groups: int
    width: int  # of a head's values
    kept: int  # the width of keys and queries
    taps: int  # tokens that the convolution of values, keys and queries sees
    eps: float  # of the norm of what the heads give
    decays_stored: bool = False  # files hold -exp(A_log) in the place of A_log

    def __post_init__(self) -> None:
        _limit(channels=self.channels, state=self.heads * self.width * self.kept, taps=self.taps)
        if self.heads % self.groups:
            raise ValueError(f"{self.heads} heads in {self.groups} groups")

    @property
    def values(self) -> int:
        return self.heads * self.width

    @property
    def keys(self) -> int:
        """The width of all keys, and of all queries."""
        return self.groups * self.kept

    @property
    def channels(self) -> int:
        """Of the convolution: values, keys and queries."""
        return self.values + 2 * self.keys

    @property
    def widest(self) -> int:
        return self.keys + self.values

    def state(self, half: bool) -> LayerState:
        """What a layer keeps, always in float32."""
        recurrent = SequenceArray("recurrent", (self.heads, self.kept, self.width))
        return LayerState(fixed=(seen(self.channels, self.taps), recurrent))


@dataclass(frozen=True, slots=True)
class LatentAttention:
    """Causal attention whose keys and values are made from one latent vector per token, which alone is kept.

    A key is a product of the latent, `plain` wide, beside a rotated part that all heads share; so are queries.
    """

    heads: int
    latent: int
    plain: int
    value_width: int
    scale: float
    rope: Rope
    query_latent: int | None = None  # queries are made from a vector of this width; None: from the input
    eps: float = 1e-6  # of the norms of latents, whatever config.json says
    apart: bool = False  # files hold the matrices for keys and for values apart

    def __post_init__(self) -> None:
        _limit(channels=self.heads * max(self.width, self.query_width, self.value_width))

    @property
    def query_width(self) -> int:
        return self.plain + self.rope.width

    @property
    def kept(self) -> int:
        """Of a token: its latent and the rotated part of its keys."""
        return self.latent + self.rope.width

    @property
    def width(self) -> int:
        """`kept`, rounded up to what the attention operator takes."""
        return -(-self.kept // 8) * 8

    @property
    def widest(self) -> int:
        return self.heads * self.width

    def state(self, half: bool) -> LayerState:
        """What a layer keeps: one vector per token; `half`: in float16."""
        return LayerState((TokenArray("latent", 1, self.width, "float16" if half else "float32"),))


@dataclass(frozen=True, slots=True)
class Routing:
    """How experts are chosen where it is not by softmax alone."""

    scores: Literal["softmax", "sigmoid"]
    biased: bool = False  # a bias is added to the scores by which experts are chosen, not to their weights
    groups: int = 1  # experts lie in so many groups, of which
    groups_used: int = 1  # the best are used,
    best: int = 1  # judged by the sum of so many of their best scores
    eps: float = 0.0  # added to the sum that weights are divided by
    scale: float = 1.0  # factor for all weights


@dataclass(frozen=True, slots=True)
class Experts:
    """`count` gated feed-forwards, of which each token uses the `used` likeliest, weighted by softmax or `routing`."""

    count: int
    used: int
    wide: int
    normalised: bool = True  # the weights of the used experts sum to one
    alpha: float = 1.0  # gate · sigmoid(alpha · gate) · (up + beta), gate and up limited
    beta: float = 0.0
    limit: float = 0.0  # 0: no limit
    shared: int = 0  # width of a feed-forward that every token uses as well; 0: none
    shared_gated: bool = False  # the shared feed-forward is weighted by its own sigmoid
    routing: Routing | None = None


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


Mixer = Attention | LatentAttention | ShortConvolution | DeltaRule | StateSpace  # mixes a token with those before it


@dataclass(frozen=True, slots=True)
class Block:
    """One decoder block; `norms` says where it has norms."""

    mixer: Mixer
    mlp: FeedForward
    norms: tuple[tuple[Placement, Norm], ...]
    parallel: bool = False  # attention and feed-forward both read the block's input
    residual: float = 1.0  # factor for what attention and feed-forward add to the residual
    own_input: int = 0  # numbers of an input that this block alone reads, after the feed-forward; 0: none
    scaled: bool = False  # what comes out is multiplied by a number from the checkpoint

    @property
    def attention(self) -> Attention | None:
        """The mixer, if it attends to earlier tokens."""
        return self.mixer if isinstance(self.mixer, Attention) else None

    def norm(self, place: Placement) -> Norm | None:
        return dict(self.norms).get(place)

    def state(self, half: bool) -> LayerState:
        """What the block keeps of a sequence; `half`: keys and values in float16."""
        return self.mixer.state(half)

    def read(self, half: bool) -> LayerState:
        """What the block reads of a sequence, its own or that of the block whose keys and values it uses."""
        return self.mixer.read(half) if isinstance(self.mixer, Attention) else self.mixer.state(half)


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

    def width(self, block: int) -> int:
        """Numbers in a row before block `block`: the hidden state, and the inputs of the blocks from there on."""
        return self.hidden + sum(one.own_input for one in self.blocks[block:])

    @property
    def units(self) -> tuple[range, ...]:
        """The blocks of each layer between embedding and head: those that share keys and values are one layer."""
        mixers = (block.mixer for block in self.blocks)
        return state_kinds.inseparable([mixer.maker if isinstance(mixer, Attention) else None for mixer in mixers])

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
        return tuple(dict.fromkeys(about.rope for about in self.attentions if about.rope is not None))

    @property
    def attentions(self) -> list[Attention | LatentAttention]:
        """The mixers that attend to earlier tokens."""
        return [block.mixer for block in self.blocks if isinstance(block.mixer, Attention | LatentAttention)]
