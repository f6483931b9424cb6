"""The official Python client of Ollama, and tools that speak to Ollama in their own ways.

What Home Assistant, n8n, Zed, Open WebUI and Continue send is read from their sources, not guessed.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from datetime import datetime
from typing import Any, ClassVar

import httpx
import ollama

from tests.e2e.clients.asked import EVERY, Client, Question, Said, say

FOR_GOOD_S = 1e9  # and more
SOON_S = 5.0  # Home Assistant waits no longer for a list
MISSING = "home/parrot"  # what is not there before a client pulls it


class OllamaClient(Client):
    """What those that speak to Ollama have in common; each sends with `_chat`."""

    cells = frozenset(EVERY) - {
        "arguments in pieces", "set-up", "tool that must be called", "Responses", "log probabilities"}  # fmt: skip
    failing: ClassVar[dict[str, str]] = dict.fromkeys(("unknown model", "wrong key", "wrong field"), "ResponseError")

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.key}", **self.repeating}

    def body(self, question: Question) -> dict[str, Any]:
        """Of /api/chat."""
        raise NotImplementedError

    def _chat(self, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The parts of the answer."""
        raise NotImplementedError

    def _message(self, one: dict[str, Any]) -> dict[str, Any]:
        if calls := one.get("calls"):
            told = [{"function": {"name": name, "arguments": given}} for _, name, given in calls]
            return {"role": "assistant", "content": "", "tool_calls": told}
        if one["role"] == "tool":
            return {"role": "tool", "content": one["content"], **self._result(one)}
        return one

    def _result(self, one: dict[str, Any]) -> dict[str, str]:
        """What tells of which call a result is."""
        return {"tool_name": one["name"]}

    def messages(self, question: Question) -> list[dict[str, Any]]:
        return [self._message(one) for one in question.messages]

    def ask(self, question: Question) -> Said:
        said = Said()
        for part in self._chat(self.body(question)):
            assert "error" not in part, part
            message = part["message"]
            assert message["role"] == "assistant"
            said.text += message["content"]
            said.pieces += bool(message["content"])
            said.thought += message.get("thinking") or ""
            said.chances += [one["logprob"] for one in part.get("logprobs") or ()]
            for call in message.get("tool_calls") or ():
                said.calls.append((call["function"]["name"], dict(call["function"]["arguments"])))
            if part["done"]:
                said.finish = "tool_calls" if said.calls and part["done_reason"] == "stop" else part["done_reason"]
                said.prompt_tokens, said.answer_tokens = part["prompt_eval_count"], part["eval_count"]
                assert part["total_duration"] >= part["eval_duration"] > 0
        return said

    def hang_up(self, question: Question) -> None:
        parts = self._chat(self.body(question))
        next(one for one in parts if one["message"]["content"])
        parts.close()  # type: ignore[attr-defined]

    kept = "builtin"  # the model that is asked how long it stays

    def stays_s(self) -> float:
        client = ollama.Client(self.url, headers=self.headers)
        found = [one for one in client.ps().models if one.model == f"{self.kept}:latest"]
        if not found:
            return 0
        assert found[0].expires_at is not None
        return found[0].expires_at.timestamp() - time.time()


