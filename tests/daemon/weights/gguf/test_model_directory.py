"""Model directories of GGUF files: written once, whole, and again when the file is another."""

from __future__ import annotations

import json
import os
import threading
import time
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from peerllm.api.text.pooling_file import pooling_of
from peerllm.daemon.weights.gguf import model_directory as module
from peerllm.daemon.weights.gguf.model_directory import MOST_KEPT, model_directory
from peerllm.engine.weights.checkpoint import read_tensors
from peerllm.errors import ModelError
from tests.daemon.weights.gguf.gguf_models import vocabulary

HIDDEN, HEADS, GROUPS, WIDTH, WIDE, TOKENS = 64, 4, 2, 16, 96, 40
FLOATS = np.float32


def matrices(blocks: range) -> dict[str, Any]:
    shapes = {
        "attn_norm": (HIDDEN,), "ffn_norm": (HIDDEN,), "attn_q": (HEADS * WIDTH, HIDDEN),
        "attn_k": (GROUPS * WIDTH, HIDDEN), "attn_v": (GROUPS * WIDTH, HIDDEN), "attn_output": (HIDDEN, HEADS * WIDTH),
        "ffn_gate": (WIDE, HIDDEN), "ffn_up": (WIDE, HIDDEN), "ffn_down": (HIDDEN, WIDE),
    }  # fmt: skip
    drawn = np.random.default_rng(0)
    return {
        f"blk.{number}.{name}.weight": drawn.random(shape, FLOATS)
        for number in blocks
        for name, shape in shapes.items()
    }


def write(
    path: Path, tensors: dict[str, Any] | None = None, split: tuple[int, int, int] | None = None, arch: str = "llama",
    **values: Any,
) -> Path:  # fmt: skip
    """A small model of two blocks, or a part of one; `values` are metadata with _ for the dots of a key."""
    writer = gguf.GGUFWriter(path, arch)
    about: dict[str, Any] = {
        "block_count": 2, "embedding_length": HIDDEN, "attention.head_count": HEADS, "context_length": 512,
        "attention.head_count_kv": GROUPS, "feed_forward_length": WIDE, "attention.layer_norm_rms_epsilon": 1e-5,
    }  # fmt: skip
    for key, value in {**about, **vocabulary(TOKENS), **values}.items():
        full = key if key.startswith("tokenizer.") else f"{arch}.{key}"
        if value is not None:
            writer.add_key_value(full, value, gguf.GGUFValueType.get_type(value))
    if split is not None:
        for key, value in zip(("split.no", "split.count", "split.tensors.count"), split, strict=True):
            writer.add_uint16(key, value)
    if tensors is None:
        ends = {"token_embd.weight": np.ones((TOKENS, HIDDEN), FLOATS), "output_norm.weight": np.ones(HIDDEN, FLOATS)}
        tensors = {**ends, **matrices(range(2))}
    for name, array in tensors.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def config_of(directory: Path) -> dict[str, Any]:
    return dict(json.loads((directory / "config.json").read_text()))


def test_it_is_called_as_the_model_is_and_says_where_its_tensors_lie(tmp_path: Path) -> None:
    file = write(tmp_path / "Model-F32.gguf")
    directory = model_directory([file], tmp_path / "cache")
    assert directory.name == "Model-F32"
    tensors = read_tensors(directory)
    assert len(tensors) == 20
    place = tensors["model.layers.1.self_attn.k_proj.weight"]
    assert (place.dtype, place.shape, place.path) == ("F32", (GROUPS * WIDTH, HIDDEN), str(file))
    found = np.fromfile(file, FLOATS, place.nbytes // 4, offset=place.offset).reshape(place.shape)
    assert (found == matrices(range(2))["blk.1.attn_k.weight"]).all()


@pytest.mark.parametrize(
    ("kind", "pooling"),
    [(None, "mean"), (0, "mean"), (1, "mean"), (2, "cls_token"), (3, "last"), (4, "rank"), (9, "9")],
)
def test_its_header_says_how_vectors_are_made(tmp_path: Path, kind: int | None, pooling: str) -> None:
    directory = model_directory([write(tmp_path / "m.gguf", pooling_type=kind)], tmp_path / "cache")
    if pooling in ("mean", "last"):
        assert pooling_of(directory) == pooling
    else:
        with pytest.raises(ModelError, match=f"{pooling}, which cannot be done here"):
            pooling_of(directory)


def test_it_is_written_once_for_a_file_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path / "m.gguf")
    first = model_directory([file], tmp_path / "cache")
    read: list[Path] = []
    real = module.read_gguf
    monkeypatch.setattr(module, "read_gguf", lambda path: read.append(path) or real(path))
    assert model_directory([file], tmp_path / "cache") == first
    assert not read
    write(file, rope_dimension_count=WIDTH)  # another size
    other = model_directory([file], tmp_path / "cache")
    assert other != first
    os.utime(file, ns=(1, 1))
    third = model_directory([file], tmp_path / "cache")
    write(file)
    os.utime(file, ns=(1, 1))  # another size alone
    assert len({first, other, third, model_directory([file], tmp_path / "cache")}) == 4
    assert read == [file, file, file]


