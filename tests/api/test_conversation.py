"""Tools in each family's chat template: the same text as transformers makes, and plain words where it knows none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken

from peerllm.api.text.conversation import SHORT_ID_CHARS, TemplateAbilities, shaped
from peerllm.api.text.model_text import ModelText
from peerllm.api.text.template import ChatTemplate
from tests.api import templates
from tests.api.fake import byte_tokenizer, make_model_dir

VARIABLES = {"bos_token": "<s>", "eos_token": "<|end|>"}
PARAMETERS: dict[str, Any] = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = {"type": "function", "function": {"name": "weather", "description": "Of a city", "parameters": PARAMETERS}}
SYSTEM = {"role": "system", "content": "be brief"}
USER = {"role": "user", "content": "How is it?"}
PARIS, ROME = {"city": "Paris", "days": 3}, {"city": "Rome é"}
LONG = 100_000  # tokens


def calling(*calls: dict[str, Any], content: str = "") -> dict[str, Any]:
    """As Generation's messages are."""
    return {"role": "assistant", "content": content, "tool_calls": list(calls)}


def call(number: int, **arguments: Any) -> dict[str, Any]:
    return {"id": f"call_{number}", "name": "weather", "arguments": arguments}


def result(content: str, number: int | None = None) -> dict[str, Any]:
    found = {"role": "tool", "content": content}
    return found if number is None else {**found, "tool_call_id": f"call_{number}"}


def prompt(tmp_path: Path, template: str, messages: list[dict[str, Any]], tools: Any = (WEATHER,)) -> str:
    text = ModelText(make_model_dir(tmp_path / "model", template))
    return byte_tokenizer().decode(text.prompt(messages, LONG, tools=tools), skip_special_tokens=False)


def theirs(template: str, messages: list[dict[str, Any]], tools: list[Any] | None) -> str:
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=byte_tokenizer(), **VARIABLES)
    made: str = tokenizer.apply_chat_template(
        messages, tools=tools, chat_template=template, tokenize=False, add_generation_prompt=True
    )
    return made


def function(call_id: str, arguments: Any) -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": "weather", "arguments": arguments}}


ONE_CALL = [USER, calling(call(0, **PARIS)), result("sunny", 0), USER]
TWO_CALLS = [USER, calling(call(0, **PARIS), call(1, **ROME)), result("sunny", 0), result("wet", 1)]
OBJECTS = {
    name: getattr(templates, name) for name in ("HERMES", "QWEN_CODER", "LLAMA", "HARMONY", "GEMMA_4", "MISTRAL")
}


@pytest.mark.parametrize("family", OBJECTS)
@pytest.mark.parametrize("offered", [True, False])
def test_definitions_equal_transformers(tmp_path: Path, family: str, offered: bool) -> None:
    tools = [WEATHER] if offered else []
    for messages in ([USER], [USER, {"role": "assistant", "content": "Fine."}, USER]):
        assert prompt(tmp_path, OBJECTS[family], messages, tools) == theirs(OBJECTS[family], messages, tools or None)


@pytest.mark.parametrize("family", [one for one in OBJECTS if one not in ("MISTRAL", "GEMMA_4")])
def test_calls_and_results_equal_transformers(tmp_path: Path, family: str) -> None:
    said = [USER, {"role": "assistant", "content": "", "tool_calls": [function("call_0", PARIS)]},
            {"role": "tool", "content": "sunny", "tool_call_id": "call_0", "name": "weather"}, USER]  # fmt: skip
    assert prompt(tmp_path, OBJECTS[family], ONE_CALL) == theirs(OBJECTS[family], said, [WEATHER])


def test_mistral_has_short_ids(tmp_path: Path) -> None:
    text = prompt(tmp_path, templates.MISTRAL, TWO_CALLS)
    calls = json.loads(text.partition("[TOOL_CALLS] ")[2].partition("<|end|>")[0])
    results = [one.partition("[/TOOL_RESULTS]")[0] for one in text.split("[TOOL_RESULTS] ")[1:]]
    assert [one["arguments"] for one in calls] == [PARIS, ROME]
    assert len({one["id"] for one in calls}) == 2 and {len(one["id"]) for one in calls} == {SHORT_ID_CHARS}
    assert results == [
        f'{{"content": {content}, "call_id": "{one["id"]}"}}'
        for content, one in zip(("sunny", "wet"), calls, strict=True)
    ]


