"""What lies on this disk, what models need, and which name may be meant."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from peerllm.builtin import MODEL_DIR
from peerllm.cli.demo.demo_memory import sizes_of
from peerllm.daemon.weights.gguf.architectures import ARCHITECTURES
from peerllm.daemon.weights.known_models import (
    FORMS,
    KNOWN,
    MAX_SUGGESTIONS,
    hub_name,
    memory_bytes,
    nearest,
    stored_memory_bytes,
    suggestion,
)
from peerllm.daemon.weights.on_disk import (
    MAX_DIRECTORIES,
    WeightFiles,
    in_hub_cache,
    note_directories,
    served_directories,
    weights_of,
)
from peerllm.stored_types import stored_bytes
from tests.daemon.weights.hub_server import hole

COMMIT = "c" * 40
Shape = tuple[int, ...]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def cached(cache: Path, name: str) -> Path:
    """A model as the hub's library leaves it."""
    repository = cache / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    shutil.copytree(MODEL_DIR, repository / "snapshots" / COMMIT)
    return repository / "snapshots" / COMMIT


def test_the_hub_s_cache_is_listed_with_what_is_whole(cache: Path) -> None:
    assert in_hub_cache() == {}
    first, second = cached(cache, "maker/a-b"), cached(cache, "maker/c")
    (cached(cache, "maker/half") / "model.safetensors").unlink()
    (cached(cache, "maker/bare") / "config.json").unlink()
    (cache / "models--maker--odd").mkdir()
    (cache / "datasets--maker--set").mkdir()
    assert in_hub_cache() == {"maker/a-b": (first,), "maker/c": (second,)}


def test_directories_are_remembered_the_last_served_first(tmp_path: Path) -> None:
    file = tmp_path / "directories.txt"
    assert served_directories(file) == []
    note_directories(file, ["/one"])
    note_directories(file, ["/two"])
    note_directories(file, ["/one"])
    assert served_directories(file) == ["/one", "/two"]
    note_directories(file, [f"/{number}" for number in range(MAX_DIRECTORIES - 1)])
    assert served_directories(file)[-1] == "/one" and len(served_directories(file)) == MAX_DIRECTORIES


def test_weights_are_counted_by_their_headers(tmp_path: Path) -> None:
    held = weights_of((MODEL_DIR,))
    size, numbers = held.nbytes, held.numbers
    assert held.form == "F16"
    assert size == sum(one.stat().st_size for one in MODEL_DIR.glob("*.safetensors"))
    assert 0.9 * size < 2 * numbers <= size, "16-bit numbers"
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 8)
    assert weights_of((tmp_path,)) == WeightFiles(8)
    (tmp_path / "model.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0[]")
    assert weights_of((tmp_path,)) == WeightFiles(10)
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "gptq"}}))
    assert weights_of((tmp_path,)) == WeightFiles(10, {}, "gptq", stored=True)
    assert stored_memory_bytes(weights_of((tmp_path,))) == 12 and stored_memory_bytes(held) == 0


def llama(hidden: int, wide: int, narrow: int, words: int, blocks: int) -> tuple[dict[str, Any], dict[str, Shape]]:
    """A Llama's configuration and its tensors' shapes."""
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": hidden,
        "num_hidden_layers": blocks, "intermediate_size": wide, "num_attention_heads": hidden // 64,
        "num_key_value_heads": narrow // 64, "vocab_size": words, "max_position_embeddings": 8192,
        "tie_word_embeddings": True, "rms_norm_eps": 1e-5, "hidden_act": "silu",
    }  # fmt: skip
    layer: dict[str, Shape] = {f"self_attn.{name}_proj": (hidden, hidden) for name in "qo"}
    layer |= {f"self_attn.{name}_proj": (narrow, hidden) for name in "kv"}
    layer |= {"mlp.up_proj": (wide, hidden), "mlp.gate_proj": (wide, hidden), "mlp.down_proj": (hidden, wide)}
    layer |= {f"{name}_layernorm": (hidden,) for name in ("input", "post_attention")}
    shapes = {f"model.layers.{n}.{name}.weight": shape for n in range(blocks) for name, shape in layer.items()}
    return config, {**shapes, "model.embed_tokens.weight": (words, hidden), "model.norm.weight": (hidden,)}