class Ollama(OllamaClient):
    name = "ollama"
    cells = OllamaClient.cells | {"log probabilities"}

    def _client(self) -> ollama.Client:
        return ollama.Client(self.url, headers=self.headers)

    def models(self) -> list[str]:
        shown = self._client().show("builtin")
        length = f"{shown.modelinfo['general.architecture']}.context_length"
        runs = "builtin:latest" in [one.model for one in self._client().ps().models]
        assert "completion" in shown.capabilities and (not runs or shown.modelinfo[length] >= 512)
        return [one.model.removesuffix(":latest") for one in self._client().list().models]

    def body(self, question: Question) -> dict[str, Any]:
        options = {"num_predict": question.max_tokens, "temperature": question.temperature, "stop": list(question.stop)}
        return {
            "model": question.model,
            "messages": self.messages(question),
            "options": options,
            "tools": [{"type": "function", "function": one} for one in question.tools],
            "format": question.form,
            "think": question.think,
            "stream": question.stream,
            "logprobs": question.chances or None,
        }

    def _chat(self, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        made: Any = self._client().chat(**body)
        for part in made if body["stream"] else [made]:
            yield part.model_dump()

    def vectors(self, texts: list[str]) -> list[list[float]]:
        older = self._client().embeddings("builtin", texts[0]).embedding
        made = [list(one) for one in self._client().embed("builtin", texts).embeddings]
        length = sum(one * one for one in older) ** 0.5
        assert max(abs(a / length - b) for a, b in zip(older, made[0], strict=True)) < 1e-5
        return made

    def continued(self, text: str) -> str:
        options = {"num_predict": 12, "temperature": 0}
        made = self._client().generate("builtin", text, raw=True, options=options)
        parts = self._client().generate("builtin", text, raw=True, options=options, stream=True)
        assert "".join(one.response for one in parts) == made.response
        return made.response

    def staying(self) -> Iterator[tuple[Any, float]]:
        for keep, wanted in (("10m", 600), (90, 90), (-1, FOR_GOOD_S), ("5m30s", 330)):
            self._client().chat("builtin", [{"role": "user", "content": "Hello."}], keep_alive=keep)
            yield keep, wanted


class HomeAssistant(OllamaClient):
    """Its Ollama integration: always streamed, with its defaults; it sets neither a limit nor a temperature."""

    name = "Home Assistant"
    cells = OllamaClient.cells - {
        "whole answer", "stop strings", "cut by a limit", "JSON object", "text continued", "vectors",
        "asked twice", "usage"} | {"set-up"}  # fmt: skip
    wrong = say("Hello.", form={"type": "strin"})
    keep_alive: str | int = "300s"

    def _client(self) -> ollama.AsyncClient:
        return ollama.AsyncClient(host=self.url, headers={"Authorization": f"Bearer {self.key}"})

    def models(self) -> list[str]:
        listed = asyncio.run(self._client().list())
        return [one["model"].removesuffix(":latest") for one in listed.get("models", [])]

    def _result(self, one: dict[str, Any]) -> dict[str, str]:
        return {}

    def body(self, question: Question) -> dict[str, Any]:
        messages = [ollama.Message(**one) for one in self.messages(question)]
        return {
            "model": question.model,
            "messages": messages,
            "tools": [{"type": "function", "function": one} for one in question.tools] or None,
            "stream": True,
            "keep_alive": self.keep_alive,
            "options": {"num_ctx": 8192},
            "think": bool(question.think),
            "format": question.form,
        }

    def _chat(self, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        loop = asyncio.new_event_loop()
        parts: Any = None
        try:
            parts = loop.run_until_complete(self._client().chat(**body))
            while (part := loop.run_until_complete(anext(parts, None))) is not None:
                yield part.model_dump()
        finally:
            if parts is not None:
                loop.run_until_complete(parts.aclose())
            loop.close()

    def set_up(self) -> None:
        """The form with address and key, the choice of a model that is missing and is pulled, then the sensors."""

        async def both() -> tuple[Any, Any]:
            async with asyncio.timeout(SOON_S):
                return await asyncio.gather(self._client().list(), self._client().ps())

        async def pulled() -> None:
            there = {one["model"] for one in (await self._client().list()).get("models", [])}
            if MISSING not in there:
                await self._client().pull(MISSING)

        asyncio.run(pulled())
        assert self.ask(say("What is 2 + 2?", model=MISSING)).text
        for _ in range(2):  # it does this every 30 s
            installed, loaded = asyncio.run(both())
            assert {one.model for one in loaded.models} <= {one.model for one in installed.models}
            for one in loaded.models:
                assert one.size > 0 and one.size_vram >= 0 and one.expires_at.timestamp() > time.time()

    kept = "parrot"

    def staying(self) -> Iterator[tuple[Any, float]]:
        for self.keep_alive, wanted in (("300s", 300), (-1, FOR_GOOD_S), ("0s", 0)):
            self.ask(say("What is 2 + 2?", model="parrot"))
            yield self.keep_alive, wanted


class RawOllama(OllamaClient):
    """A tool that is not written in Python: its requests as they stand in its source."""

    failing: ClassVar[dict[str, str]] = dict.fromkeys(("unknown model", "wrong key", "wrong field"), "HTTPStatusError")
    more: ClassVar[dict[str, str]] = {}  # headers

    def send(self, method: str, path: str, body: Any = None) -> httpx.Response:
        """HTTPStatusError, with Ollama's `error` in it."""
        with httpx.Client(base_url=self.url, headers={**self.headers, **self.more}, timeout=60) as client:
            answer = client.request(method, path, json=body)
        return _checked(answer)

    def _chat(self, body: dict[str, Any], path: str = "/api/chat") -> Iterator[dict[str, Any]]:
        if body.get("stream") is False:
            yield self.send("POST", path, body).json()
            return
        with (
            httpx.Client(base_url=self.url, headers={**self.headers, **self.more}, timeout=60) as client,
            client.stream("POST", path, json=body) as answer,
        ):
            if answer.is_error:
                answer.read()
            assert _checked(answer).headers["Content-Type"] == "application/x-ndjson"
            for line in answer.iter_lines():
                yield json.loads(line)

    def models(self) -> list[str]:
        return [one["name"].removesuffix(":latest") for one in self.send("GET", "/api/tags").json()["models"]]

    def _always(self, wanted: float) -> Iterator[tuple[Any, float]]:
        self.ask(say("Hello."))
        yield "as it always says", wanted


def _checked(answer: httpx.Response) -> httpx.Response:
    if answer.is_error:
        assert set(answer.json()) >= {"error"} and isinstance(answer.json()["error"], str)
    return answer.raise_for_status()


class N8n(RawOllama):
    """Its Ollama node: in one piece, with all of its options as they stand by default."""

    name = "n8n"
    cells = OllamaClient.cells - {"streamed answer", "JSON schema", "text continued", "vectors", "thought apart",
                                  "thinking off", "hanging up", "asked twice"}  # fmt: skip

    def body(self, question: Question) -> dict[str, Any]:
        options = {
            "temperature": question.temperature, "top_p": 0.7, "top_k": 40, "num_predict": question.max_tokens,
            "frequency_penalty": 0, "presence_penalty": 0, "repeat_penalty": 1, "num_ctx": 4096, "repeat_last_n": 64,
            "min_p": 0, "seed": 0, "stop": list(question.stop) or "", "keep_alive": "5m", "low_vram": False,
            "main_gpu": 0, "num_batch": 512, "num_gpu": -1, "num_thread": 0, "penalize_newline": True,
            "use_mlock": False, "use_mmap": True, "vocab_only": False, "format": question.form or "",
        }  # fmt: skip
        tools = [{"type": "function", "function": one} for one in question.tools]
        messages = self.messages(question)
        return {"model": question.model, "messages": messages, "stream": False, "tools": tools, "options": options}

    def staying(self) -> Iterator[tuple[Any, float]]:
        return self._always(300)


class Zed(RawOllama):
    """Its types are strict: an answer must have every field that they name."""

    name = "Zed"
    cells = OllamaClient.cells - {"whole answer", "JSON object", "JSON schema", "text continued", "vectors",
                                  "asked twice"} | {"set-up"}  # fmt: skip

    def body(self, question: Question) -> dict[str, Any]:
        options = {"num_ctx": 16384, "num_predict": question.max_tokens, "stop": list(question.stop),
                   "temperature": question.temperature, "top_p": None}  # fmt: skip
        tools = [
            {"type": "function", "function": {"description": None, "parameters": None, **one}} for one in question.tools
        ]
        return {
            "model": question.model,
            "messages": self.messages(question),
            "stream": True,
            "keep_alive": -1,
            "options": options,
            "tools": tools,
            "think": question.think,
        }

    def _message(self, one: dict[str, Any]) -> dict[str, Any]:
        made = super()._message(one)
        return {"tool_calls": None, "thinking": None, **made} if made["role"] == "assistant" else made

    def set_up(self) -> None:
        for one in self.send("GET", "/api/tags").json()["models"]:
            assert isinstance(one["size"], int)
            assert all(isinstance(one[name], str) for name in ("name", "modified_at", "digest"))
            details = ("format", "family", "parameter_size", "quantization_level")
            assert all(isinstance(one["details"][name], str) for name in details)
        shown = self.send("POST", "/api/show", {"model": "parrot"}).json()
        assert {"tools", "thinking"} <= set(shown["capabilities"]) and "vision" not in shown["capabilities"]

    def staying(self) -> Iterator[tuple[Any, float]]:
        return self._always(FOR_GOOD_S)


class OpenWebUI(RawOllama):
    """It names the person, and reads versions and times."""

    name = "Open WebUI"
    cells = OllamaClient.cells - {"asked twice", "text continued"} | {"set-up"}
    more: ClassVar = {
        "X-OpenWebUI-User-Name": "Ada%20L%C3%B6we",
        "X-OpenWebUI-User-Id": "5f0c",
        "X-OpenWebUI-User-Email": "ada@home.example",
        "X-OpenWebUI-User-Role": "admin",
        "X-OpenWebUI-Chat-Id": "c1",
    }

    def body(self, question: Question) -> dict[str, Any]:
        options = {"num_predict": question.max_tokens, "temperature": question.temperature, "num_ctx": 2048}
        body = {
            "model": f"{question.model}:latest",
            "messages": [{**one, "images": []} if one["role"] == "user" else one for one in self.messages(question)],
            "options": {**options, "stop": list(question.stop)},
            "stream": question.stream,
            "keep_alive": "10m",
        }
        if question.tools:
            body["tools"] = [{"type": "function", "function": one} for one in question.tools]
        if question.form:
            body["format"] = question.form
        if question.think is not None:
            body["think"] = question.think
        return body

    def set_up(self) -> None:
        assert [int(part) for part in self.send("GET", "/api/version").json()["version"].split(".")] >= [0, 5, 0]
        loaded = {one["name"]: one for one in self.send("GET", "/api/ps").json()["models"]}
        assert loaded.keys() <= {one["model"] for one in self.send("GET", "/api/tags").json()["models"]}
        assert all(datetime.fromisoformat(one["expires_at"]).timestamp() > time.time() for one in loaded.values())
        shown = self.send("POST", "/api/show", {"name": "builtin:latest"}).json()
        assert {"model_info", "details", "capabilities"} <= shown.keys()

    def vectors(self, texts: list[str]) -> list[list[float]]:
        body = {"model": "builtin:latest", "input": texts, "truncate": True}
        return list(self.send("POST", "/api/embed", body).json()["embeddings"])

    def staying(self) -> Iterator[tuple[Any, float]]:
        unload = self.send("POST", "/api/generate", {"model": "parrot:latest", "prompt": "", "keep_alive": 0})
        assert unload.json()["done_reason"] == "unload"
        return self._always(600)


class Continue(RawOllama):
    """Its provider "ollama": streamed unless tools are offered, half an hour; options that are not set are left out."""

    name = "Continue"
    cells = OllamaClient.cells - {"JSON object", "JSON schema", "thought apart", "thinking off", "asked twice",
                                  "whole answer"} | {"set-up"}  # fmt: skip

    def body(self, question: Question) -> dict[str, Any]:
        options = {"temperature": question.temperature, "num_predict": question.max_tokens, "num_ctx": 8192}
        body: dict[str, Any] = {
            "model": question.model,
            "messages": self.messages(question),
            "options": {**options, **({"stop": list(question.stop)} if question.stop else {})},
            "keep_alive": 1800,
        }
        if question.tools and question.messages[-1]["role"] == "user":
            body["tools"] = [{"type": "function", "function": one} for one in question.tools]
            body["stream"] = False
        return body

    def _result(self, one: dict[str, Any]) -> dict[str, str]:
        return {}

    def set_up(self) -> None:
        shown = self.send("POST", "/api/show", {"name": "builtin"}).json()
        assert isinstance(shown["parameters"], str) and isinstance(shown["template"], str)

    def vectors(self, texts: list[str]) -> list[list[float]]:
        return list(self.send("POST", "/api/embed", {"model": "builtin", "input": texts}).json()["embeddings"])

    def continued(self, text: str) -> str:
        options = {"temperature": 0, "num_predict": 12}
        body = {"model": "builtin", "prompt": text, "raw": True, "options": options, "keep_alive": 1800, "stream": True}
        return "".join(part["response"] for part in self._chat(body, "/api/generate"))

    def staying(self) -> Iterator[tuple[Any, float]]:
        return self._always(1800)
