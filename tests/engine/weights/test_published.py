"""Published quantized checkpoints are read as their formats define, to the last bit, and damaged ones are refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peerllm.engine.graph.config_values import UnfitError
from peerllm.engine.graph.describe import describe
from peerllm.engine.messages import TensorAt
from peerllm.engine.weights.formats.coded_rows import WeightForm
from peerllm.engine.weights.formats.published import published_forms
from peerllm.engine.weights.settled import settled
from peerllm.errors import ModelError
from tests.engine.weights.packers import METHODS, MXFP4, Array, Method, Stored, mxfp4
from tests.sizes import examples

ROWS, COLUMNS = 40, 192
LAYER = "layers.0.self_attn.q_proj"
CONFIG = {"model_type": "llama", "hidden_size": COLUMNS, "intermediate_size": 2 * COLUMNS, "num_attention_heads": 4,
    "vocab_size": 32, "num_hidden_layers": 1}  # fmt: skip
DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "int32": "I32", "int64": "I64", "int8": "I8",
    "uint8": "U8", "float8_e4m3fn": "F8_E4M3"}  # fmt: skip


class Files:
    """A layer's tensors."""

    def __init__(self, tensors: dict[str, Array]) -> None:
        self.arrays = {f"{LAYER}.{name}": array for name, array in tensors.items()}

    def stored(self, name: str) -> Array:
        if name not in self.arrays:
            raise ModelError(f"tensor {name} is missing")
        return self.arrays[name]

    @property
    def listed(self) -> list[tuple[str, TensorAt]]:
        return [
            (name, TensorAt(name, DTYPES[array.dtype.name], array.shape, "", 0, array.nbytes))
            for name, array in self.arrays.items()
        ]


def made(method: Method, rows: int = ROWS, columns: int = COLUMNS, seed: int = 0) -> Stored:
    drawn = np.random.default_rng(seed).standard_normal((rows, columns))
    return method.store(drawn * np.random.default_rng(seed).random((rows, 1)))


def form_of(method: Method, files: Files, **changes: Any) -> WeightForm:
    config = {**CONFIG, "quantization_config": {**method.about, **changes}}
    about = settled(config, files.listed)["quantization_config"]
    form = published_forms(about, config)(f"{LAYER}.weight")
    assert form is not None
    return form


