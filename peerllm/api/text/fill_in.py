"""A text between two others: how a model that was trained for it is asked, which is seen in its tokens."""

from __future__ import annotations

import re
from collections.abc import Callable

_FORMS = (
    "<|fim_prefix|>{before}<|fim_suffix|>{after}<|fim_middle|>",  # Qwen, CodeGemma, Granite 4
    "<fim_prefix>{before}<fim_suffix>{after}<fim_middle>",  # StarCoder, Granite 3
    "<｜fim▁begin｜>{before}<｜fim▁hole｜>{after}<｜fim▁end｜>",  # DeepSeek
    "<|code_prefix|>{before}<|code_suffix|>{after}<|code_middle|>",  # GLM
    "<[fim-suffix]>{after}<[fim-prefix]>{before}<[fim-middle]>",  # Seed-Coder
    "[SUFFIX]{after}[PREFIX]{before}",  # Codestral
)


def fill_in_form(id_of: Callable[[str], int | None]) -> str:
    """With places for what stands `before` and `after`; "": the model was not trained for it. `id_of` a token."""
    for form in _FORMS:
        tokens = [one for one in re.split(r"\{before\}|\{after\}", form) if one]
        if all(id_of(one) is not None for one in tokens):
            return form
    return ""