def test_short_ids_are_letters_and_digits() -> None:
    can = TemplateAbilities(tools=True, calls=True, results=True, several=True)
    for given, kept in (("call_0001", False), ("aB3456789", True), ("x", False)):
        said = [USER, calling({**call(0), "id": given}), {**result("wet"), "tool_call_id": given}]
        found, _ = shaped(said, [], can, short_ids=True)
        made = found[1]["tool_calls"][0]["id"]
        assert made == found[2]["tool_call_id"] and len(made) == SHORT_ID_CHARS and made.isalnum()
        assert (made == given) == kept


def test_gemma_has_results_within_the_turn(tmp_path: Path) -> None:
    text = prompt(tmp_path, templates.GEMMA_4, [USER, calling(call(0, **PARIS)), result('{"sky": "blue"}', 0)])
    assert text.endswith(
        '<|turn>model\n<|tool_call>call:weather{city:<|"|>Paris<|"|>,days:3}<tool_call|>'
        '<|tool_response>response:weather{sky:<|"|>blue<|"|>}<tool_response|>'
    ), "the model goes on in its turn"
    text = prompt(tmp_path, templates.GEMMA_4, ONE_CALL)
    assert 'response:weather{value:<|"|>sunny<|"|>}<tool_response|><|turn>user\nHow is it?' in text


@pytest.mark.parametrize("family", ["LLAMA", "HARMONY"])
def test_where_a_message_holds_one_call_each_has_its_own(tmp_path: Path, family: str) -> None:
    text = prompt(tmp_path, OBJECTS[family], TWO_CALLS)
    places = [text.index(one) for one in ("Paris", "sunny", "Rome", "wet")]
    assert places == sorted(places)


@pytest.mark.parametrize("family", OBJECTS)
def test_clients_that_name_no_call_mean_them_in_turn(tmp_path: Path, family: str) -> None:
    """Home Assistant's results have neither id nor name, Ollama's calls have no id."""
    bare = [{"name": "weather", "arguments": one} for one in (PARIS, ROME)]
    text = prompt(tmp_path, OBJECTS[family], [USER, calling(*bare), result("sunny"), result("wet")])
    assert text.index("Paris") < text.index("sunny") < text.index("wet")


def test_results_find_their_calls() -> None:
    can = TemplateAbilities(tools=True, calls=True, results=True, several=True)
    calls = [{**call(0), "name": "a"}, {**call(1), "name": "b"}, {**call(2), "name": "c"}]
    answers = [result("of b", 1), {**result("of c"), "name": "c"}, result("of a"), result("of none", 9)]
    found, _ = shaped([USER, calling(*calls), *answers], [], can, short_ids=False)
    in_turn, _ = shaped([USER, calling(*calls), answers[0], result("of a"), result("of c")], [], can, short_ids=False)
    assert [one["name"] for one in in_turn[2:]] == ["b", "a", "c"]
    assert [(one["content"], one["tool_call_id"], one["name"]) for one in found[2:]] == [
        ("of b", "call_1", "b"), ("of c", "call_2", "c"), ("of a", "call_0", "a"), ("of none", "call_9", "")
    ]  # fmt: skip


def test_where_calls_are_told_apart_each_result_follows_its_own() -> None:
    can = TemplateAbilities(tools=True, calls=True, results=True)
    calls = [{**call(0), "name": "a"}, {**call(1), "name": "b"}, {**call(2), "name": "c"}]
    answers = [result("of none", 9), result("of b", 1), result("of a", 0), result("of c"), USER]
    found, _ = shaped([USER, calling(*calls, content="Hm."), *answers], [], can, short_ids=False)
    assert [one["content"] for one in found] == [
        "How is it?", "Hm.", "of a", "", "of b", "", "of c", "of none", "How is it?"
    ]  # fmt: skip


def test_tools_in_words_go_before_all_where_the_system_speaks_later() -> None:
    found, _ = shaped([USER, SYSTEM], [WEATHER], TemplateAbilities(), short_ids=False)
    assert [one["role"] for one in found] == ["system", "user", "system"] and "weather" in found[0]["content"]


def test_only_neighbours_of_the_user_are_one() -> None:
    said = [USER, USER, {"role": "assistant", "content": "a"}, {"role": "assistant", "content": "b"}]
    found, _ = shaped(said, [], TemplateAbilities(), short_ids=False)
    assert [one["content"] for one in found] == ["How is it?\nHow is it?", "a", "b"]


def test_a_result_that_is_no_object_is_a_value() -> None:
    can = TemplateAbilities(tools=True, calls=True, results=True, several=True, responses=True)
    found, _ = shaped([USER, calling(call(0)), result("[1]", 0)], [], can, short_ids=False)
    assert found[-1]["tool_responses"] == [{"name": "weather", "response": "[1]"}]