def smollm2(directory: Path) -> Path:
    """SmolLM2-135M without its weights: a configuration and the tensors' shapes."""
    config, shapes = llama(576, 1536, 192, 49152, 30)
    header: dict[str, Any] = {}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    (directory / "config.json").write_text(json.dumps(config))
    hole(directory / "model.safetensors", header)
    return directory


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_K", "Q6_K", "Q8_0"])
def test_about_what_gguf_files_need_is_what_the_planner_counts(tmp_path: Path, kind: str) -> None:
    config, shapes = llama(512, 1536, 256, 32768, 8)
    types = {name: kind if len(shape) == 2 else "F32" for name, shape in shapes.items()}
    tensors: list[dict[str, Any]] = []
    end = 0
    for name, shape in shapes.items():
        size = stored_bytes(types[name], shape) or 0
        place = {"path": str(tmp_path / "x.gguf"), "offset": end, "nbytes": size}
        tensors.append({"name": name, "dtype": types[name], "shape": shape, **place})
        end += size
    with (tmp_path / "x.gguf").open("wb") as file:
        file.truncate(end)
    matrices = {name: kind for name in types if types[name] == kind}
    config["quantization_config"] = {"quant_method": "gguf", "types": matrices, "paired": False}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "tensors.json").write_text(json.dumps(tensors))
    sizes = sizes_of(tmp_path, 1, 128)
    held = WeightFiles(end, {kind: sum(math.prod(shapes[name]) for name in matrices)}, kind, stored=True)
    assert sum(sizes.blocks) + sizes.head == pytest.approx(stored_memory_bytes(held), rel=0.12)


@pytest.mark.parametrize("bits", [8, 4])
def test_about_what_a_model_needs_is_what_the_planner_counts(tmp_path: Path, bits: int) -> None:
    numbers = weights_of((smollm2(tmp_path),)).numbers
    assert numbers == pytest.approx(134.5e6, rel=0.001)
    sizes = sizes_of(tmp_path, 1, 128, "bfloat16", f"int{bits}")
    assert sum(sizes.blocks) + sizes.head == pytest.approx(memory_bytes(numbers, bits), rel=0.12)


def test_names_that_may_be_meant(cache: Path) -> None:
    assert nearest("smolm2")[0] == "smollm2"
    assert nearest("Qwen/Qwen2.5-05B-Instruct")[0] == "qwen2.5-0.5b"
    assert nearest("bultin") == ["builtin"]
    assert nearest("xyzzy") == []
    assert len(nearest("qwen2.5-7")) == MAX_SUGGESTIONS
    cached(cache, "maker/strange-name")
    assert suggestion("maker/strange-nam") == (
        "; did you mean maker/strange-name? `peerllm models` lists what there is"
    )
    assert suggestion("xyzzy") == suggestion("smollm2") == suggestion(KNOWN[0].hub_id) == suggestion("builtin") == ""


def test_short_names_are_ids_of_the_hub() -> None:
    assert hub_name("smollm2") == hub_name("SmolLM2") == ("HuggingFaceTB/SmolLM2-135M-Instruct", "")
    assert hub_name("qwen3-4b") == ("Qwen/Qwen3-4B-GGUF", "Q4_K_M")
    assert hub_name("Qwen3-4B:q8_0") == ("Qwen/Qwen3-4B-GGUF", "q8_0")
    assert hub_name("maker/name") == ("maker/name", "")
    assert hub_name("maker/name:file.gguf") == ("maker/name", "file.gguf")
    assert {one.form for one in KNOWN} <= set(FORMS)
    assert {one.architecture for one in KNOWN} <= set(ARCHITECTURES)
    assert len({one.name for one in KNOWN}) == len({one.hub_id for one in KNOWN}) == len(KNOWN)
    assert all("/" in one.hub_id and one.name == one.name.lower() for one in KNOWN)


def test_a_header_nested_without_end_is_a_damaged_one(tmp_path: Path) -> None:
    nested = b"[" * 200_000
    (tmp_path / "model.safetensors").write_bytes(len(nested).to_bytes(8, "little") + nested)
    (tmp_path / "config.json").write_bytes(nested)
    assert weights_of((tmp_path,)).numbers == 0
