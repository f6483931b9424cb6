"""The token list of a GGUF file's metadata, checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from peerllm.errors import ModelError

MAX_TOKENS = 1 << 20
MAX_CHARS = 1 << 25  # of all tokens, or of all merges; those of Gemma 4 have 5 million
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # tokenizer.ggml.token_type
_NAMES = ("bos", "eos", "unknown", "padding", "eot", "eom")  # tokenizer.ggml.NAME_token_id

_STOP_TEXTS = frozenset({
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "<end_of_turn>",
    "<|endoftext|>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>", "<end_of_utterance>",
    "<eos>", "<turn|>", "<|tool_response>", "<｜end▁of▁sentence｜>", "[e~[",
})  # fmt: skip
_PARTS_OF_AN_ANSWER = ({"<|return|>", "<|call|>"}, {"<|calls|>", "<|flush|>"})  # beside these, <|end|> ends a part only
_SPM_IDS: Mapping[str, int] = {"unknown": 0, "bos": 1, "eos": 2}  # where a "llama" file leaves them out


@dataclass(frozen=True, slots=True)
class TokenTable:
    """All tokens by id; `model` is one of `TOKENIZER_MODELS`."""

    model: str
    tokens: Sequence[str]  # no two alike
    kinds: npt.NDArray[np.int64]  # [tokens] NORMAL, ...
    ids: Mapping[str, int]  # of `_NAMES`, those that the file has

    def stop_ids(self) -> tuple[int, ...]:
        """What ends an answer: the end of the text first, then those that end a turn, by id or by their usual text."""
        named = [self.ids[name] for name in ("eos", "eot", "eom") if name in self.ids]
        return tuple(dict.fromkeys([*named, *self.turn_ends()]))

    def turn_ends(self) -> tuple[int, ...]:
        """The tokens that end a turn by their text, whatever kind the file gives them."""
        found = {
            text: number
            for number, text in enumerate(self.tokens)
            if text in _STOP_TEXTS or (text == "</s>" and self.kinds[number] == CONTROL)  # elsewhere it is HTML
        }
        if any(found.keys() >= texts for texts in _PARTS_OF_AN_ANSWER):
            found.pop("<|end|>", None)
        return tuple(found.values())


TOKENIZER_MODELS = ("gpt2", "llama", "gemma4")


def token_table(metadata: Mapping[str, Any]) -> TokenTable:
    """What a GGUF file says of its tokens; ModelError where that is missing, inconsistent or unknown."""
    model = metadata.get("tokenizer.ggml.model")
    if model is None:
        raise ModelError("the GGUF file has no tokenizer (tokenizer.ggml.model)")
    if not isinstance(model, str) or model not in TOKENIZER_MODELS:
        known = ", ".join(TOKENIZER_MODELS)
        raise ModelError(f"the GGUF file's tokenizer is of the kind {str(model)[:80]!r}; known are {known}")
    listed = texts(metadata, "tokens", MAX_TOKENS)
    if not listed:
        raise ModelError("the GGUF file's tokenizer has no tokens")
    tokens = [text or f"[EMPTY_{number}]" for number, text in enumerate(listed)]
    if len(set(tokens)) != len(tokens):
        raise ModelError("the GGUF file's tokenizer.ggml.tokens names a token twice")
    kinds = numbers(metadata, "token_type", len(tokens))
    ids: dict[str, int] = dict(_SPM_IDS) if model == "llama" else {}
    for name in _NAMES:
        number = metadata.get(f"tokenizer.ggml.{name}_token_id", ids.get(name))
        if number is None:
            continue
        if not isinstance(number, (int, np.integer)) or not 0 <= number < len(tokens):
            raise ModelError(f"the GGUF file's {name} token is {str(number)[:80]}, but it has {len(tokens)} tokens")
        ids[name] = int(number)
    return TokenTable(model, tokens, np.ones(len(tokens), np.int64) if kinds is None else kinds.astype(np.int64), ids)


def flag(metadata: Mapping[str, Any], name: str, usual: bool) -> bool:
    """A yes or no of the file, `usual` where it says neither."""
    found = metadata.get(f"tokenizer.ggml.{name}", usual)
    if not isinstance(found, (bool, np.bool_)):
        raise ModelError(f"the GGUF file's tokenizer.ggml.{name} is neither true nor false")
    return bool(found)


def texts(metadata: Mapping[str, Any], name: str, most: int) -> list[str]:
    """A list of at most `most` texts."""
    found = metadata.get(f"tokenizer.ggml.{name}")
    if not isinstance(found, list) or not all(isinstance(one, str) for one in found):
        raise ModelError(f"the GGUF file's tokenizer.ggml.{name} is not a list of texts")
    if len(found) > most or sum(map(len, found)) > MAX_CHARS:
        raise ModelError(f"the GGUF file's tokenizer.ggml.{name} has over {most} texts, or over {MAX_CHARS} characters")
    return found


def numbers(metadata: Mapping[str, Any], name: str, count: int) -> npt.NDArray[Any] | None:
    """A number for each token, None where the file has none."""
    found = metadata.get(f"tokenizer.ggml.{name}")
    if found is None:
        return None
    if isinstance(found, str) or (isinstance(found, list) and any(isinstance(one, str) for one in found)):
        found = ()  # numpy gives every text the room of the longest
    array: npt.NDArray[Any] = np.asarray(found)
    if array.ndim != 1 or array.dtype.kind not in "if" or len(array) != count:
        raise ModelError(f"the GGUF file's tokenizer.ggml.{name} is not one number for each of its {count} tokens")
    return array
