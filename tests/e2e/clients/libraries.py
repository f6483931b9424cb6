"""`llm` and LangChain's classes. They are imported when a test needs them: that takes seconds."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar
from unittest import mock

import yaml

from tests.e2e.clients.asked import EVERY, MODEL, PARROT, Client, Question, Said, say
from tests.e2e.clients.official import OpenAI
from tests.e2e.clients.ollamas import FOR_GOOD_S, OllamaClient

VECTORS = "text-embedding-3-small"  # llm knows no other names for what gives vectors: an alias of the built-in model


class Llm(Client):
    """By its file of further models, with its Python API; the list of models and a schema with its command."""

    name = "llm"
    cells = frozenset(EVERY) - {
        "arguments in pieces", "how long it stays", "set-up", "tool that must be called",
        "log probabilities"}  # fmt: skip
    failing: ClassVar = OpenAI.failing
    shows_thought = False
    wrong = say("Hello.", model="nothing", max_tokens=0)  # it looks at the temperature itself

    @contextmanager
    def _llm(self) -> Iterator[Any]:
        about = {"api_base": f"{self.url}/v1", "api_key_name": "home", "headers": self.repeating}
        chat = {"supports_schema": True, "supports_tools": True, "reasoning": True, **about}
        models = [{"model_id": f"home-{one}", "model_name": one, **chat} for one in (MODEL, PARROT, "nothing")]
        models.append({"model_id": "home-text", "model_name": MODEL, "completion": True, **about})
        models.append({"model_id": "home-responses", "model_name": MODEL, "responses": True, **about})
        (self.folder / "extra-openai-models.yaml").write_text(yaml.safe_dump(models))
        (self.folder / "keys.json").write_text(json.dumps({"home": self.key}))
        place = {"LLM_USER_PATH": str(self.folder), "OPENAI_BASE_URL": f"{self.url}/v1", "OPENAI_API_KEY": self.key}
        with mock.patch.dict(os.environ, place):
            import llm

            yield llm

    def command(self, *argv: str) -> str:
        """What `llm` prints."""
        from click.testing import CliRunner
        from llm.cli import cli

        with self._llm():
            done = CliRunner().invoke(cli, argv)
        assert done.exit_code == 0, done.output
        return done.output

    def models(self) -> list[str]:
        return self.command("openai", "endpoint", f"{self.url}/v1", "--models", "--key", self.key).split()

    def _response(self, llm: Any, question: Question) -> Any:
        options: dict[str, Any] = {"max_tokens": question.max_tokens, "temperature": question.temperature}
        if question.stop:
            options["stop"] = question.stop[0]
        if question.think is False:
            options["reasoning_effort"] = "none"
        if question.form == "json":
            options["json_object"] = True
        return llm.get_model(f"home-{question.model}").prompt(
            messages=[_llm_message(one) for one in question.messages],
            tools=[llm.Tool(one["name"], one["description"], one["parameters"]) for one in question.tools],
            schema=question.form if isinstance(question.form, dict) else None,
            stream=question.stream,
            **options,
        )

    def ask(self, question: Question) -> Said:
        if isinstance(question.form, dict):
            asked = ["-m", f"home-{question.model}", "--schema", json.dumps(question.form), "-o", "temperature", "0"]
            return Said(self.command("prompt", question.messages[-1]["content"], *asked, "--no-log"))
        with self._llm() as llm:
            response = self._response(llm, question)
            pieces = list(response)
            calls = [(one.name, one.arguments) for one in response.tool_calls()]
            raw, usage = response.response_json, response.usage()
        finish = raw["choices"][0]["finish_reason"] if "choices" in raw else raw["finish_reason"]
        return Said("".join(pieces), "", calls, finish, usage.input, usage.output, len(pieces))

    def hang_up(self, question: Question) -> None:
        with self._llm() as llm:
            pieces = iter(self._response(llm, question))
            next(pieces)
            pieces.close()

    def responded(self, text: str, stream: bool) -> str:
        with self._llm() as llm:
            return str(llm.get_model("home-responses").prompt(text, stream=stream, temperature=0).text())

    def vectors(self, texts: list[str]) -> list[list[float]]:
        with self._llm() as llm:
            return [list(one) for one in llm.get_embedding_model(VECTORS).embed_multi(texts)]

    def continued(self, text: str) -> str:
        with self._llm() as llm:
            return str(llm.get_model("home-text").prompt(text, max_tokens=12, temperature=0).text())


def _llm_message(one: dict[str, Any]) -> Any:
    from llm.parts import Message, TextPart, ToolCallPart, ToolResultPart

    if calls := one.get("calls"):
        parts = [ToolCallPart(name=name, arguments=given, tool_call_id=id) for id, name, given in calls]
        return Message(role="assistant", parts=parts)
    if one["role"] == "tool":
        part = ToolResultPart(name=one["name"], output=one["content"], tool_call_id=one["id"])
        return Message(role="tool", parts=[part])
    return Message(role=one["role"], parts=[TextPart(text=one["content"])])


class LangChain(Client):
    """What its two chat classes have in common: a Runnable, and the messages of langchain_core."""

    def _chat(self, question: Question) -> Any:
        """The class, with the question's options, tools bound."""
        raise NotImplementedError

    def _formed(self, chat: Any, form: Any) -> Any:
        """With an answer in that form."""
        return chat.with_structured_output({"title": "it", **form}, method="json_schema", include_raw=True)

    def ask(self, question: Question) -> Said:
        chat, messages = self._chat(question), [_langchain_message(one) for one in question.messages]
        if isinstance(question.form, dict):
            made = self._formed(chat, question.form).invoke(messages)
            assert made["parsing_error"] is None
            return Said(json.dumps(made["parsed"]), finish=_finish(made["raw"]))
        said = Said()
        if question.stream:
            whole: Any = None
            for part in chat.stream(messages, **self._options(question)):
                said.pieces += bool(part.content)
                said.argument_pieces += sum(bool(one["args"]) for one in part.tool_call_chunks)
                whole = part if whole is None else whole + part
        else:
            whole = chat.invoke(messages, **self._options(question))
        said.text, said.finish = whole.content, _finish(whole)
        said.thought = whole.additional_kwargs.get("reasoning_content", "")
        said.calls = [(one["name"], one["args"]) for one in whole.tool_calls]
        told = whole.response_metadata.get("logprobs") or {}
        said.chances = [one["logprob"] for one in told.get("content") or ()]
        said.prompt_tokens = whole.usage_metadata["input_tokens"]
        said.answer_tokens = whole.usage_metadata["output_tokens"]
        return said

    def _options(self, question: Question) -> dict[str, Any]:
        return {"stop": list(question.stop)} if question.stop else {}

    def hang_up(self, question: Question) -> None:
        parts = self._chat(question).stream([_langchain_message(one) for one in question.messages])
        next(one for one in parts if one.content)
        parts.close()


