"""Models as Anthropic's clients list them; they ask under the path of OpenAI's, with a header of their own."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Annotated

from msgspec import Meta, Struct

from peerllm.api.anthropic.anthropic_objects import AnthropicModel, AnthropicModels
from peerllm.api.error_answers import FieldError
from peerllm.daemon.facade import ServedModel

VERSION_HEADER = "anthropic-version"
LISTED, MAX_LISTED = 20, 1000  # models of one page


class ModelPage(Struct):
    """Which of them: those behind `after_id`, or the last ones before `before_id`."""

    limit: Annotated[int, Meta(ge=1, le=MAX_LISTED)] = LISTED
    after_id: str | None = None
    before_id: str | None = None


def model_page(models: Sequence[ServedModel], asked: ModelPage) -> AnthropicModels:
    """One page; FieldError if there is no such model."""
    names = [one.name for one in models]
    for name in ("after_id", "before_id"):
        if (given := getattr(asked, name)) is not None and given not in names:
            raise FieldError(f"{name}: there is no model {given[:80]!r}", name)
    if asked.before_id is not None:
        before = models[: names.index(asked.before_id)]
        page, more = before[-asked.limit :], len(before) > asked.limit
    else:
        behind = models[names.index(asked.after_id) + 1 :] if asked.after_id is not None else models
        page, more = behind[: asked.limit], len(behind) > asked.limit
    ends = (page[0].name, page[-1].name) if page else (None, None)
    return {"data": [model_info(one) for one in page], "has_more": more, "first_id": ends[0], "last_id": ends[1]}


def model_info(model: ServedModel) -> AnthropicModel:
    """One that is on a disk only has no time: it is said to be as old as can be."""
    return {
        "type": "model",
        "id": model.name,
        "display_name": model.name,
        "created_at": datetime.fromtimestamp(model.created, UTC).isoformat().replace("+00:00", "Z"),
        "lifecycle": "active",
        "max_input_tokens": model.context or None,
        "max_tokens": model.context or None,
    }
