"""The official Python clients of OpenAI and Anthropic."""

from __future__ import annotations

import json
from typing import Any, ClassVar

import anthropic
import openai

from tests.e2e.clients.asked import EVERY, Client, Question, Said


def openai_messages(question: Question) -> list[Any]:
    found = []
    for one in question.messages:
        if calls := one.get("calls"):
            told = [
                {"id": id, "type": "function", "function": {"name": name, "arguments": json.dumps(given)}}
                for id, name, given in calls
            ]
            found.append({"role": "assistant", "content": None, "tool_calls": told})
        elif one["role"] == "tool":
            found.append({"role": "tool", "tool_call_id": one["id"], "content": one["content"]})
        else:
            found.append(one)
    return found


class OpenAI(Client):
    name = "openai"
    cells = frozenset(EVERY) - {"set-up", "how long it stays"}
    failing: ClassVar = {
        "unknown model": "NotFoundError",
        "wrong key": "AuthenticationError",
        "wrong field": "BadRequestError",
    }

    def _client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=self.key, default_headers=self.repeating)

    def models(self) -> list[str]:
        with self._client() as client:
            assert client.models.retrieve("builtin").id == "builtin"
            return [one.id for one in client.models.list()]

    def _body(self, question: Question) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": question.model,
            "messages": openai_messages(question),
            "max_tokens": question.max_tokens,
            "temperature": question.temperature,
        }
        if question.tools:
            body["tools"] = [{"type": "function", "function": one} for one in question.tools]
        if question.stop:
            body["stop"] = list(question.stop)
        if question.form == "json":
            body["response_format"] = {"type": "json_object"}
        elif question.form:
            schema = {"name": "it", "schema": question.form, "strict": True}
            body["response_format"] = {"type": "json_schema", "json_schema": schema}
        if question.think is False:
            body["reasoning_effort"] = "none"
        if question.must_call:
            body["tool_choice"] = "required"
        if question.chances:
            body |= {"logprobs": True, "top_logprobs": 2}
        return body

    def ask(self, question: Question) -> Said:
        with self._client() as client:
            if question.stream:
                return self._streamed(client, question)
            made = client.chat.completions.create(**self._body(question))
        (choice,) = made.choices
        message: Any = choice.message
        calls = [(one.function.name, json.loads(one.function.arguments)) for one in message.tool_calls or ()]
        thought = getattr(message, "reasoning_content", "")
        usage = made.usage
        chances = [one.logprob for one in choice.logprobs.content or ()] if choice.logprobs is not None else []
        said = Said(message.content or "", thought, calls, choice.finish_reason, chances=chances)
        said.prompt_tokens, said.answer_tokens = usage.prompt_tokens, usage.completion_tokens
        return said

    def _streamed(self, client: openai.OpenAI, question: Question) -> Said:
        said, calls, ids = Said(), dict[int, list[str]](), set[str]()
        options: Any = {"stream": True, "stream_options": {"include_usage": True}}
        for chunk in client.chat.completions.create(**self._body(question), **options):
            ids.add(chunk.id)
            if chunk.usage is not None:
                assert not chunk.choices
                said.prompt_tokens, said.answer_tokens = chunk.usage.prompt_tokens, chunk.usage.completion_tokens
            for choice in chunk.choices:
                said.finish = choice.finish_reason or said.finish
                delta: Any = choice.delta
                said.text += delta.content or ""
                said.pieces += bool(delta.content)
                said.thought += getattr(delta, "reasoning_content", "") or ""
                for call in delta.tool_calls or ():
                    name, arguments = calls.setdefault(call.index, ["", ""])
                    calls[call.index] = [name + (call.function.name or ""), arguments + (call.function.arguments or "")]
                    said.argument_pieces += bool(call.function.arguments)
        assert len(ids) == 1
        said.calls = [(name, json.loads(arguments)) for name, arguments in calls.values()]
        return said

    def hang_up(self, question: Question) -> None:
        with self._client() as client, client.chat.completions.create(**self._body(question), stream=True) as chunks:
            next(one for one in chunks if one.choices[0].delta.content)

    def vectors(self, texts: list[str]) -> list[list[float]]:
        with self._client() as client:
            made = client.embeddings.create(model="builtin", input=texts)
            floats = client.embeddings.create(model="builtin", input=texts, encoding_format="float")
        for one, again in zip(made.data, floats.data, strict=True):  # their last bits may differ
            assert max(abs(a - b) for a, b in zip(one.embedding, again.embedding, strict=True)) < 1e-6
        return [one.embedding for one in made.data]

    def responded(self, text: str, stream: bool) -> str:
        with self._client() as client:
            if not stream:
                return client.responses.create(model="builtin", input=text, temperature=0).output_text
            with client.responses.stream(model="builtin", input=text, temperature=0) as events:
                said = "".join(one.delta for one in events if one.type == "response.output_text.delta")
                assert events.get_final_response().output_text == said
        return said

    def continued(self, text: str) -> str:
        with self._client() as client:
            made = client.completions.create(model="builtin", prompt=text, max_tokens=12, temperature=0)
            parts = client.completions.create(model="builtin", prompt=text, max_tokens=12, temperature=0, stream=True)
            assert "".join(one.choices[0].text for one in parts) == made.choices[0].text
        return made.choices[0].text