def test_two_at_once_write_one(tmp_path: Path) -> None:
    file = write(tmp_path / "m.gguf")
    found: list[Path] = []
    threads = [
        threading.Thread(target=lambda: found.append(model_directory([file], tmp_path / "cache"))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert len(set(found)) == 1
    assert [entry.name for entry in (tmp_path / "cache").iterdir()] == [found[0].parent.name]


def test_who_comes_second_leaves_what_is_there(tmp_path: Path) -> None:
    place = tmp_path / "place"
    for content in (b"first", b"second"):
        module._write({"a": content}, place, "m")
    assert (place / "m" / "a").read_bytes() == b"first"
    with pytest.raises(OSError, match="place"):
        module._write({"a": b"third"}, place, "another name")


def test_those_that_were_not_used_for_longest_go(tmp_path: Path) -> None:
    file, cache = write(tmp_path / "m.gguf"), tmp_path / "cache"
    kept = model_directory([file], cache)
    now = time.time()
    for number in range(MOST_KEPT + 3):
        (cache / f"old{number}").mkdir()
        os.utime(cache / f"old{number}", (now - 1000 + number, now - 1000 + number))
    os.utime(kept.parent, (1, 1))
    model_directory([file], cache)  # used now; nothing is written, nothing goes
    (cache / ".new-one").mkdir()  # being written
    os.utime(cache / ".new-one", (1, 1))
    os.utime(file, ns=(1, 1))
    new = model_directory([file], cache)
    left = {entry.name for entry in cache.iterdir()}
    assert len(left) == MOST_KEPT + 1
    assert ".new-one" in left
    assert {kept.parent.name, new.parent.name, f"old{MOST_KEPT + 2}"} <= left
    assert "old4" not in left


def test_a_damaged_file_leaves_nothing_behind(tmp_path: Path) -> None:
    file = write(tmp_path / "m.gguf")
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ModelError, match="cut short"):
        model_directory([file], tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(ModelError, match="cannot be written"):
        model_directory([write(tmp_path / "m.gguf")], tmp_path / "cache")


def test_parts_are_one_model(tmp_path: Path) -> None:
    whole = write(tmp_path / "whole.gguf")
    names = [tmp_path / f"m-{number:05}-of-00002.gguf" for number in (1, 2)]
    ends = {"token_embd.weight": np.ones((TOKENS, HIDDEN), FLOATS), "output_norm.weight": np.ones(HIDDEN, FLOATS)}
    write(names[0], {**ends, **matrices(range(1))}, (0, 2, 20))
    write(names[1], matrices(range(1, 2)), (1, 2, 20), block_count=None, **dict.fromkeys(vocabulary(1)))
    directory = model_directory(names, tmp_path / "cache")
    assert directory.name == "m"
    tensors = read_tensors(directory)
    assert tensors.keys() == read_tensors(model_directory([whole], tmp_path / "cache")).keys()
    assert tensors["model.layers.1.mlp.up_proj.weight"].path == str(names[1])
    with pytest.raises(ModelError, match=r"m-00001-of-00002.gguf is part 0 of 2 by its header"):
        model_directory(names[:1], tmp_path / "cache")
    with pytest.raises(ModelError, match=r"m-00002-of-00002.gguf is part 1 of 2 by its header \(from 0\), not 0 of 2"):
        model_directory(names[::-1], tmp_path / "cache")
    write(names[1], matrices(range(1)), (1, 2, 20))
    with pytest.raises(ModelError, match="which an earlier part has too"):
        model_directory(names, tmp_path / "cache")
    write(names[1], {"output.weight": np.ones((TOKENS, HIDDEN), FLOATS)}, (1, 2, 20))
    with pytest.raises(ModelError, match="have 12 tensors, not 20"):
        model_directory(names, tmp_path / "cache")


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"arch": "mamba"}, "has the architecture 'mamba'; GGUF files run of: arcee, chatglm,"),
    ({"block_count": None}, "does not say its block_count"),
    ({"embedding_length": "many"}, "says embedding_length is many"),
    ({"attention.head_count_kv": [2, 1]}, "blocks that differ in attention.head_count_kv"),
    ({"attention.value_length": 32}, "keys and values of different widths"),
    ({"rope.dimension_count": 8}, "rotates 8 of 16 numbers"),
    ({"rope.freq_base": float("nan")}, "says rope.freq_base is nan"),
    ({"rope.scaling.type": "spiral", "rope.scaling.factor": 2.0}, "stretches its rotations as 'spiral'"),
    ({"expert_count": 4, "expert_used_count": 2}, "no stacks of experts in block 0"),
    ({"expert_count": 4, "expert_used_count": 2, "expert_group_count": 2}, "experts by groups"),
    ({"tensors": {}}, "has no embedding"),
    ({"arch": "stablelm", "attention.key_length": 24, "attention.value_length": 24}, "has 4 heads of width 24"),
]


