"""From a GGUF file's metadata and tensors to config.json, generation_config.json and transformers' tensor names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any

from peerllm.daemon.weights.gguf.architectures import ARCHITECTURES, GGUFArchitecture
from peerllm.daemon.weights.gguf.header import GGUFHeader, shown
from peerllm.daemon.weights.gguf.hyperparameters import Hyperparameters, block_of_tensor
from peerllm.daemon.weights.gguf.token_table import token_table
from peerllm.engine.messages import TensorAt
from peerllm.errors import ModelError
from peerllm.stored_types import PLAIN_FLOATS

# Read into config.json, or for training and other programs only.
UNNAMED = frozenset({"rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"})
UNNAMED_IN_BLOCKS = frozenset({"attn_rot_embd.weight", "attn_rot_embd"})
LATENT_STACKS = ("attn_k_b", "attn_v_b")  # a matrix for each head
CONVOLUTIONS = ("conv.weight", "conv1d.weight")
BARE = frozenset({"attn_sinks", "layer_output_scale"})  # whose names in transformers have no ".weight"
TOKENS: Mapping[str, str] = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}


@dataclass(frozen=True, slots=True)
class Translation:
    """A model directory's contents beside its tokenizer."""

    config: Mapping[str, Any]
    generation: Mapping[str, Any]
    tensors: tuple[TensorAt, ...]


def translate(header: GGUFHeader) -> Translation:
    """Translate a header (of all parts of a split file); ModelError says what is not computed."""
    metadata = header.metadata
    name = str(metadata.get("general.architecture", ""))
    architecture = ARCHITECTURES.get(name)
    if architecture is None:
        known = ", ".join(sorted(ARCHITECTURES))
        raise ModelError(f"{header.path.name} has the architecture {shown(name)}; GGUF files run of: {known}")
    values = Hyperparameters(header.path.name, metadata, header.tensors)
    tensors = tuple(_named(architecture, values, header.tensors))
    stored = {
        "quant_method": "gguf",
        "types": {tensor.name: tensor.dtype for tensor in tensors if tensor.dtype not in PLAIN_FLOATS},
        "paired": architecture.paired,
        "norm_offset_added": architecture.norm_offset_added,
        "decays_stored": architecture.decays_stored,
        "value_heads_tiled": architecture.value_heads_tiled,
        "experts": "stacked",
    }
    table = token_table(metadata)
    ends: dict[str, Any] = {key: table.ids[name] for key, name in TOKENS.items() if name in table.ids}
    config = {**_config(architecture, values, header.tensors), **ends, "quantization_config": stored}
    if config["vocab_size"] != len(table.tokens):
        raise values.wrong(f"has {len(table.tokens)} tokens and an embedding of {config['vocab_size']}")
    stops = {"eos_token_id": list(found)} if (found := table.stop_ids()) else {}
    return Translation(config, {**ends, **stops}, tensors)


def _config(about: GGUFArchitecture, values: Hyperparameters, tensors: Mapping[str, TensorAt]) -> dict[str, Any]:
    heads, width = values.whole("attention.head_count"), values.width
    if not heads or (values.whole("attention.value_length", width) != width and not about.latent):
        raise values.wrong("has keys and values of different widths, which is not computed")
    embedding = tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise values.wrong("has no embedding (token_embd.weight): it is no language model")
    wide = 4 * values.hidden
    config: dict[str, Any] = {
        "model_type": about.model_type,
        "hidden_size": values.hidden,
        "vocab_size": embedding.shape[0],
        "num_hidden_layers": values.blocks,
        "num_attention_heads": heads,
        "num_key_value_heads": values.each("attention.head_count_kv", heads)[0] if about.mixed else values.groups,
        "head_dim": width,
        "intermediate_size": values.each("feed_forward_length", wide)[0]
        if about.mixed
        else values.whole("feed_forward_length", wide),
        "max_position_embeddings": values.whole("context_length"),
        "rms_norm_eps": values.number("attention.layer_norm_rms_epsilon", 0.0)
        or values.number("attention.layer_norm_epsilon", 1e-5),
        "tie_word_embeddings": "output.weight" not in tensors,
        "rope_theta": values.number("rope.freq_base", 10000.0),
        "rope_scaling": values.scaling() or None,
    }
    rotated = values.whole("rope.dimension_count", width)
    if about.partial:
        config["partial_rotary_factor"] = rotated / width
    elif rotated != width and "position_embd.weight" not in tensors and not about.latent:
        raise values.wrong(f"rotates {rotated} of {width} numbers of a head, which is not computed")
    if about.keys.get("head_dim") == "" and width * heads != values.hidden and not about.latent:
        raise values.wrong(f"has {heads} heads of width {width}, which is not computed")
    config = {about.keys.get(key, key): value for key, value in config.items()}
    config.pop("", None)
    return {**config, **about.more(values)}


