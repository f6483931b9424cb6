"""The held-out commands share no verb, core or carrier with any training command."""

from __future__ import annotations

import json
import re
from random import Random

import pytest

from peerllm.builtin.evaluate import held_out_commands
from peerllm.builtin.exchanges.dialogues import MIXES, dialogue
from peerllm.builtin.exchanges.home import command
from peerllm.builtin.exchanges.phrasing import (
    CARRIERS,
    FRESH_CARRIERS,
    FRESH_VERBS,
    HELD_OUT_CARRIERS,
    VARIED_CARRIERS,
    Phrasing,
)
from peerllm.builtin.exchanges.skills import SKILLS
from peerllm.builtin.exchanges.sums import is_held_out

DRAWS = 5000


def verbs(phrasing: Phrasing) -> set[str]:
    return {*phrasing.clear, *phrasing.deciding}


TRAINED_VERBS = {verb for skill in SKILLS for verb in verbs(skill.trained)}
HELD_OUT_VERBS = {verb for skill in SKILLS for verb in verbs(skill.held_out)}
HELD_OUT_PATTERN = re.compile(r"\b(" + "|".join(map(re.escape, sorted(HELD_OUT_VERBS))) + r")\b", re.IGNORECASE)


def test_verbs_are_disjoint_over_all_skills() -> None:
    assert not TRAINED_VERBS & HELD_OUT_VERBS


def test_templates_are_disjoint_over_all_skills() -> None:
    trained = {core for skill in SKILLS for core in skill.trained.cores}
    held_out = {core for skill in SKILLS for core in skill.held_out.cores}
    assert not trained & held_out
    assert not {*CARRIERS, *VARIED_CARRIERS} & set(HELD_OUT_CARRIERS)


def test_no_training_command_holds_a_held_out_verb() -> None:
    rng = Random(21)
    for _ in range(DRAWS):
        said = command(rng).said
        assert not HELD_OUT_PATTERN.search(said), said


@pytest.mark.parametrize("kinds", MIXES)
def test_no_training_answer_obeys_a_held_out_verb(kinds: dict[str, float]) -> None:
    rng = Random(22)
    wanted = {asked.said.lower().rstrip(".!?") for asked in held_out_commands(DRAWS)}
    verbs_of = {skill.action: verbs(skill.held_out) for skill in SKILLS}
    for _ in range(DRAWS):
        for said, answer in dialogue(rng, kinds).exchanges:
            assert said.lower().rstrip(".!?") not in wanted
            if '{"action"' in answer:
                action = json.loads(answer.split("\n")[1])["action"]
                assert not {verb.lower() for verb in HELD_OUT_PATTERN.findall(said)} & verbs_of[action], said


def test_every_held_out_command_is_held_out_in_all_three_ways() -> None:
    trained_cores = {core for skill in SKILLS for core in skill.trained.cores}
    for asked in held_out_commands(500):
        assert asked.verb in HELD_OUT_VERBS
        assert not any(
            carrier.format(c=core) == asked.template
            for carrier in (*CARRIERS, *VARIED_CARRIERS)
            for core in trained_cores
        )


def test_varied_training_commands_hold_no_held_out_core() -> None:
    rng = Random(24)
    held_out = {core for skill in SKILLS for core in skill.held_out.cores}
    for _ in range(DRAWS):
        template = command(rng, varied=True).template
        assert not [core for core in held_out if template.endswith(core)], template


def test_fresh_commands_are_apart_too() -> None:
    assert not set(FRESH_VERBS) & (TRAINED_VERBS | HELD_OUT_VERBS)
    assert not set(FRESH_CARRIERS) & {*CARRIERS, *VARIED_CARRIERS, *HELD_OUT_CARRIERS}


def test_every_skill_is_in_the_held_out_set() -> None:
    assert {asked.skill.action for asked in held_out_commands(600)} == {skill.action for skill in SKILLS}


def test_held_out_operands_are_never_trained() -> None:
    rng = Random(23)
    pattern = re.compile(r"(\d+) ([+-]) (\d+) = -?\d+\.$")
    found = 0
    for _ in range(DRAWS):
        for _, answer in dialogue(rng).exchanges:
            worked = pattern.search(answer)
            if worked:
                found += 1
                assert not is_held_out(worked[2], int(worked[1]), int(worked[3]))
    assert found > 100