@pytest.mark.parametrize(("values", "said"), REFUSED, ids=[said for _, said in REFUSED])
def test_what_is_not_computed_is_refused_in_one_line(values: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError) as caught:
        model_directory([write(tmp_path / "m.gguf", **values)], tmp_path / "cache")
    assert said in str(caught.value)
    assert "m.gguf" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["blk.0.attn_sub_norm.weight", "blk.1.attn_q.scale", "cls.weight"])
def test_a_tensor_that_is_not_known_is_not_left_out_silently(name: str, tmp_path: Path) -> None:
    tensors = {"token_embd.weight": np.ones((TOKENS, HIDDEN), FLOATS), name: np.ones(4, FLOATS)}
    with pytest.raises(ModelError, match=f"has the tensor '{name}', which is not known there"):
        model_directory([write(tmp_path / "m.gguf", tensors)], tmp_path / "cache")


def test_drafting_blocks_and_what_is_read_into_the_configuration_are_no_tensors_of_the_model(tmp_path: Path) -> None:
    ends = {"token_embd.weight": np.ones((TOKENS, HIDDEN), FLOATS), "rope_freqs.weight": np.full(8, 2.0, FLOATS)}
    drafting = {"blk.2.nextn.eh_proj.weight": np.ones((4, 4), FLOATS), "blk.2.attn_q.weight": np.ones((4, 4), FLOATS)}
    file = write(tmp_path / "m.gguf", {**ends, **matrices(range(2)), **drafting}, block_count=3, nextn_predict_layers=1)
    directory = model_directory([file], tmp_path / "cache")
    assert config_of(directory)["num_hidden_layers"] == 2
    assert config_of(directory)["rope_scaling"] == {"rope_type": "divided", "divisors": [2.0] * 8}
    assert not [name for name in read_tensors(directory) if ".2." in name or "rope" in name]


