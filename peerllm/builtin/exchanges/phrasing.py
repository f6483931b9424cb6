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

# For the last mix: what may stand after the core, other carriers, and other ways to name the place and the things.
TRAILING: tuple[str, ...] = (
    "before dinner", "after lunch", "as soon as you can", "as usual", "today", "tonight", "this evening",
    "in the meantime", "and hurry up", "because it is late", "because I am cold", "while I am away",
    "so that I can sleep", "if you like", "if it is not too late", "without delay", "as fast as you can", "once more",
    "for a while", "like yesterday", "for the children", "and thank you", "my dear", "my friend", "computer",
    "the sooner the better", "it is urgent", "since it is hot", "as I said", "until tomorrow", "before we eat",
    "first of all", "if nothing speaks against it", "when you are ready", "and nothing else", "no rush", "I beg you",
    "if you are able to", "on the double", "this minute", "will you?", "can you?", "right?",
)  # fmt: skip
VARIED_CARRIERS: tuple[str, ...] = (
    "it is late, so {c}", "the film begins, so {c}", "we are in a hurry, so {c}", "my hands are full, so {c}",
    "I would be happy if you could {c}", "would it be fine to {c}?", "I wonder if you can {c}",
    "may I ask you to {c}?", "kindly {c}", "remember to {c}", "be quick and {c}", "I think you should {c}",
    "somebody should {c}", "please be nice and {c}", "then {c}", "first {c}", "finally {c}", "so {c}",
    "what I want is that you {c}", "your next job is to {c}", "attention, {c}", "by the way, {c}", "as always, {c}",
    "when you are done, {c}", "if you hear me, {c}", "it would help to {c}", "how about you {c}?", "again, {c}",
)  # fmt: skip
VARIED: dict[str, tuple[str, ...]] = {
    " in the {room}": (
        " down in the {room}",
        " up in the {room}",
        " inside the {room}",
        " in our {room}",
        " at the {room}",
    ),
    " the {light}": (" all the {light}", " my {light}", " our {light}"),
    " the {blind}": (" all the {blind}", " my {blind}", " our {blind}"),
    " the {heating}": (" my {heating}", " our {heating}"),
    " my {d": (" this {d", " the old {d"),
    " the {device}": (" this {device}", " the old {device}"),
    " the {door}": (" this {door}", " the old {door}"),
    " the timer": (" this timer", " the old timer"),
}

# A second test set, written after the last mix was settled: these were never looked at in development.
FRESH_CARRIERS: tuple[str, ...] = (
    "my dear assistant, {c}", "it would be great to have you {c}", "before the guests arrive, {c}",
    "{c} for my sister", "{c} during the meal", "I insist that you {c}", "are you able to {c}?", "right away, {c}",
    "{c} or I get angry",
)  # fmt: skip
FRESH_VERBS: tuple[str, ...] = ("poke", "whack", "jiggle", "fiddle", "twist", "flip", "prod", "swing")
