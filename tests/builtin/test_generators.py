"""The generators: the same dialogues from the same seed, and right answers in them."""

from __future__ import annotations

import json
import re
from itertools import islice
from random import Random

import pytest
from tokenizers import Tokenizer

from peerllm.builtin import MODEL_DIR
from peerllm.builtin.exchanges.about import about
from peerllm.builtin.exchanges.dialogues import MIXES, dialogue, dialogues
from peerllm.builtin.exchanges.digits import digits
from peerllm.builtin.exchanges.home import clarified, command, follow_up
from peerllm.builtin.exchanges.phrasing import Skill
from peerllm.builtin.exchanges.skills import SKILLS
from peerllm.builtin.exchanges.stories import story
from peerllm.builtin.exchanges.sums import sum_question
from peerllm.builtin.exchanges.units import unit_question


def test_a_seed_decides_everything() -> None:
    first, again, other = (list(islice(dialogues(seed), 200)) for seed in (5, 5, 6))
    assert first == again
    assert first != other


@pytest.mark.parametrize("kind", sorted({kind for mix in MIXES for kind in mix}))
def test_every_kind_gives_whole_exchanges(kind: str) -> None:
    rng = Random(1)
    for _ in range(50):
        talk = dialogue(rng, {kind: 1.0})
        assert all(said.strip() and answer.strip() for said, answer in talk.exchanges)
        assert not any("{" in said or "<|" in said + answer for said, answer in talk.exchanges)


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="weather"):
        dialogue(Random(1), {"weather": 1.0})


@pytest.mark.parametrize("held_out", [False, True])
@pytest.mark.parametrize("skill", SKILLS, ids=lambda skill: skill.action)
def test_an_answer_is_a_sentence_and_an_action(skill: Skill, held_out: bool) -> None:
    rng = Random(2)
    for _ in range(30):
        asked = command(rng, held_out, skill)
        sentence, line = asked.answer.split("\n")
        assert sentence.endswith(".")
        assert json.loads(line) == asked.action
        assert next(iter(asked.action)) == "action"
        assert asked.action["action"] == skill.action
        assert len(asked.action) == 1 + len(skill.slots)


def test_a_room_said_is_the_room_meant() -> None:
    rng = Random(3)
    for _ in range(300):
        asked = command(rng, held_out=rng.random() < 0.5)
        if "room" in asked.action:
            assert str(asked.action["room"]) in asked.said.lower()


def test_a_follow_up_changes_one_thing() -> None:
    rng = Random(4)
    for _ in range(200):
        first = command(rng)
        later = follow_up(rng, first)
        if later:
            action = json.loads(later[1].split("\n")[1])
            assert action.keys() == first.action.keys()
            assert sum(action[key] != first.action[key] for key in action) <= 1


def test_a_missing_room_is_asked_for() -> None:
    (_, question), (_, answer) = clarified(Random(5))
    assert question == "In which room?"
    assert json.loads(answer.split("\n")[1])["room"]


@pytest.mark.parametrize("held_out", [False, True])
def test_every_step_of_a_sum_is_right(held_out: bool) -> None:
    rng = Random(6)
    for _ in range(500):
        answer = sum_question(rng, held_out).answer
        for left, right in re.findall(r"([\d+\-x/ ]+) = (\d+)", answer):
            assert eval(left.replace("x", "*")) == int(right), answer


def test_places_are_read_right() -> None:
    rng = Random(10)
    for _ in range(300):
        said, answer = digits(rng)
        numbers = [int(number) for number in re.findall(r"\d+", said)]
        if "Ones" in answer:
            read = [re.findall(r"\d", place) for place in reversed(answer.split("."))]
            assert [int("".join(column)) for column in zip(*filter(None, read), strict=True)] == numbers
        else:
            assert str(numbers[0]).endswith(answer.rstrip("."))


def test_conversions_agree_with_their_rule() -> None:
    rng = Random(7)
    for _ in range(300):
        answer = unit_question(rng).answer
        found = re.fullmatch(r"One (\w+) is (\d+) \w+, so (\d+) (\w+) (?:is|are) (\d+) \w+\.", answer)
        assert found, answer
        factor, given, result = int(found[2]), int(found[3]), int(found[5])
        assert given * factor == result or result * factor == given


def test_a_story_has_the_length_and_the_things_asked_for() -> None:
    tokenizer = Tokenizer.from_file(str(MODEL_DIR / "tokenizer.json"))
    rng = Random(8)
    for _ in range(100):
        asked, told = story(rng)
        assert 180 <= len(tokenizer.encode(told).ids) <= 500
        lines = told.split("\n")
        assert len(lines) == len(set(lines))
        named = re.search(r"story about an? (\w+)", asked)
        if named:
            assert named[1] in told


def test_it_says_what_it_is() -> None:
    rng = Random(9)
    answers = {about(rng)[1] for _ in range(500)}
    assert any("very small language model" in answer and "demonstration" in answer for answer in answers)