def test_queries_keys_and_values_in_one_matrix_are_parted(tmp_path: Path) -> None:
    tensors = matrices(range(2))
    merged = np.random.default_rng(1).random(((HEADS + 2 * GROUPS) * WIDTH, HIDDEN), FLOATS)
    for role in "qkv":
        del tensors[f"blk.0.attn_{role}.weight"]
    ends = {"token_embd.weight": np.ones((TOKENS, HIDDEN), FLOATS), "blk.0.attn_qkv.weight": merged}
    file = write(tmp_path / "m.gguf", {**ends, **tensors})
    found = read_tensors(model_directory([file], tmp_path / "cache"))
    parts = [found[f"model.layers.0.self_attn.{role}_proj.weight"] for role in "qkv"]
    read = [np.fromfile(file, FLOATS, one.nbytes // 4, offset=one.offset).reshape(one.shape) for one in parts]
    assert [len(one) for one in read] == [HEADS * WIDTH, GROUPS * WIDTH, GROUPS * WIDTH]
    assert (np.concatenate(read) == merged).all()
    ends["blk.0.attn_qkv.weight"] = merged[1:]
    with pytest.raises(ModelError, match=r"'blk\.0\.attn_qkv\.weight' of shape"):
        model_directory([write(file, {**ends, **tensors})], tmp_path / "cache")


def test_answers_end_at_the_tokens_that_the_file_names_or_that_are_known_to(tmp_path: Path) -> None:
    tokens = [*vocabulary(TOKENS)["tokenizer.ggml.tokens"][:-2], "<|im_end|>", "</s>"]
    about = {
        "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": TOKENS - 1,
        "tokenizer.ggml.padding_token_id": 5,
    }  # fmt: skip
    directory = model_directory([write(tmp_path / "m.gguf", **about)], tmp_path / "cache")
    generation = json.loads((directory / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 1, "eos_token_id": [TOKENS - 1, TOKENS - 2], "pad_token_id": 5}
    config = config_of(directory)
    assert [config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")] == [1, TOKENS - 1, 5]


def test_its_tokenizer_is_that_of_the_file(tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    directory = model_directory([write(tmp_path / "m.gguf")], tmp_path / "cache")
    assert Tokenizer.from_file(str(directory / "tokenizer.json")).encode("aba").ids == [2, 0]
    with pytest.raises(ModelError, match=f"has {TOKENS + 1} tokens and an embedding of {TOKENS}"):
        model_directory([write(tmp_path / "n.gguf", **vocabulary(TOKENS + 1))], tmp_path / "cache")
    with pytest.raises(ModelError, match="has no tokenizer"):
        model_directory([write(tmp_path / "o.gguf", **{"tokenizer.ggml.model": None})], tmp_path / "cache")


SCALINGS: list[tuple[dict[str, Any], dict[str, Any] | None]] = [
    ({}, None),
    ({"rope.scaling.type": "none", "rope.scaling.factor": 4.0}, None),
    ({"rope.scaling.factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
    ({"rope.scale_linear": 4.0}, {"rope_type": "linear", "factor": 4.0}),
    (
        {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512},
    ),
    (
        {
            "rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 128,
            "rope.scaling.yarn_beta_fast": 8.0, "rope.scaling.yarn_beta_slow": 2.0, "rope.scaling.attn_factor": 1.5,
        },
        {
            "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "beta_fast": 8.0,
            "beta_slow": 2.0, "attention_factor": 1.5,
        },
    ),
]  # fmt: skip


@pytest.mark.parametrize(("values", "scaling"), SCALINGS)
def test_stretched_rotations(values: dict[str, Any], scaling: dict[str, Any] | None, tmp_path: Path) -> None:
    directory = model_directory([write(tmp_path / "m.gguf", **values)], tmp_path / "cache")
    assert config_of(directory)["rope_scaling"] == scaling


@pytest.mark.parametrize(
    ("divisors", "values", "said"),
    [
        (np.ones((2, 4), FLOATS), {}, r"rope_freqs.weight of F32 \[2, 4\]"),
        (np.ones(8, np.float16), {}, "rope_freqs.weight of F16"),
        (np.zeros(8, FLOATS), {}, "unusable numbers"),
        (np.ones(8, FLOATS), {"rope.scaling.factor": 2.0}, "twice"),
    ],
)
def test_unusable_divisors_are_named(divisors: Any, values: dict[str, Any], said: str, tmp_path: Path) -> None:
    tensors = {"token_embd.weight": np.ones((TOKENS, HIDDEN), FLOATS), "rope_freqs.weight": divisors}
    with pytest.raises(ModelError, match=said):
        model_directory([write(tmp_path / "m.gguf", tensors, **values)], tmp_path / "cache")


def test_norms_of_more_heads_than_there_are_are_refused(tmp_path: Path) -> None:
    """Each row of such a tensor becomes one of its own, and a file may claim billions of rows."""
    many = {"blk.0.attn_q_norm.weight": np.ones((HEADS + 1, WIDTH), FLOATS)}
    file = write(tmp_path / "m.gguf", {**matrices(range(2)), **many}, arch="stablelm")
    with pytest.raises(ModelError, match="more than its heads"):
        model_directory([file], tmp_path / "cache")
