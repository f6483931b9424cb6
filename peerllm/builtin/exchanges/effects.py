"""Exchanges that talk about deciding verbs, held-out ones included, without carrying them out.

A held-out verb of a skill is never in an exchange that is answered with the action of that skill.
"""

from __future__ import annotations

from dataclasses import replace
from random import Random

from peerllm.builtin.exchanges.home import Command, command, draw_slots, finish
from peerllm.builtin.exchanges.phrasing import NOUNS, Skill
from peerllm.builtin.exchanges.skills import SKILLS
from peerllm.builtin.exchanges.words import KEY, Value

_HELD_OUT_SHARE = 0.6  # of the verbs in these exchanges
_TOLD = tuple(skill for skill in SKILLS if skill.trained.deciding and skill.held_out.deciding)
_EFFECT = (
    "what happens if I {c}?", "if I {c}, what happens?", "what is the state after I {c}?", "suppose I {c}",
    "somebody wants to {c}, what then?", "what would it do to {c}?",
)  # fmt: skip
_ASIDES = (
    "I will {a} myself, {c}", "Anna wants to {a}, so {c}", "we need not {a}, just {c}", "{c} before I {a}",
    "{c} after I {a}", "I can {a} alone, but {c}", "{c}, I will {a}", "while I {a}, {c}", "I have to {a}, {c}",
)  # fmt: skip


def _told(rng: Random, skills: tuple[Skill, ...]) -> tuple[str, Skill, dict[str, Value]]:
    skill = rng.choice(skills)
    verb = rng.choice((skill.held_out if rng.random() < _HELD_OUT_SHARE else skill.trained).deciding)
    core = rng.choice([core for core in skill.trained.cores if "{v}" in core])
    spoken, values = draw_slots(rng, skill)
    words = {noun: rng.choice(forms) for noun, forms in NOUNS.items()} | spoken
    return core.format(v=verb, **words), skill, values


def effect(rng: Random) -> tuple[str, str]:
    """What follows when somebody does a thing, told without an action; deciding verbs of both splits occur."""
    told, skill, values = _told(rng, _TOLD)
    said = rng.choice(_EFFECT).format(c=told)
    return finish(rng, said), skill.reply.format(**{slot: values[KEY.get(slot, slot)] for slot in skill.slots})


def consequence(rng: Random) -> tuple[str, str]:
    """An effect whose answer begins with "Then", so that it is not taken for the answer to a command."""
    said, answer = effect(rng)
    return said, f"Then {answer[0].lower() if not answer.startswith('I ') else 'I'}{answer[1:]}"


def aside(rng: Random) -> Command:
    """A varied command beside which somebody tells of doing another thing; only the command is obeyed."""
    asked = command(rng, varied=True)
    others = tuple(s for s in _TOLD if not set(s.held_out.deciding) & set(asked.skill.held_out.deciding))
    told, _, _ = _told(rng, others)
    bare = asked.said.rstrip(".!?")
    said = rng.choice(_ASIDES).format(a=told, c=bare[0].lower() + bare[1:])
    return replace(asked, said=finish(rng, said))