@pytest.mark.parametrize("name", METHODS)
def test_forms_give_the_weights_that_the_format_defines(name: str) -> None:
    method = METHODS[name]
    matrix = made(method)
    files = Files(matrix.tensors)
    form, wanted = form_of(method, files), matrix.weights.astype(np.float32)
    for rows in (slice(None), slice(7, 19), np.array([39, 3, 3, 8])):
        floats = form.floats(files, f"{LAYER}.weight", rows)
        assert floats.dtype == np.float32
        np.testing.assert_array_equal(floats, wanted[rows])
    assert form.bits == method.bits
    if not method.bits:
        with pytest.raises(ModelError, match="no whole-number form"):
            form.coded(files, f"{LAYER}.weight", slice(None))
        return
    coded = form.coded(files, f"{LAYER}.weight", np.array([5, 2]))
    assert (coded.bits, coded.block, coded.zeros is not None) == (form.bits, form.block, form.zeros)
    assert coded.codes.shape == (2, COLUMNS * form.bits // 8)
    assert coded.scales.shape == (2, COLUMNS // form.block)
    assert coded.zeros is None or coded.zeros.shape == coded.scales.shape
    assert (coded.order is not None) == form.ordered == ("order" in name)
    np.testing.assert_array_equal(coded.floats(), wanted[[5, 2]])


@pytest.mark.parametrize("name", METHODS)
def test_forms_ask_for_the_tensors_that_there_are(name: str) -> None:
    matrix = made(METHODS[name])
    files = Files(matrix.tensors)
    asked = dict(form_of(METHODS[name], files).tensors(f"{LAYER}.weight", ROWS, COLUMNS))
    there = {name: array.shape for name, array in files.arrays.items()}
    assert asked.items() <= there.items()
    assert {name.rpartition(".")[2] for name in there.keys() - asked.keys()} <= {"weight_shape", "g_idx"}


def test_mxfp4_stacks_are_whole_numbers() -> None:
    matrix = mxfp4(np.random.default_rng(0).standard_normal((3, 8, 64)))
    name = "layers.0.mlp.experts.gate_up_proj"
    form = published_forms(MXFP4, {"model_type": "gpt_oss", "num_local_experts": 3})(name)
    assert form is not None
    files = Files({})
    files.arrays = {name + kind: array for kind, array in matrix.tensors.items()}
    assert dict(form.tensors(name, 24, 64)) == {name: array.shape for name, array in files.arrays.items()}
    wanted = matrix.weights.reshape(24, 64)
    assert (form.floats(files, name, slice(None)) == wanted).all()
    assert (form.floats(files, name, slice(8, 16)) == wanted[8:16]).all()
    coded = form.coded(files, name, slice(8, 16))
    assert (coded.bits, coded.block, coded.codes.shape, coded.scales.shape) == (8, 32, (8, 64), (8, 2))
    import torch
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    stored = [torch.from_numpy(matrix.tensors[kind]) for kind in ("_blocks", "_scales")]
    theirs = convert_moe_packed_tensors(*stored, dtype=torch.float32).numpy()
    assert (theirs.swapaxes(1, 2) == matrix.weights).all()
    files.arrays[f"{name}_scales"] = np.full_like(files.arrays[f"{name}_scales"], 255)
    with pytest.raises(ModelError, match="stand for no number"):
        form.floats(files, name, slice(0, 1))


WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("GPTQ 4 bits", {"bits": 3}, "by GPTQ to 3 bits"),
    ("GPTQ 4 bits", {"bits": "4"}, "by GPTQ to '4' bits"),
    ("GPTQ 4 bits", {"group_size": 24}, "groups of 24"),
    ("GPTQ 4 bits", {"group_size": 0}, "groups of 0"),
    ("GPTQ 4 bits", {"group_size": 10**30}, "groups of 10000"),
    ("GPTQ 4 bits", {"group_size": None}, "groups of None"),
    ("GPTQ 4 bits", {"checkpoint_format": "marlin"}, "stored as 'marlin'"),
    ("GPTQ 4 bits", {"pack_dtype": "int64"}, "packed into 'int64'"),
    ("GPTQ 4 bits", {"dynamic": {"+:.*down.*": {"bits": 8}}}, "different rules"),
    ("AWQ", {"version": "gemv"}, "stored as 'gemv'"),
    ("AWQ", {"bits": 8}, "by AWQ to 8 bits"),
    ("AWQ", {"zero_point": False}, "without zeros"),
    ("compressed-tensors 4 bits", {"format": "nvfp4-pack-quantized"}, "as 'nvfp4-pack-quantized'"),
    ("compressed-tensors 4 bits", {"format": "int-quantized"}, "to 4 bits as 'int-quantized'"),
    ("compressed-tensors 4 bits", {"config_groups": {}}, "without saying"),
    ("compressed-tensors 4 bits", {"config_groups": {"a": {"weights": None}}}, "without saying"),
    ("compressed-tensors 4 bits", {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity"),
    ("compressed-tensors 4 bits", {"transform_config": {"config_groups": {"a": 1}}}, "transforms"),
    ("FP8", {"weight_block_size": [128]}, r"tiles of \[128\]"),
    ("FP8", {"weight_block_size": [0, 128]}, "tiles of"),
    ("FP8", {"fmt": "e3m4"}, "kind 'e3m4'"),
    ("FP8", {"quant_method": "mxfp4"}, "not a gpt-oss model"),
    ("FP8", {"quant_method": "bitsandbytes"}, "by 'bitsandbytes', which peerllm does not read; take the model's GGUF"),
    ("FP8", {"quant_method": "hqq"}, "by 'hqq'"),
    ("FP8", {"quant_method": None}, "by None"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "changes", "why"), WRONG, ids=lambda value: str(value)[:30])
def test_what_is_not_read_is_refused_in_a_line(name: str, changes: dict[str, Any], why: str) -> None:
    with pytest.raises(ModelError, match=why) as refused:
        form_of(METHODS[name], Files({}), **changes)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 200


def test_groups_with_different_rules_are_refused() -> None:
    about = METHODS["compressed-tensors 4 bits"].about
    one = about["config_groups"]["group_0"]
    other = {**one, "weights": {**one["weights"], "num_bits": 8}}
    with pytest.raises(ModelError, match="different ways"):
        published_forms({**about, "config_groups": {"a": one, "b": other}}, CONFIG)
    assert published_forms({**about, "config_groups": {"a": one, "b": {**one, "targets": ["x"]}}}, CONFIG)("a.weight")


def test_files_say_which_layers_are_floats() -> None:
    method = METHODS["GPTQ 4 bits"]
    files = Files(made(method).tensors)
    plain = np.zeros((4, 4), np.float16)
    files.arrays |= {
        "lm_head.weight": plain, "layers.0.mlp.gate.weight": plain, "norm.weight": plain[0],
        "layers.1.mlp.experts.3.up_proj.weight": plain,
    }  # fmt: skip
    about = settled({"quantization_config": method.about}, files.listed)["quantization_config"]
    assert about["floats"] == ["layers.0.mlp.gate", "layers.1.mlp.experts.0.up_proj", "lm_head"]
    forms = published_forms(about, CONFIG)
    for name in ("lm_head", "layers.0.mlp.gate", "layers.1.mlp.experts.0.up_proj"):
        assert forms(f"{name}.weight") is None
    assert forms("layers.1.mlp.gate.weight") == forms(f"{LAYER}.weight") is not None
    without = published_forms(method.about, CONFIG)
    assert without("lm_head.weight") is without("layers.0.mlp.gate.weight") is None
    assert without("layers.0.mlp.gate_proj.weight") is not None


def test_a_scaled_activation_is_not_ignored() -> None:
    files = Files(made(METHODS["AWQ"]).tensors)
    files.arrays["layers.0.mlp.act.scales"] = np.ones(4, np.float16)
    with pytest.raises(ModelError, match="scaled activations"):
        form_of(METHODS["AWQ"], files)


def test_a_group_that_is_not_contiguous_must_be_whole() -> None:
    method = METHODS["GPTQ 4 bits, in order of activations"]
    matrix = made(method)
    places = matrix.tensors["g_idx"]
    for wrong, why in ((np.where(places == 5, 6, places), "0 to 6 of 6"), (places - 1, "-1 to 4"),
                       (np.where(np.arange(COLUMNS) == 7, 3, places), "more than 32")):  # fmt: skip
        files = Files({**matrix.tensors, "g_idx": wrong.astype(np.int32)})
        with pytest.raises(ModelError, match=why):
            form_of(method, files).floats(files, f"{LAYER}.weight", slice(None))


def test_symmetric_groups_have_the_zero_in_the_middle() -> None:
    method = METHODS["GPTQ 4 bits"]
    matrix = made(method)
    matrix.tensors["qzeros"][1, 2] ^= 1 << 8
    files = Files(matrix.tensors)
    with pytest.raises(ModelError, match="not that of a symmetric"):
        form_of(method, files).floats(files, f"{LAYER}.weight", slice(None))


@pytest.mark.parametrize("bits", [4, 8])
def test_a_zero_of_zero_is_stored_as_the_largest_code(bits: int) -> None:
    method = METHODS[f"GPTQ {bits} bits, zeros" + (", groups of 48" if bits == 8 else "")]
    matrix = made(method)
    whole = Files(matrix.tensors)
    form = form_of(method, whole)
    coded = form.coded(whole, f"{LAYER}.weight", slice(None))
    files = Files({**matrix.tensors, "qzeros": np.full_like(matrix.tensors["qzeros"], -1)})
    wanted = replace(coded, zeros=np.zeros_like(coded.scales, np.uint8)).floats()
    np.testing.assert_array_equal(form.floats(files, f"{LAYER}.weight", slice(None)), wanted)


def test_an_order_that_was_not_kept_is_the_files() -> None:
    method = METHODS["compressed-tensors 4 bits, in order of activations"]
    plain = made(METHODS["compressed-tensors 4 bits"])
    files = Files({**plain.tensors, "weight_g_idx": np.full(COLUMNS, -1, np.int32)})
    floats = form_of(method, files).floats(files, f"{LAYER}.weight", slice(None))
    np.testing.assert_array_equal(floats, plain.weights.astype(np.float32))


@settings(max_examples=examples(150))
@given(st.data())
def test_damaged_tensors_get_a_line(data: st.DataObject) -> None:
    method = METHODS[data.draw(st.sampled_from(sorted(METHODS)))]
    matrix = made(method)
    whole = Files(matrix.tensors)
    form = form_of(method, whole)
    damaged = Files(dict(matrix.tensors))
    name = f"{LAYER}." + data.draw(st.sampled_from(sorted(matrix.tensors)))
    array = damaged.arrays[name]
    what = data.draw(st.sampled_from(["missing", "shape", "type", "numbers"]))
    match what:
        case "missing":
            del damaged.arrays[name]
        case "shape":
            shape = data.draw(st.lists(st.integers(0, 9), max_size=4))
            damaged.arrays[name] = np.zeros(shape, array.dtype)
        case "type":
            damaged.arrays[name] = np.zeros(array.shape, data.draw(st.sampled_from(["f8", "i8", "u1", "i4", "f2"])))
        case "numbers":
            damaged.arrays[name] = np.frombuffer(
                data.draw(st.binary(min_size=array.nbytes, max_size=array.nbytes)), array.dtype
            ).reshape(array.shape)
    try:
        with np.errstate(all="ignore"):
            made_of = form.floats(damaged, f"{LAYER}.weight", slice(None))
    except ModelError as error:
        assert "\n" not in str(error)  # noqa: PT017
        return
    assert made_of.ndim == 2
    assert what == "shape" or made_of.shape == (ROWS, COLUMNS)  # shapes are compared before weights are read


@settings(max_examples=examples(300))
@given(about=st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from([4, 8, 32, -1]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(
        ["weights", "num_bits", "type", "strategy", "group_size", "format", "actorder", "a", "config_groups"]), inner),
    max_leaves=6,
), name=st.sampled_from(sorted(METHODS)), key=st.sampled_from(
    ["bits", "group_size", "sym", "desc_act", "checkpoint_format", "dynamic", "config_groups", "format", "fmt",
     "weight_block_size", "version", "zero_point", "found", "floats", "sparsity_config", "quant_method"]))  # fmt: skip
def test_hostile_configurations_get_a_line(about: Any, name: str, key: str) -> None:
    config = {**CONFIG, "quantization_config": {**METHODS[name].about, key: about}}
    try:
        described = describe(config)
    except UnfitError as error:
        assert "\n" not in str(error)  # noqa: PT017
        return
    assert described.blocks