def _finish(message: Any) -> str:
    about = message.response_metadata
    reason = about.get("finish_reason") or about["done_reason"]
    return "tool_calls" if reason == "stop" and message.tool_calls else str(reason)


def _langchain_message(one: dict[str, Any]) -> Any:
    from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage

    if calls := one.get("calls"):
        return AIMessage("", tool_calls=[{"id": id, "name": name, "args": given} for id, name, given in calls])
    if one["role"] == "tool":
        return ToolMessage(one["content"], tool_call_id=one["id"])
    kinds = {"user": HumanMessage, "assistant": AIMessage, "system": SystemMessage}
    return kinds[one["role"]](one["content"])


class LangChainOpenAI(LangChain):
    """ChatOpenAI and OpenAIEmbeddings."""

    name = "LangChain OpenAI"
    cells = OpenAI.cells - {"list of models", "text continued"}
    failing: ClassVar = OpenAI.failing
    shows_thought = False  # it leaves out what is not OpenAI's

    def _about(self) -> dict[str, Any]:
        return {"base_url": f"{self.url}/v1", "api_key": self.key}

    def _chat(self, question: Question) -> Any:
        from langchain_openai import ChatOpenAI

        more: dict[str, Any] = {"reasoning_effort": "none"} if question.think is False else {}
        if question.chances:
            more["logprobs"] = True
        made = ChatOpenAI(
            model=question.model,
            temperature=question.temperature,
            max_completion_tokens=question.max_tokens,
            default_headers=self.repeating,
            stream_usage=True,
            **self._about(),
            **more,
        )
        if question.form == "json":
            return made.bind(response_format={"type": "json_object"})
        if not question.tools:
            return made
        choice = "any" if question.must_call else None
        return made.bind_tools([{"type": "function", "function": one} for one in question.tools], tool_choice=choice)

    def responded(self, text: str, stream: bool) -> str:
        from langchain_openai import ChatOpenAI

        chat = ChatOpenAI(model="builtin", temperature=0, use_responses_api=True, **self._about())
        return "".join(one.text for one in chat.stream(text)) if stream else str(chat.invoke(text).text)

    def vectors(self, texts: list[str]) -> list[list[float]]:
        from langchain_openai import OpenAIEmbeddings

        # It cuts long texts by OpenAI's tokenizer, which it would fetch.
        return OpenAIEmbeddings(model="builtin", check_embedding_ctx_length=False, **self._about()).embed_documents(
            texts
        )


class LangChainOllama(LangChain, OllamaClient):
    """ChatOllama and OllamaEmbeddings."""

    name = "LangChain Ollama"
    cells = OllamaClient.cells - {"list of models", "text continued"}
    failing: ClassVar = OllamaClient.failing

    def _about(self) -> dict[str, Any]:
        return {"base_url": self.url, "client_kwargs": {"headers": self.headers}}

    def _chat(self, question: Question, **more: Any) -> Any:
        from langchain_ollama import ChatOllama

        made = ChatOllama(
            model=question.model,
            temperature=question.temperature,
            num_predict=question.max_tokens,
            reasoning=question.think,
            format=question.form if question.form == "json" else "",
            **self._about(),
            **more,
        )
        return (
            made.bind_tools([{"type": "function", "function": one} for one in question.tools])
            if question.tools
            else made
        )

    def vectors(self, texts: list[str]) -> list[list[float]]:
        from langchain_ollama import OllamaEmbeddings

        return OllamaEmbeddings(model="builtin", **self._about()).embed_documents(texts)

    def staying(self) -> Iterator[tuple[Any, float]]:
        for keep, wanted in ((120, 120), ("20m", 1200), (-1, FOR_GOOD_S)):
            self._chat(say("Hello."), keep_alive=keep).invoke("Hello.")
            yield keep, wanted