_FINISHES = {"max_tokens": "length", "tool_use": "tool_calls", "end_turn": "stop", "stop_sequence": "stop"}


class Anthropic(Client):
    name = "anthropic"
    cells = OpenAI.cells - {"JSON object", "vectors", "text continued", "log probabilities", "Responses"}
    failing: ClassVar = OpenAI.failing

    def _client(self) -> anthropic.Anthropic:
        return anthropic.Anthropic(base_url=self.url, api_key=self.key, default_headers=self.repeating)

    def _body(self, question: Question) -> dict[str, Any]:
        messages, system = [], ""
        for one in question.messages:
            if one["role"] == "system":
                system = one["content"]
            elif calls := one.get("calls"):
                blocks = [{"type": "tool_use", "id": id, "name": name, "input": given} for id, name, given in calls]
                messages.append({"role": "assistant", "content": blocks})
            elif one["role"] == "tool":
                block = {"type": "tool_result", "tool_use_id": one["id"], "content": one["content"]}
                messages.append({"role": "user", "content": [block]})
            else:
                messages.append(one)
        body: dict[str, Any] = {
            "model": question.model,
            "messages": messages,
            "max_tokens": question.max_tokens,
            "extra_body": {"temperature": question.temperature},
        }
        if system:
            body["system"] = system
        if question.stop:
            body["stop_sequences"] = list(question.stop)
        if question.tools:
            body["tools"] = [
                {"name": one["name"], "description": one["description"], "input_schema": one["parameters"]}
                for one in question.tools
            ]
        if question.form:
            body["output_config"] = {"format": {"type": "json_schema", "schema": question.form}}
        if question.must_call:
            body["tool_choice"] = {"type": "any"}
        if question.think:
            body["thinking"] = {"type": "enabled", "budget_tokens": 1024}
        return body

    def models(self) -> list[str]:
        with self._client() as client:
            return [one.id for one in client.models.list()]

    def ask(self, question: Question) -> Said:
        said = Said()
        with self._client() as client:
            if question.stream:
                with client.messages.stream(**self._body(question)) as events:
                    for event in events:
                        said.pieces += event.type == "text"
                        said.argument_pieces += event.type == "input_json" and bool(event.partial_json)
                    made = events.get_final_message()
            else:
                made = client.messages.create(**self._body(question))
        for block in made.content:
            if block.type == "text":
                said.text += block.text
            elif block.type == "thinking":
                said.thought += block.thinking
            elif block.type == "tool_use":
                said.calls.append((block.name, block.input))
        said.finish = _FINISHES[made.stop_reason or ""]
        said.prompt_tokens, said.answer_tokens = made.usage.input_tokens, made.usage.output_tokens
        return said

    def hang_up(self, question: Question) -> None:
        with self._client() as client, client.messages.stream(**self._body(question)) as events:
            next(iter(events.text_stream))
