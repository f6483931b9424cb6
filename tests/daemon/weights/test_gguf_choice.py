"""Which GGUF files are meant, by their names alone."""

from __future__ import annotations

import pytest

from peerllm.daemon.weights.gguf_choice import PREFERRED, chosen, gguf_models, quantisation
from peerllm.errors import BadInputError, NotFoundError

SIZES = {
    "README.md": 1,
    "mmproj-model-f16.gguf": 7,
    "imatrix.gguf": 7,
    "m-Q4_K_M.gguf": 400,
    "m-Q8_0.gguf": 800,
    "m-UD-Q4_K_XL.gguf": 450,
    "BF16/m-BF16-00001-of-00002.gguf": 900,
    "BF16/m-BF16-00002-of-00002.gguf": 700,
    "m-Q6_K-00001-of-00002.gguf": 300,  # the other part is missing
}


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("Qwen3-4B-Q4_K_M.gguf", "Q4_K_M"),
        ("gemma-3-4b-it-q4_0.gguf", "Q4_0"),
        ("Q4_K_M/M-Q8_0-00001-of-00002.gguf", "Q8_0"),
        ("SmolLM2-135M-Instruct.Q4_1.gguf", "Q4_1"),
        ("x-UD-Q4_K_XL.gguf", "UD-Q4_K_XL"),
        ("gpt-oss-20b-mxfp4.gguf", "MXFP4"),
        ("model.fp16.gguf", "F16"),
        ("Qwen3.5-4B-IQ4_NL.gguf", "IQ4_NL"),
        ("tinyllama_q8_0.gguf", "Q8_0"),
        ("Qwen3-4B.gguf", ""),
    ],
)
def test_a_file_s_name_tells_its_quantisation(file: str, name: str) -> None:
    assert quantisation(file) == name


def test_models_are_whole_and_the_preferred_one_comes_first() -> None:
    found = gguf_models(SIZES)
    assert [one.quantisation for one in found] == ["Q4_K_M", "Q8_0", "UD-Q4_K_XL", "BF16"]
    assert found[-1].files == ("BF16/m-BF16-00001-of-00002.gguf", "BF16/m-BF16-00002-of-00002.gguf")
    assert found[-1].nbytes == 1600
    assert gguf_models({"a-IQ1_S.gguf": 1, "b-IQ2_M.gguf": 2, "c-F16.gguf": 9})[0].quantisation == "F16"
    odd = gguf_models({"a-IQ1_S.gguf": 2, "b-IQ2_M.gguf": 1})
    assert [one.nbytes for one in odd] == [1, 2], "the smallest first"
    for number, name in enumerate(PREFERRED):
        rest = {f"m-{other}.gguf": 1 for other in reversed(PREFERRED[number:])}
        assert chosen("o/r", gguf_models(rest), "").quantisation == name


@pytest.mark.parametrize(
    ("tag", "name"),
    [
        ("", "Q4_K_M"),
        ("latest", "Q4_K_M"),
        ("q8_0", "Q8_0"),
        ("Q4_k_XL", "UD-Q4_K_XL"),
        ("ud-q4_k_xl", "UD-Q4_K_XL"),
        ("bf16", "BF16"),
        ("m-Q8_0.gguf", "Q8_0"),
        ("m-q8_0", "Q8_0"),
        ("BF16/m-BF16-00001-of-00002.gguf", "BF16"),
        ("m-BF16-00002-of-00002.gguf", "BF16"),
        ("m-bf16", "BF16"),
    ],
)
def test_a_tag_means_a_quantisation_or_a_file_in_any_case(tag: str, name: str) -> None:
    assert chosen("o/r", gguf_models(SIZES), tag).quantisation == name


def test_another_tag_lists_what_there_is() -> None:
    with pytest.raises(NotFoundError) as caught:
        chosen("o/r", gguf_models(SIZES), "Q9_K")
    assert str(caught.value) == (
        "o/r has no Q9_K; there are Q4_K_M (400 bytes), Q8_0 (800 bytes), UD-Q4_K_XL (450 bytes), BF16 (1.60 kB)"
    )
    with pytest.raises(NotFoundError, match=r"holds no GGUF files; leave out :Q8_0$"):
        chosen("o/r", [], "Q8_0")
    one = {"a-Q8_0.gguf": 1, "b-Q8_0.gguf": 2}
    with pytest.raises(BadInputError, match=r"o/r:a-Q8_0\.gguf, o/r:b-Q8_0\.gguf"):
        chosen("o/r", gguf_models(one), "q8_0")
    assert chosen("o/r", gguf_models(one), "b-Q8_0").files == ("b-Q8_0.gguf",)
    assert chosen("o/r", gguf_models({"model.gguf": 1}), "").tag == "model.gguf"
