"""What a smart-home skill is made of, and the words and sentences that all skills share.

In a core, {w} is a verb that the rest of the sentence makes clear ("{w} the light on"), {v} a verb that alone
decides ("{v} the light"). A carrier is the sentence around the core {c}. Held-out verbs, cores and carriers are in no
training command.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Phrasing:
    """Verbs and cores of one split; a core with {w} needs clear verbs, one with {v} deciding verbs."""

    clear: tuple[str, ...]
    deciding: tuple[str, ...]
    cores: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Skill:
    """One action, its slots in the order of the JSON object, its phrasings and its answer."""

    action: str
    slots: tuple[str, ...]
    trained: Phrasing
    held_out: Phrasing
    reply: str


NOUNS: dict[str, tuple[str, ...]] = {
    "light": ("light", "lights", "lamp", "lamps"),
    "blind": ("blinds", "blind", "shutters", "curtains"),
    "heating": ("heating", "heater", "radiator"),
}

CARRIERS: tuple[str, ...] = (
    "{c}", "{c}", "{c}", "please {c}", "{c} please", "{c}, please", "could you {c}?", "can you {c}?",
    "would you {c}?", "will you {c}?", "could you please {c}?", "can you please {c}?",
    "I want you to {c}", "I would like you to {c}", "I need you to {c}", "hey, {c}", "hello, {c}",
    "ok, {c}", "now {c}", "{c} now", "{c} right now", "{c} for me", "go ahead and {c}", "just {c}",
    "quick, {c}", "it is getting dark, so {c}", "I am cold, {c}", "I am tired, {c}",
    "we have guests, so {c}", "I am home, {c}", "before I leave, {c}", "good morning, {c}",
    "good evening, {c}", "dear house, {c}", "let us {c}", "it is time to {c}", "you should {c}",
    "you can {c}", "try to {c}", "{c}, thanks", "{c}, thank you", "my wish: {c}", "next, {c}",
    "one more thing, {c}", "{c} at once", "{c} when you can",
)  # fmt: skip
HELD_OUT_CARRIERS: tuple[str, ...] = (
    "be so kind as to {c}", "do me a favour and {c}", "when you get the chance, {c}",
    "I was hoping you could {c}", "is there any way you could {c}?", "{c}, would you?",
    "{c} if that is possible", "the baby sleeps, so {c}", "after that, {c}",
    "it would be lovely if you could {c}", "{c} straight away", "listen, {c}",
)  # fmt: skip