@pytest.mark.parametrize(("template", "wanted"), [
    (templates.HERMES, TemplateAbilities(True, True, True, True, True, False)),
    (templates.QWEN_CODER, TemplateAbilities(True, True, True, True, True, False)),
    (templates.LLAMA, TemplateAbilities(True, True, True, True, False, False)),
    (templates.MISTRAL, TemplateAbilities(False, True, True, True, True, False)),
    (templates.HARMONY, TemplateAbilities(True, True, True, True, False, False)),
    (templates.GEMMA_4, TemplateAbilities(True, True, True, True, True, False, True)),
    (templates.DEEPSEEK, TemplateAbilities(True, True, True, True, True, True)),
    (templates.GEMMA_3, TemplateAbilities(True)),
    ("{% for one in messages %}{{ one.role + one.content }}{% endfor %}", TemplateAbilities(True)),
    (templates.NO_SYSTEM, TemplateAbilities(False)),
    ("{{ raise_exception('no') }}", TemplateAbilities()),
])  # fmt: skip
def test_templates_show_what_they_can_do(template: str, wanted: TemplateAbilities) -> None:
    assert TemplateAbilities.of(ChatTemplate(template, VARIABLES)) == wanted


def test_arguments_are_text_where_a_template_wants_it(tmp_path: Path) -> None:
    assert 'weather\n```json\n{"city": "Rome é"}\n```<out>' in prompt(
        tmp_path, templates.DEEPSEEK, [USER, calling(call(0, **ROME)), result("wet", 0)]
    )


def test_a_template_without_tools_gets_them_in_words(tmp_path: Path) -> None:
    talk = [SYSTEM, USER, calling(call(0, **ROME), content="Hm."), result("wet", 0), result("late", 0), USER]
    text = prompt(tmp_path, templates.GEMMA_3, talk)
    assert text.startswith("<s><start_of_turn>user\nbe brief\n\n# Tools\n\n")
    assert f"<tools>\n{json.dumps(WEATHER)}\n</tools>" in text
    assert '{"name": <function-name>, "arguments": <args-json-object>}' in text
    turn = 'model\nHm.\n<tool_call>\n{"name": "weather", "arguments": {"city": "Rome é"}}\n</tool_call><end_of_turn>\n'
    assert turn in text
    answer = "<tool_response>\nwet\n</tool_response>\n<tool_response>\nlate\n</tool_response>\nHow is it?"
    assert f"<start_of_turn>user\n{answer}<end_of_turn>" in text


def test_a_template_that_refuses_the_system_gets_them_from_the_user(tmp_path: Path) -> None:
    text = prompt(tmp_path, templates.NO_SYSTEM, [USER])
    assert text.startswith("<s><start_of_turn>user\n# Tools") and text.endswith(
        "</tool_call>\n\nHow is it?<end_of_turn>\n<start_of_turn>model\n"
    )


def test_without_tools_nothing_changes(tmp_path: Path) -> None:
    assert prompt(tmp_path, templates.GEMMA_3, [USER], ()) == theirs(templates.GEMMA_3, [USER], None)


def test_a_template_for_tools_beside_the_default(tmp_path: Path) -> None:
    directory = make_model_dir(tmp_path / "model", template=None)
    several = [{"name": "default", "template": templates.GEMMA_3}, {"name": "tool_use", "template": templates.HERMES}]
    (directory / "tokenizer_config.json").write_text(json.dumps({"chat_template": several}))
    text = ModelText(directory)
    assert text.form is not None and text.form.name == "tagged objects"
    both = [byte_tokenizer().decode(text.prompt([USER], LONG, tools=one)) for one in ([], [WEATHER])]
    assert both[0].startswith("<start_of_turn>user") and both[1].startswith("<|im_start|>system\n# Tools")


def test_a_base_model_has_no_form(tmp_path: Path) -> None:
    assert ModelText(make_model_dir(tmp_path, template=None)).form is None


def test_the_form_is_seen_in_the_tokens_too(tmp_path: Path) -> None:
    directory, tokenizer = make_model_dir(tmp_path, "{{ tools }}"), byte_tokenizer()
    tokenizer.add_special_tokens([AddedToken("[TOOL_CALLS]", special=True)])
    tokenizer.save(str(directory / "tokenizer.json"))
    form = ModelText(directory).form
    assert form is not None and form.name == "mistral"
