"""Whole dialogues of the training split: one to several exchanges of mixed kinds, drawn from a seed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

from peerllm.builtin.exchanges.about import about, meaning, out_of_scope, small_talk
from peerllm.builtin.exchanges.digits import digits
from peerllm.builtin.exchanges.effects import aside, consequence, effect
from peerllm.builtin.exchanges.home import clarified, command, follow_up
from peerllm.builtin.exchanges.stories import story
from peerllm.builtin.exchanges.sums import LARGEST, sum_question
from peerllm.builtin.exchanges.units import unit_question

Exchange = tuple[str, str]  # what the user says, what the model answers


@dataclass(frozen=True, slots=True)
class Dialogue:
    """A conversation: an optional system text and the exchanges in order."""

    system: str | None
    exchanges: tuple[Exchange, ...]

    def messages(self) -> list[dict[str, str]]:
        """The dialogue in the shape that chat templates take."""
        found = [{"role": "system", "content": self.system}] if self.system else []
        for said, answer in self.exchanges:
            found += [{"role": "user", "content": said}, {"role": "assistant", "content": answer}]
        return found


# Share of each kind among the exchanges. A story is ten times as long as a command.
KINDS = {
    "home": 0.56, "clarified": 0.02, "sum": 0.17, "unit": 0.08, "story": 0.035, "about": 0.055,
    "talk": 0.02, "meaning": 0.03, "out_of_scope": 0.03,
}  # fmt: skip
NUMBER_KINDS = {
    "home": 0.42, "clarified": 0.02, "sum": 0.25, "unit": 0.08, "digits": 0.10, "story": 0.025, "about": 0.045,
    "talk": 0.015, "meaning": 0.025, "out_of_scope": 0.02,
}  # fmt: skip
EFFECT_KINDS = {
    "home": 0.47, "clarified": 0.02, "small_sum": 0.20, "unit": 0.07, "digits": 0.05, "story": 0.02, "about": 0.04,
    "talk": 0.015, "meaning": 0.02, "effect": 0.08, "out_of_scope": 0.02,
}  # fmt: skip
VARIED_KINDS = {
    "varied_home": 0.52, "home": 0.05, "clarified": 0.02, "small_sum": 0.15, "unit": 0.06, "digits": 0.03,
    "story": 0.025, "about": 0.035, "talk": 0.015, "meaning": 0.01, "consequence": 0.07, "out_of_scope": 0.015,
}  # fmt: skip
ASIDE_KINDS = {
    "varied_home": 0.34, "aside": 0.22, "home": 0.03, "clarified": 0.02, "small_sum": 0.12, "unit": 0.05,
    "digits": 0.04, "story": 0.025, "about": 0.03, "talk": 0.01, "meaning": 0.015, "consequence": 0.08,
    "out_of_scope": 0.02,
}  # fmt: skip
# The mixes in the recipe's order: those after the first have more of what was learned slowest.
MIXES = (KINDS, NUMBER_KINDS, EFFECT_KINDS, VARIED_KINDS, ASIDE_KINDS)
_SMALL_SUM = 99  # the largest operand
_SYSTEM_SHARE = 0.12
_SYSTEMS = (
    "You are a helpful assistant.", "You are the assistant of a smart home.", "Answer briefly.",
    "You are a friendly and helpful assistant that runs at home.",
    "You control the lights and the heating.",
)  # fmt: skip
_MORE_SHARE = 0.55  # chance of one more exchange after each
_LONGEST = 8  # exchanges


def dialogue(rng: Random, kinds: dict[str, float] | None = None) -> Dialogue:
    """A random training dialogue."""
    kinds = kinds or KINDS
    exchanges: list[Exchange] = []
    while not exchanges or (rng.random() < _MORE_SHARE and len(exchanges) < _LONGEST):
        exchanges += _some(rng, rng.choices(list(kinds), list(kinds.values()))[0])
    system = rng.choice(_SYSTEMS) if rng.random() < _SYSTEM_SHARE else None
    return Dialogue(system, tuple(exchanges))


def _some(rng: Random, kind: str) -> list[Exchange]:
    match kind:
        case "home" | "varied_home":
            asked = command(rng, varied=kind == "varied_home")
            later = follow_up(rng, asked) if rng.random() < 0.12 else None
            return [(asked.said, asked.answer), *([later] if later else [])]
        case "clarified":
            return clarified(rng)
        case "sum" | "small_sum" | "unit":
            largest = _SMALL_SUM if kind == "small_sum" else LARGEST
            question = unit_question(rng) if kind == "unit" else sum_question(rng, largest=largest)
            return [(question.said, question.answer)]
        case "effect":
            return [effect(rng)]
        case "aside":
            asked = aside(rng)
            return [(asked.said, asked.answer)]
        case "consequence":
            return [consequence(rng)]
        case "digits":
            return [digits(rng)]
        case "story":
            return [story(rng)]
        case "about":
            return [about(rng)]
        case "talk":
            return [small_talk(rng)]
        case "meaning":
            return [meaning(rng)]
        case "out_of_scope":
            return [out_of_scope(rng)]
    raise ValueError(f"no such kind of dialogue: {kind}")


def dialogues(seed: int, kinds: dict[str, float] | None = None) -> Iterator[Dialogue]:
    """The endless training stream of a seed and a mix."""
    rng = Random(seed)  # noqa: S311 - data, not secrets
    while True:
        yield dialogue(rng, kinds)