def _named(about: GGUFArchitecture, values: Hyperparameters, tensors: Mapping[str, TensorAt]) -> Iterator[TensorAt]:
    """The tensors by transformers' names, in the shapes that the graph engine asks for."""
    names = {**about.names, **about.renamed(values)}
    for tensor in tensors.values():
        block = block_of_tensor(tensor.name)
        prefix, rest = (
            (about.prefix, tensor.name) if block is None else (f"{about.prefix}{about.layers}.{block[0]}.", block[1])
        )
        if rest in UNNAMED if block is None else (block[0] >= values.blocks or rest in UNNAMED_IN_BLOCKS):
            continue
        stem, _, end = rest.rpartition(".")
        if rest in names:  # small tensors, whose names in transformers end otherwise
            yield replace(tensor, name=f"{prefix}{names[rest]}", shape=_small_shape(rest, tensor.shape))
        elif block is None and stem == "output":
            yield replace(tensor, name=f"{names.get(stem, 'lm_head')}.{end}")
        elif stem == "attn_qkv" and stem not in names and "attn_q" in names:
            yield from _parted(
                values, tensor, [f"{prefix}{names[role]}.{end}" for role in ("attn_q", "attn_k", "attn_v")]
            )
        elif stem not in names or end not in ("weight", "bias"):
            raise values.wrong(f"has the tensor {shown(tensor.name)}, which is not known there")
        elif "{}" in names[stem]:
            if tensor.shape[0] > values.whole("attention.head_count"):
                raise values.wrong(f"has {shown(tensor.name)} of shape {list(tensor.shape)}, more than its heads")
            yield from _rows(tensor, f"{prefix}{names[stem]}.{end}")
        elif stem in BARE:
            yield replace(tensor, name=f"{prefix}{names[stem]}")
        elif stem in LATENT_STACKS and len(tensor.shape) == 3:
            shape = tensor.shape[0] * tensor.shape[1], tensor.shape[2]
            yield replace(tensor, name=f"{prefix}{names[stem]}.{end}", shape=shape)
        elif stem == "ffn_gate_inp_shexp" and len(tensor.shape) == 1:
            yield replace(tensor, name=f"{prefix}{names[stem]}.{end}", shape=(1, *tensor.shape))
        else:
            yield replace(tensor, name=f"{prefix}{names[stem]}.{end}")


def _small_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape that transformers gives a convolution's weights, or a vector."""
    return (shape[0], 1, shape[1]) if name.endswith(CONVOLUTIONS) and len(shape) == 2 else (prod(shape),)


def _parted(values: Hyperparameters, tensor: TensorAt, names: list[str]) -> Iterator[TensorAt]:
    """Queries, keys and values that the file holds in one matrix, one after the other."""
    counts = (
        values.whole("attention.head_count") * values.width,
        values.groups * values.width,
        values.groups * values.width,
    )
    if tensor.shape[0] != sum(counts):
        raise values.wrong(
            f"has the tensor {shown(tensor.name)} of shape {list(tensor.shape)}, not of {sum(counts)} rows"
        )
    offset, row = tensor.offset, tensor.nbytes // tensor.shape[0]
    for name, count in zip(names, counts, strict=True):
        yield TensorAt(name, tensor.dtype, (count, *tensor.shape[1:]), tensor.path, offset, count * row)
        offset += count * row


def _rows(tensor: TensorAt, name: str) -> Iterator[TensorAt]:
    """Each row of a matrix as a tensor of its own."""
    row = tensor.nbytes // tensor.shape[0]
    for number in range(tensor.shape[0]):
        place = tensor.offset + number * row
        yield TensorAt(name.format(number), tensor.dtype, tensor.shape[1:], tensor.path, place, row)
