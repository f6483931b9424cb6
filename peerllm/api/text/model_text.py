"""What a model directory says of text: tokenizer, chat template, special tokens, sampling defaults."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import orjson
from tokenizers import Tokenizer

from peerllm.api.text.calls.call_forms import FORMS, CallForm, form_of
from peerllm.api.text.conversation import TemplateAbilities, shaped
from peerllm.api.text.fill_in import fill_in_form
from peerllm.api.text.reasoning import marks_of, thinking_variables
from peerllm.api.text.template import ChatTemplate, Message
from peerllm.api.text.text_bounds import bounds_of
from peerllm.errors import BadInputError, ModelError
from peerllm.regular_files import UnfitFileError, read_regular
from peerllm.types import SAMPLING_LIMITS

MAX_TOKENIZER_BYTES = 64 << 20  # of tokenizer.json; the largest in use have 35 MB
MAX_FILE_BYTES = 16 << 20  # of its neighbours
FALLBACK_SAMPLING = {"temperature": 0.7, "top_p": 0.95}  # where neither the client nor the model says anything
_SAID = "peerllm-8c41f0"  # stands for an earlier answer
_SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")


class PromptLengthError(BadInputError):
    """The prompt does not fit the context."""


class ModelText:
    """Built from files, which are foreign: this belongs into a process of its own (text_process.py)."""

    def __init__(self, model_dir: Path) -> None:
        path = model_dir / "tokenizer.json"
        if not path.is_file():
            raise ModelError(f"the model in {model_dir.name!r} has no tokenizer.json, so it cannot read text")
        data = _read(path, MAX_TOKENIZER_BYTES)
        try:
            parts = orjson.loads(data)
            self._bounds = bounds_of(parts)
            self.decoder = _decoder(parts)
            del parts  # it takes more memory than the tokenizer
            self._tokenizer = Tokenizer.from_buffer(data)
        except Exception as error:  # the library raises bare Exceptions
            raise ModelError(f"tokenizer.json of {model_dir.name!r} cannot be read: {error}") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        config = _json(model_dir / "tokenizer_config.json")
        source, with_tools = _template_sources(model_dir, config)
        self.template = source or ""
        self._template = ChatTemplate(source, _special_tokens(config)) if source else None
        self._with_tools = ChatTemplate(with_tools, _special_tokens(config)) if with_tools else self._template
        self.marks = marks_of(source or "")
        self.fill_in = fill_in_form(self._tokenizer.token_to_id)
        self.form: CallForm | None = None
        self._can: TemplateAbilities | None = None  # asked when it is first of use
        if self._with_tools is not None:
            added = [token.content for token in self._tokenizer.get_added_tokens_decoder().values()]
            self.form = form_of(with_tools or source or "", added)
        if self.form is FORMS["harmony"]:
            self.marks = None  # it has channels
        self.defaults = _sampling_defaults(_json(model_dir / "generation_config.json"))

    def prompt(
        self,
        said: Sequence[Message] | str,
        context: int,
        most_bytes: int | None = None,
        reasoning: bool | str | None = None,
        tools: Sequence[Mapping[str, Any]] = (),
        after: Sequence[int] = (),
    ) -> list[int]:
        """Token ids up to where the answer begins; PromptLengthError if `context` has no room for one more.

        A text is continued as it is. So is that of messages, joined by line breaks, by a base model (no chat template).
        What cannot fit, or is larger than `most_bytes`, is refused before it is encoded. `after`: ids that it follows,
        of earlier messages and the answer to them.
        """
        chat = self._template if not isinstance(said, str) else None
        if isinstance(said, str):
            text = said
        elif chat is None:
            text = "\n".join(str(message["content"]) for message in said)
        elif after:
            earlier = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _SAID}]
            new = [one for one in said if one["role"] != "system"]  # which those ids begin with
            text = self._chat([*earlier, *new], tools, thinking_variables(reasoning)).rpartition(_SAID)[2]
        else:
            text = self._chat(said, tools, thinking_variables(reasoning))
        room = context - 1 - len(after)
        if self._bounds.too_long(text, room):
            most = self._bounds.most_bytes(max(0, room))
            room_text = f"a context of {context} tokens holds less than {most}"
            what = f"the prompt has {len(text.encode())} bytes; {room_text}{' more' if after else ''}"
            raise PromptLengthError(f"{what}: shorten it")
        if most_bytes is not None and len(text.encode()) > most_bytes:
            raise PromptLengthError(f"the prompt has {len(text.encode())} bytes; this device takes {most_bytes}")
        ids = [*after, *self._tokenizer.encode(text, add_special_tokens=chat is None and not after).ids]
        if not 0 < len(ids) < context:
            what = f"the prompt has {len(ids)} tokens; the model's context holds {context}, answer included"
            raise PromptLengthError(what)
        return ids

    def _chat(self, said: Sequence[Message], tools: Sequence[Mapping[str, Any]], variables: Mapping[str, Any]) -> str:
        calling = bool(tools) or any(one.get("tool_calls") or one["role"] == "tool" for one in said)
        template = self._with_tools if calling else self._template
        assert template is not None
        if calling:
            self._can = self._can or TemplateAbilities.of(template)
            said, tools = shaped(said, tools, self._can, self.form is not None and self.form.short_ids)
        return template.render(said, {**variables, "tools": list(tools) or None, "documents": None})

    def grammar(self, form: Mapping[str, Any], opened: bool) -> str:
        """See answer_grammar; `opened`: the answer begins within a thought."""
        from peerllm.api.text.answer_grammar import grammar_of

        added = self._tokenizer.get_added_tokens_decoder()
        special = [token.content for token in added.values() if token.special]
        end = self.marks[1] if opened and self.marks is not None else ""
        if end in special:
            end = f"<[{self._tokenizer.token_to_id(end)}]>"
        elif end:
            end = orjson.dumps(end).decode()
        return grammar_of(form, special, end)


def _decoder(parts: Mapping[str, Any]) -> bytes:
    """What of a tokenizer.json turns ids into text, as one: it loads in a fraction of the time and memory."""
    if b'"Regex":' in orjson.dumps(parts.get("decoder")):  # decoding is done on the loop, where all would wait for it
        raise ModelError("its decoder has a regular expression, which may take forever")
    model = dict(parts["model"])
    if model.get("type") == "BPE":
        model["merges"] = []
    unused = dict.fromkeys(("normalizer", "pre_tokenizer", "post_processor", "truncation", "padding"))
    return orjson.dumps({**parts, **unused, "model": model})


def _read(path: Path, most_bytes: int = MAX_FILE_BYTES) -> bytes:
    try:
        return read_regular(path, most_bytes)
    except UnfitFileError as error:
        raise ModelError(f"{path.name} {error.strerror}") from error
    except OSError as error:
        raise ModelError(f"{path.name} cannot be read: {error.strerror}") from error


def _json(path: Path) -> Mapping[str, Any]:
    """The object in a file, empty if there is no such file."""
    if not path.is_file():
        return {}
    try:
        value = orjson.loads(_read(path))
    except ValueError as error:
        raise ModelError(f"{path.name} is not valid JSON: {error}") from error
    return value if isinstance(value, dict) else {}


def _template_sources(model_dir: Path, config: Mapping[str, Any]) -> tuple[str | None, str | None]:
    """chat_template.jinja, chat_template.json or tokenizer_config.json; of several the one named "default".

    And the one that is for chats with tools, if it is another.
    """
    path = model_dir / "chat_template.jinja"
    if path.is_file():
        return _read(path).decode("utf-8", "replace"), None
    found = _json(model_dir / "chat_template.json").get("chat_template") or config.get("chat_template")
    if isinstance(found, list):
        named = {one.get("name"): one.get("template") for one in found if isinstance(one, dict)}
        both = named.get("default"), named.get("tool_use")
    else:
        both = found, None
    default, with_tools = (one if isinstance(one, str) else None for one in both)
    return default, with_tools


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    tokens = {}
    for name in _SPECIAL:
        value = config.get(name)
        if isinstance(value, dict):
            value = value.get("content")
        if isinstance(value, str):
            tokens[name] = value
    return tokens


def _sampling_defaults(config: Mapping[str, Any]) -> dict[str, float]:
    """What the model's makers recommend in generation_config.json; FALLBACK_SAMPLING where that is silent or absurd."""
    defaults: dict[str, float] = dict(FALLBACK_SAMPLING)
    for name, low, high in SAMPLING_LIMITS:
        value: Any = config.get(name)
        kinds = (int,) if name == "top_k" else (int, float)
        if name != "seed" and type(value) in kinds and low <= value <= high:
            defaults[name] = value
    if config.get("do_sample") is False:
        defaults["temperature"] = 0.0
    return defaults
