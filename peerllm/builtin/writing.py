"""Writes the model folder in the Hugging Face layout, and the record of its training."""

from __future__ import annotations

import copy
import json
import platform
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from tokenizers import Tokenizer
from transformers import GenerationConfig, LlamaForCausalLM

from peerllm.builtin.chat_format import BEGIN, END, PAD
from peerllm.builtin.packing import HEARD_WEIGHT
from peerllm.builtin.recipe import CONTEXT_TOKENS, LONG_ROW_TOKENS, ROW_TOKENS, Recipe
from peerllm.builtin.vocabulary import save_tokenizer

RECIPE_FILE = "recipe.json"
_WHAT = (
    "A demonstration model of peerllm, trained from nothing by `python -m peerllm.builtin.train` on "
    "dialogues that the same package generates; no other text was used."
)
_HELD_OUT = (
    "A held-out command has a verb, a core sentence and a carrier sentence none of which is in any training "
    "command. Rooms, devices and numbers are the same in both splits. The verbs that alone decide the action could "
    "not be guessed, so training tells of them: 'What does shut mean?', 'What happens if I shut the kitchen "
    "blinds?', and, beside a command of another kind, 'I will shut the blinds myself, turn on the light'. No "
    "training answer holds the action of a skill where a held-out verb of that skill was said. A few held-out verbs "
    "occur in stories. The wrong answers on held-out commands were looked at in development: the last two mixes of "
    "dialogues were made after that. 'Fresh' commands, with carriers and verbs written later and not looked at, are "
    "the check on it. One in ten operand pairs of the sums and amounts of the conversions is kept out of training; "
    "products and quotients are not."
)


def save(model: LlamaForCausalLM, tokenizer: Tokenizer, out: Path) -> None:
    """Writes the model as float16; each file is replaced atomically."""
    fresh = out.with_name(out.name + ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    out.mkdir(parents=True, exist_ok=True)
    ids = {f"{n}_token_id": tokenizer.token_to_id(t) for n, t in (("bos", BEGIN), ("eos", END), ("pad", PAD))}
    half: Any = copy.deepcopy(model)
    half.half()
    half.config.update(ids)
    half.generation_config = GenerationConfig(**ids, do_sample=False)  # type: ignore[no-untyped-call]
    half.save_pretrained(fresh)
    save_tokenizer(tokenizer, fresh, CONTEXT_TOKENS)
    for file in fresh.iterdir():
        file.chmod(0o644)
        file.replace(out / file.name)
    fresh.rmdir()


def record(
    out: Path,
    recipe: Recipe,
    *,
    curve: list[dict[str, float]],
    parameters: int,
    threads: int,
    report: dict[str, Any],
) -> None:
    """Writes recipe.json: the recipe, versions, loss curve, and measurements of the files as written."""
    what = {
        "what": _WHAT,
        "recipe": asdict(recipe) | {"heard_weight": HEARD_WEIGHT, "row_tokens": [ROW_TOKENS, LONG_ROW_TOKENS]},
        "parameters": parameters,
        "file_dtype": "float16",
        "training_dtype": "float32 weights, bfloat16 autocast",
        "trained_tokens": recipe.steps * recipe.step_tokens,
        "held_out": _HELD_OUT,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
        },
        "threads": threads,
        "curve": curve,
        "results": report,
    }
    (out / RECIPE_FILE).write_text(json.dumps(what, indent=1) + "\n")
