"""Models that many people run: their short names, what they are on the hub, and about what they need."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches

from peerllm.daemon.weights.on_disk import in_hub_cache

BUILTIN = "builtin"
SCALE_BITS = 1.0  # of each rounded number: 64 to 128 of them share 12 bytes
SPARE = 1.1  # of the weights: norms, what a pass works with, and a little room for keys and values
MAX_SUGGESTIONS = 3
LIKENESS = 0.6  # from which a name may be meant


@dataclass(frozen=True, slots=True)
class KnownModel:
    """`hub_id` on the Hugging Face hub, in 16-bit numbers; gated ones ask for an account."""

    name: str
    hub_id: str
    millions: int  # of parameters
    layers: int
    gated: bool = False

    @property
    def download_bytes(self) -> int:
        return 2 * self.millions * 10**6


def memory_bytes(parameters: float, bits: int) -> int:
    """About what all devices together lend to a model whose weights are rounded to `bits`."""
    return int(SPARE * parameters * (bits + SCALE_BITS) / 8)


KNOWN = (
    KnownModel("smollm2-135m", "HuggingFaceTB/SmolLM2-135M-Instruct", 135, 30),
    KnownModel("smollm2-360m", "HuggingFaceTB/SmolLM2-360M-Instruct", 362, 32),
    KnownModel("smollm2", "HuggingFaceTB/SmolLM2-1.7B-Instruct", 1711, 24),
    KnownModel("qwen2.5-0.5b", "Qwen/Qwen2.5-0.5B-Instruct", 494, 24),
    KnownModel("qwen2.5-1.5b", "Qwen/Qwen2.5-1.5B-Instruct", 1544, 28),
    KnownModel("qwen2.5-3b", "Qwen/Qwen2.5-3B-Instruct", 3086, 36),
    KnownModel("qwen2.5-7b", "Qwen/Qwen2.5-7B-Instruct", 7616, 28),
    KnownModel("qwen2.5-14b", "Qwen/Qwen2.5-14B-Instruct", 14770, 48),
    KnownModel("qwen2.5-32b", "Qwen/Qwen2.5-32B-Instruct", 32764, 64),
    KnownModel("qwen2.5-72b", "Qwen/Qwen2.5-72B-Instruct", 72706, 80),
    KnownModel("tinyllama", "TinyLlama/TinyLlama-1.1B-Chat-v1.0", 1100, 22),
    KnownModel("llama3.2-1b", "meta-llama/Llama-3.2-1B-Instruct", 1236, 16, gated=True),
    KnownModel("llama3.2-3b", "meta-llama/Llama-3.2-3B-Instruct", 3213, 28, gated=True),
    KnownModel("llama3.1-8b", "meta-llama/Llama-3.1-8B-Instruct", 8030, 32, gated=True),
    KnownModel("llama3.3-70b", "meta-llama/Llama-3.3-70B-Instruct", 70554, 80, gated=True),
    KnownModel("mistral-7b", "mistralai/Mistral-7B-Instruct-v0.3", 7248, 32),
    KnownModel("gemma2-2b", "google/gemma-2-2b-it", 2614, 26, gated=True),
    KnownModel("gemma2-9b", "google/gemma-2-9b-it", 9242, 42, gated=True),
)
_BY_NAME = {one.name: one for one in KNOWN}


def hub_id(model: str) -> str:
    """What a model is called on the hub: a short name's id, anything else as it is."""
    known = _BY_NAME.get(model.lower())
    return known.hub_id if known is not None else model


def nearest(model: str, others: Iterable[str] = ()) -> list[str]:
    """The names that may be meant, the likeliest first: short ones, and `others`."""
    wanted = model.lower().rpartition("/")[2]
    called = {one.hub_id.lower().rpartition("/")[2]: one.name for one in KNOWN} | {one: one for one in _BY_NAME}
    called |= {BUILTIN: BUILTIN} | {other.lower().rpartition("/")[2]: other for other in others}
    close = get_close_matches(wanted, called, n=2 * MAX_SUGGESTIONS, cutoff=LIKENESS)
    return list(dict.fromkeys(called[one] for one in close))[:MAX_SUGGESTIONS]


def suggestion(model: str) -> str:
    """ "; did you mean NAME?" for the end of an error's line; "" where no name is like it, or it is known itself."""
    if model == BUILTIN or hub_id(model) != model or any(model == one.hub_id for one in KNOWN):
        return ""
    names = nearest(model, (name for name, _ in in_hub_cache()))
    return f"; did you mean {' or '.join(names)}? `peerllm models` lists what there is" if names else ""
