"""What a model directory says of text: tokenizer, chat template, special tokens, sampling defaults."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import orjson
from tokenizers import Tokenizer

from peerllm.api.text.calls.call_forms import FORMS, CallForm, form_of
from peerllm.api.text.calls.call_patterns import argument_schema
from peerllm.api.text.conversation import TemplateAbilities, shaped
from peerllm.api.text.fill_in import fill_in_form
from peerllm.api.text.reasoning import thinking_variables
from peerllm.api.text.template import ChatTemplate, Message
from peerllm.api.text.text_bounds import bounds_of
from peerllm.api.text.tokens.decoding_table import facts_of, tokens_from
from peerllm.byte_spelling import is_mark
from peerllm.chat_templates import marks_of, model_file, model_object, template_sources
from peerllm.errors import BadInputError, ModelError
from peerllm.types import SAMPLING_LIMITS

MAX_TOKENIZER_BYTES = 64 << 20  # of tokenizer.json; the largest in use have 35 MB
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
        data = model_file(path, MAX_TOKENIZER_BYTES)
        try:
            parts = orjson.loads(data)
            self._bounds = bounds_of(parts)
            self._shell = _shell(parts)
            del parts  # it takes more memory than the tokenizer
            self._tokenizer = Tokenizer.from_buffer(data)
        except Exception as error:  # the library raises bare Exceptions
            raise ModelError(f"tokenizer.json of {model_dir.name!r} cannot be read: {error}") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        config = model_object(model_dir / "tokenizer_config.json")
        source, with_tools = template_sources(model_dir)
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
        self.defaults = _sampling_defaults(model_object(model_dir / "generation_config.json"))

    def table(self) -> dict[str, Any]:
        """The facts of a DecodingTable."""
        return facts_of(self._tokenizer, self._shell)

    def tokens(self, first: int) -> list[str | None]:
        """A slice of its tokens."""
        return tokens_from(self._tokenizer, first)

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
        if not ids:
            raise BadInputError("the prompt is empty: send a text that the model can go on with")
        if len(ids) >= context:
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

    def grammar(self, form: Mapping[str, Any] | None, calls: Mapping[str, Any], opened: bool) -> str:
        """Of an AnswerForm and CallsWanted (see answer_grammar); `opened`: the answer begins within a thought."""
        from peerllm.api.text.answer_grammar import KeptCalls, ModelMarks, grammar_of

        added = self._tokenizer.get_added_tokens_decoder().items()
        ids = {token.content: number for number, token in added if is_mark(token.content, token.special)}
        kept = self.form.kept if self.form is not None else None
        marks = ModelMarks(ids, kept, self.marks, opened)
        if not calls.get("keep"):
            return grammar_of(form, None, marks)
        needed = calls["keep"] == "needed"

        def wanted(every: bool) -> KeptCalls:
            tools: dict[str, Mapping[str, Any]] = {}
            for one in calls["tools"]:
                known = every or needed or one.get("strict")
                tools[one["name"]] = argument_schema(one.get("parameters", {})) if known else {"type": "object"}
            return KeptCalls(tools, needed, calls.get("parallel", True))

        try:
            return grammar_of(form, wanted(True), marks)
        except BadInputError:  # nobody asked for it where tools are not strict
            if needed:
                raise
            return grammar_of(form, wanted(False), marks)


def _shell(parts: Mapping[str, Any]) -> str:
    """A tokenizer.json with the decoder of this one, and nothing else."""
    if b'"Regex":' in orjson.dumps(parts.get("decoder")):  # decoding is done on the loop, where all would wait for it
        raise ModelError("its decoder has a regular expression, which may take forever")
    unused = dict.fromkeys(("normalizer", "pre_tokenizer", "post_processor", "truncation", "padding"))
    empty = {"model": {"type": "BPE", "vocab": {}, "merges": []}, "added_tokens": []}
    return orjson.dumps({**parts, **unused, **empty}).decode()


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
