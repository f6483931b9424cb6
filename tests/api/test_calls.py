"""Calls of tools in the text of each family of models: what is one, what is not, and that nothing is lost."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peerllm.api.text.calls.answer_parts import AnswerPart, AnswerReader, CallName, CallText, Words, joined
from peerllm.api.text.calls.call_forms import FORMS, form_of
from peerllm.api.text.calls.call_reader import MAX_BLANK_CHARS, CallReader
from peerllm.api.text.calls.harmony_reader import HarmonyReader
from peerllm.api.text.calls.thinking_reader import ThinkingReader
from peerllm.api.text.reasoning import ReasoningSplitter
from peerllm.chat_templates import MARKS
from tests.sizes import examples

PARAMETERS = {"city": {"type": "string"}, "days": {"type": "integer"}, "where": {"type": "object"}}
SCHEMAS: dict[str, Any] = {"weather": {"type": "object", "properties": PARAMETERS}, "now": {"type": "object"}}
PARIS: dict[str, Any] = {"city": "Paris", "days": 3}
Heard = list[tuple[str, Any]]


def reader(form: str, one: bool = False) -> AnswerReader:
    return HarmonyReader(True, one) if form == "harmony" else CallReader(FORMS[form], SCHEMAS, one)


def parts(reading: AnswerReader, text: str, cuts: list[int]) -> list[AnswerPart]:
    found: list[AnswerPart] = []
    for start, end in itertools.pairwise([0, *sorted(cuts), len(text)]):
        found += reading.push(text[start:end])
    return joined([*found, *reading.flush()])


def heard(form: str, text: str, cuts: list[int] | None = None, one: bool = False) -> Heard:
    """Words as ("", text), thoughts as ("?", text), calls as (name, arguments)."""
    found: Heard = []
    for part in parts(reader(form, one), text, cuts or []):
        match part:
            case Words():
                found.append(("?" if part.thought else "", part.text))
            case CallName():
                found.append((part.name, None))
            case CallText():
                found[-1] = found[-1][0], _object(part.text)
    return found


def _object(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


HERMES = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris", "days": 3}}\n</tool_call>'
NOW = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
XML = "<function=weather>\n<parameter=city>\nParis\n</parameter>\n<parameter=days>\n3\n</parameter>\n</function>"
GLM = "<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>Paris</arg_value>\n"
GLM += "<arg_key>days</arg_key>\n<arg_value>3</arg_value>\n</tool_call>"
LLAMA = '{"name": "weather", "parameters": {"city": "Paris", "days": 3}}'
OBJECT = '{"name": "weather", "arguments": {"city": "Paris", "days": 3}}'
GEMMA = 'call:weather{city:<|"|>Paris<|"|>,days:3}'
CALL = ("weather", PARIS)
JUST_NOW = ("now", {})

CASES: list[tuple[str, str, Heard]] = [
    # Hermes, Qwen 2.5 and 3, SmolLM3, Granite 4
    ("tagged objects", HERMES, [CALL]),
    ("tagged objects", f"Let me see.\n\n{HERMES}\n{NOW}", [("", "Let me see."), CALL, JUST_NOW]),
    ("tagged objects", f"{HERMES} And now {NOW} done.\n", [CALL, ("", "And now"), JUST_NOW, ("", "done.\n")]),
    ("tagged objects", '<tool_call>{"arguments": {"city": "a}\\"{"}, "name": "weather"}</tool_call>',
     [("weather", {"city": 'a}"{'})]),
    ("tagged objects", '<tool_call>{"name": "weather", "arguments": "{\\"days\\": 1}"}</tool_call>',
     [("weather", {"days": 1})]),
    ("tagged objects", '<tool_call>{"name": "unknown", "arguments": {"a": [{}, "]}"]}}</tool_call>',
     [("unknown", {"a": [{}, "]}"]})]),
    ("tagged objects", '<tool_call>{"name": "weather", "arguments": {"city": "Par',
     [("weather", '{"city": "Par')]),
    ("tagged objects", '<tool_call>{"name": "wea', [("", '<tool_call>{"name": "wea')]),
    ("tagged objects", "I would say <tool_call> here, <tool_cal", [("", "I would say <tool_call> here, <tool_cal")]),
    ("tagged objects", f"<tool_call>oops {HERMES}", [("", "<tool_call>oops"), CALL]),
    ("tagged objects", '<tool_call>{"city": 1}</tool_call>', [("", '<tool_call>{"city": 1}</tool_call>')]),
    ("tagged objects", OBJECT, [("", OBJECT)]),
    ("tagged objects", "", []),
    # Qwen 3 Coder, Qwen 3.5, Nemotron 3
    ("tagged functions", f"<tool_call>\n{XML}\n</tool_call>", [CALL]),
    ("tagged functions", f"Yes.\n<tool_call>\n{XML}\n</tool_call>\n<tool_call><function=now>\n</function></tool_call>",
     [("", "Yes."), CALL, JUST_NOW]),
    ("tagged functions", XML, [CALL]),
    ("tagged functions", HERMES, [CALL]),
    ("tagged functions", "<tool_call><function=weather><parameter=city>5</parameter>"
     '<parameter=where>{"a": 5}</parameter></function></tool_call>', [("weather", {"city": "5", "where": {"a": 5}})]),
    ("tagged functions", "<tool_call><function=weather><parameter=city>\na\n\nb\n</parameter></function></tool_call>",
     [("weather", {"city": "a\n\nb"})]),
    ("tagged functions", "<tool_call><function=weather><parameter=city>Par",
     [("", "<tool_call><function=weather><parameter=city>Par")]),
    ("tagged functions", "<function=weather", [("", "<function=weather")]),
    # GLM
    ("tagged keys", GLM, [CALL]),
    ("tagged keys", f"Hm.{GLM}<tool_call>now</tool_call>", [("", "Hm."), CALL, JUST_NOW]),
    ("tagged keys", "<tool_call>two words</tool_call>", [("", "<tool_call>two words</tool_call>")]),
    ("tagged keys", GLM.removesuffix("\n</tool_call>"), [("", GLM.removesuffix("\n</tool_call>"))]),
    ("tagged functions", "<function=weather><parameter=city>a</parameter>",
     [("", "<function=weather><parameter=city>a</parameter>")]),
    # Llama 3
    ("llama", LLAMA, [CALL]),
    ("llama", f"\n{LLAMA}; {LLAMA}", [CALL, CALL]),
    ("llama", f"<|python_tag|>{LLAMA}", [CALL]),
    ("llama", f"<|python_tag|>{LLAMA}; {LLAMA}", [CALL, CALL]),
    ("llama", '{"type": "function", "name": "now", "parameters": {}}', [JUST_NOW]),
    ("llama", '{"name": "Bob", "parameters": {}}', [("", '{"name": "Bob", "parameters": {}}')]),
    ("llama", '{"name": "Bob"} is JSON', [("", '{"name": "Bob"} is JSON')]),
    ("llama", f"See: {LLAMA}", [("", f"See: {LLAMA}")]),
    ("llama", "<|python_tag|>print(1)", [("", "print(1)")]),
    ("llama", "{", [("", "{")]),
    ("llama", " hello ", [("", " hello ")]),
    # Mistral, older and newer; Granite 3, Phi 4
    ("mistral", f"[TOOL_CALLS] [{OBJECT}]", [CALL]),
    ("mistral", f'[TOOL_CALLS][{OBJECT[:-1]}, "id": "abcdefghi"}}, {{"name": "now", "arguments": {{}}}}]',
     [CALL, JUST_NOW]),
    ("mistral", '[TOOL_CALLS]weather[ARGS]{"city": "Paris", "days": 3}[TOOL_CALLS]now[ARGS]{}', [CALL, JUST_NOW]),
    ("mistral", 'Ok.[TOOL_CALLS]weather[CALL_ID]abc123def[ARGS]{"city": "Paris", "days": 3}', [("", "Ok."), CALL]),
    ("mistral", f"[TOOL_CALLS]{OBJECT}", [CALL]),
    ("mistral", "[TOOL_CALLS] what is that?", [("", " what is that?")]),
    ("mistral", "[TOOL_CALLS][1, 2]", [("", "[1, 2]")]),
    ("mistral", f"[TOOL_CALLS][{OBJECT}, 5] x", [CALL, ("", ", 5] x")]),
    ("mistral", "[TOOL", [("", "[TOOL")]),
    ("listed", f"<|tool_call|>[{OBJECT}]<|/tool_call|>", [CALL]),
    # Gemma 4, FunctionGemma, LFM2
    ("gemma 4", f"<|tool_call>{GEMMA}<tool_call|>", [CALL]),
    ("gemma 4", '<|tool_call>call:weather{where:{a:[1,<|"|>x,}<|"|>,true],<|"|>b<|"|>:null}}<tool_call|>'
     "<|tool_call>call:now{}<tool_call|>", [("weather", {"where": {"a": [1, "x,}", True], "b": None}}), JUST_NOW]),
    ("gemma 4", f"Well, {GEMMA}", [("", f"Well, {GEMMA}")]),
    ("gemma 4", "<|tool_call>call:weather{city:", [("", "call:weather{city:")]),
    ("functiongemma", "<start_function_call>call:weather{city:<escape>Paris<escape>,days:3}<end_function_call>",
     [CALL]),
    ("lfm", "<|tool_call_start|>[weather(city=\"Paris\", days=3), now()]<|tool_call_end|>Ok.",
     [CALL, JUST_NOW, ("", "Ok.")]),
    ("lfm", '<|tool_call_start|>[weather{"city": "\\u00e9\\ud83d\\ude00\\/\\b\\x"}]<|tool_call_end|>',
     [("weather", {"city": "é😀/\bx"})]),
    ("lfm", "<|tool_call_start|>[weather(city='it\\'s', where={\"a\": [1, 2]})]<|tool_call_end|>",
     [("weather", {"city": "it's", "where": {"a": [1, 2]}})]),
    ("lfm", f"<|tool_call_start|>[now(a={'[' * 99})]<|tool_call_end|>",
     [("", f"[now(a={'[' * 99})]<|tool_call_end|>")]),
    ("lfm", f"<|tool_call_start|>[now(a={'[' * 40}{']' * 40})]", [("", f"[now(a={'[' * 40}{']' * 40})]")]),
    # models that know no tools, Gemma 3 among them
    ("plain", HERMES, [CALL]),
    ("plain", f"Sure:\n```json\n{OBJECT}\n```\nDone.", [("", "Sure:"), CALL, ("", "Done.")]),
    ("plain", '```tool_code\nweather(city="Paris", days=3)\n```', [CALL]),
    ("plain", LLAMA, [CALL]),
    ("plain", '```json\n{"name": "Bob"}\n```', [("", '```json\n{"name": "Bob"}\n```')]),
    ("plain", "```tool_code\nprint(x)\n```", [("", "```tool_code\nprint(x)\n```")]),
    ("plain", "```tool_code\nprint(x=1)\n```", [("", "```tool_code\nprint(x=1)\n```")]),
    ("plain", '```python\nweather(city="Paris")\n```', [("", '```python\nweather(city="Paris")\n```')]),
    # gpt-oss
    ("harmony", "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>Hello!<|return|>",
     [("?", "Hm."), ("", "Hello!")]),
    ("harmony", "<|channel|>commentary<|message|>I look.<|end|><|start|>assistant<|channel|>commentary "
     'to=functions.weather <|constrain|>json<|message|>{"city": "Paris", "days": 3}<|call|>', [("", "I look."), CALL]),
    ("harmony", ' to=functions.weather<|channel|>commentary json<|message|>{"city": "Paris", "days": 3}', [CALL]),
    ("harmony", "<|channel|>commentary to=functions.now<|message|><|call|><|start|>assistant<|message|>x",
     [JUST_NOW, ("", "x")]),
    ("harmony", "<|channel|>commentary to=functions.now<|message|>", [JUST_NOW]),
    ("harmony", "<|channel|>final<|message|>cut <|en", [("", "cut <|en")]),
    ("harmony", "<|channel|>anal", []),
    ("harmony", "No channel <|message|> here", [("", "No channel <|message|> here")]),
    ("harmony", "assist", [("", "assist")]),
]  # fmt: skip


@pytest.mark.parametrize(("form", "text", "wanted"), CASES, ids=[f"{i}-{one[0]}" for i, one in enumerate(CASES)])
def test_what_is_a_call(form: str, text: str, wanted: Heard) -> None:
    assert heard(form, text) == wanted
    assert heard(form, text, list(range(len(text)))) == wanted, "one character after another"
    for cut in range(len(text)):
        assert heard(form, text, [cut]) == wanted, f"cut at {cut}"


PIECES = [
    HERMES, XML, GLM, LLAMA, OBJECT, GEMMA, "<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]", "weather", "now",
    "<|tool_call>", "<tool_call|>", "<|python_tag|>", "```json\n", "```", "{", "}", "[", "]", ",", ";", " ", "\n", "\"",
    "\\", "é", "words", '{"name": "now", "arguments": {', "<function=", ">", "</function>", "<parameter=a>",
    "</parameter>", '<|"|>', "<|channel|>", "<|message|>", "final", "analysis", " to=functions.now", "<|start|>",
    "assistant", "<|end|>", "<|call|>", "<|tool_call_start|>", "<|tool_call_end|>", "now()", "<|tool_call|>",
]  # fmt: skip


@settings(max_examples=examples(600), deadline=None)
@given(data=st.data())
def test_any_split_of_any_text_gives_the_same(data: st.DataObject) -> None:
    form = data.draw(st.sampled_from(sorted(FORMS)))
    text = "".join(data.draw(st.lists(st.sampled_from(PIECES), max_size=12)))
    cuts = data.draw(st.lists(st.integers(0, len(text)), max_size=20))
    assert parts(reader(form), text, cuts) == parts(reader(form), text, [])


@settings(max_examples=examples(300), deadline=None)
@given(data=st.data())
def test_what_is_no_call_comes_out_as_it_is(data: st.DataObject) -> None:
    form = data.draw(st.sampled_from([name for name, form in FORMS.items() if not form.hidden]))
    words = [one for one in PIECES if one not in (HERMES, XML, GLM, LLAMA, OBJECT)]
    text = "".join(data.draw(st.lists(st.sampled_from(words), max_size=12)))
    cuts = data.draw(st.lists(st.integers(0, len(text)), max_size=20))
    found = parts(reader(form), text, cuts)
    if not any(isinstance(one, CallName) for one in found):
        assert "".join(one.text for one in found if isinstance(one, Words)) == text


def test_arguments_come_as_they_are_written() -> None:
    reading, text = reader("tagged objects"), '<tool_call>{"name": "weather", "arguments": {"city": "Paris"'
    seen = [part for char in text for part in reading.push(char)]
    assert seen[0] == CallName("weather")
    assert "".join(part.text for part in seen[1:] if isinstance(part, CallText)) == '{"city": "Paris"'
    assert len(seen) > 10


def test_where_no_tools_are_offered_a_call_is_said() -> None:
    text = "<|channel|>commentary to=functions.now<|message|>{}<|call|>"
    assert parts(HarmonyReader(False), text, []) == [Words("{}")]


def test_what_is_certainly_no_call_is_not_held_back() -> None:
    for form, text in (("mistral", "[TOOL_CALLS]" + "a" * 2000), ("harmony", "assistant" + "a" * 2000)):
        assert reader(form).push(text), form


@pytest.mark.parametrize("form", ["tagged objects", "tagged functions", "llama", "mistral", "lfm", "harmony"])
def test_of_calls_only_the_first(form: str) -> None:
    text = {
        "tagged objects": HERMES + NOW,
        "tagged functions": f"<tool_call>{XML}{XML}</tool_call>",
        "llama": f"{LLAMA};{LLAMA}",
        "lfm": '<|tool_call_start|>[weather(city="Paris", days=3), now()]<|tool_call_end|>',
        "mistral": f"[TOOL_CALLS][{OBJECT}, {OBJECT}]",
        "harmony": "<|channel|>commentary to=functions.weather<|message|>" + json.dumps(PARIS) + "<|call|><|start|>x",
    }[form]
    for cuts in ([], list(range(len(text)))):
        assert heard(form, text, cuts, one=True) == [CALL]
    reading = reader(form, True)
    reading.push(text)
    assert reading.stopped


def test_a_call_behind_a_thought() -> None:
    for cuts in ([], [3, 9, 20, 30]):
        reading = ThinkingReader(ReasoningSplitter(MARKS[0], False), CallReader(FORMS["tagged objects"], SCHEMAS))
        found = parts(reading, f"<think>\nHm, <tool_call>?\n</think>\n\n{HERMES}", cuts)
        assert found[0] == Words("Hm, <tool_call>?", True)
        assert found[1] == CallName("weather") and len(found) == 3


@pytest.mark.parametrize(("template", "tokens", "form"), [
    ("{{ tools }}<tool_call>\n{...}", [], "tagged objects"),
    ("{{ tools }}<tool_call>\n<function=x>", [], "tagged functions"),
    ("{{ tools }}<tool_call>{name}\n<arg_key>", [], "tagged keys"),
    ('{{ tools }}{"name": , "parameters": }', ["<|python_tag|>"], "llama"),
    ('{{ tools }}{"name": , "parameters": }', [], "llama"),
    ("{{ tools }}[TOOL_CALLS]", ["[ARGS]"], "mistral"),
    ("{{ tools }}[TOOL_CALLS]{{ name }}[ARGS]", [], "mistral named"),
    ("{{ tools }}", ["[TOOL_CALLS]"], "mistral"),
    ("{{ tools }}<|tool_call>call:", [], "gemma 4"),
    ("{{ tools }}<start_function_call>", [], "functiongemma"),
    ("{{ tools }}<|tool_call_start|>", [], "lfm"),
    ("<|channel|>final<|message|>", [], "harmony"),
    ("{{ messages }}", ["<|python_tag|>"], "plain"),
    ("{{ tools }}", [], "plain"),
])  # fmt: skip
def test_the_template_and_the_tokens_show_the_form(template: str, tokens: list[str], form: str) -> None:
    assert form_of(template, tokens).name == form


def test_long_arguments_take_no_time() -> None:
    """Each character is looked at a bounded number of times, in whichever form."""
    long = "a" * 50_000
    texts = {
        "tagged objects": f'<tool_call>{{"name": "weather", "arguments": {{"city": "{long}"}}}}</tool_call>',
        "tagged functions": f"<function=weather><parameter=city>{long}</parameter></function>",
        "llama": f'{{"parameters": {{"city": "{long}"}}, "name": "weather"}}',
        "mistral": f'[TOOL_CALLS][{{"arguments": {{"city": "{long}"}}, "name": "weather"}}]',
    }
    for form, text in texts.items():
        assert heard(form, text, list(range(0, len(text), 8))) == [("weather", {"city": long})]


@pytest.mark.parametrize("form", ["llama", "plain"])
def test_space_without_end_is_not_held_in_hope_of_a_call(form: str) -> None:
    """Each piece would have it looked at anew, which takes the square of its length."""
    call, reading = json.dumps({"name": "now", "arguments": {}}), reader(form)
    for _ in range(MAX_BLANK_CHARS + 1):
        assert not reading.push(" ")
    assert reading.held == 0
    for count, called in ((MAX_BLANK_CHARS, True), (MAX_BLANK_CHARS + 1, False)):
        text = " " * count + call
        found = heard(form, text)
        assert (found[0][0] == "now") is called
        assert heard(form, text, [5, count, count + 3]) == found
