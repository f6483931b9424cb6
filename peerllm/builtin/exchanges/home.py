"""Smart-home exchanges: a command, answered with one sentence and one JSON action on a line of its own."""

from __future__ import annotations

import json
from dataclasses import dataclass
from random import Random

from peerllm.builtin.exchanges.phrasing import (
    CARRIERS,
    FRESH_CARRIERS,
    FRESH_VERBS,
    HELD_OUT_CARRIERS,
    NOUNS,
    TRAILING,
    VARIED,
    VARIED_CARRIERS,
    Skill,
)  # fmt: skip
from peerllm.builtin.exchanges.skills import SKILLS
from peerllm.builtin.exchanges.words import DRAW, KEY, ROOMS, Value, nonsense

_NONSENSE_SHARE = 0.2  # of the training commands whose verb does not decide, get a made-up verb
_TWO_CARRIERS_SHARE = 0.25  # of the training commands: "good morning, could you ...?"
_VARIED_SHARE = 0.4  # of each part of a varied command
_LOOSE_SHARE = 0.35  # of the commands are said in lower case or without the last stop
_LEADING = tuple(carrier for carrier in CARRIERS if carrier.endswith((", {c}", " so {c}")))
_REAL_VERBS = {
    word
    for skill in SKILLS
    for phrasing in (skill.trained, skill.held_out)
    for verb in (*phrasing.clear, *phrasing.deciding)
    for word in verb.split()
}


@dataclass(frozen=True, slots=True)
class Command:
    """One command as said, its answer, and how it was made."""

    said: str
    reply: str
    action: dict[str, Value]
    skill: Skill
    template: str  # carrier and core, slots open
    verb: str
    verb_decides: bool

    @property
    def answer(self) -> str:
        """The whole answer: sentence, line break, action."""
        return f"{self.reply}\n{action_line(self.action)}"


def action_line(action: dict[str, Value]) -> str:
    """The action as the model is to write it: compact JSON, the keys in the order of the skill."""
    return json.dumps(action, separators=(",", ":"))


def command(rng: Random, held_out: bool = False, skill: Skill | None = None, varied: bool = False) -> Command:
    """A random command of the training split, in the last mix with more varied sentences, or of the held-out split."""
    return _command(rng, held_out, skill, varied, fresh=False)


def fresh_command(rng: Random) -> Command:
    """A held-out command with a carrier (and, where the verb does not decide, a verb) of the second test set."""
    return _command(rng, held_out=True, skill=None, varied=False, fresh=True)


def _command(rng: Random, held_out: bool, skill: Skill | None, varied: bool, *, fresh: bool) -> Command:
    skill = skill or rng.choice(SKILLS)
    phrasing = skill.held_out if held_out else skill.trained
    core = rng.choice(phrasing.cores)
    while ("{v}" in core and not phrasing.deciding) or ("{w}" in core and not phrasing.clear):
        core = rng.choice(phrasing.cores)
    decides = "{v}" in core
    verb = rng.choice(phrasing.deciding if decides else phrasing.clear)
    if not held_out and not decides and rng.random() < _NONSENSE_SHARE:
        verb = _made_up(rng)
    carrier = rng.choice(HELD_OUT_CARRIERS if held_out else CARRIERS)
    if fresh:
        carrier = rng.choice(FRESH_CARRIERS)
        verb = verb if decides else rng.choice(FRESH_VERBS)
    if varied:
        core, carrier = _varied(rng, core, carrier)
    if not held_out and rng.random() < _TWO_CARRIERS_SHARE:
        carrier = rng.choice(_LEADING).replace("{c}", carrier)
    spoken, values = draw_slots(rng, skill)
    words = {noun: rng.choice(forms) for noun, forms in NOUNS.items()} | spoken
    said = carrier.format(c=core.format(w=verb, v=verb, **words))
    return Command(
        said=finish(rng, said),
        reply=skill.reply.format(**{slot: values[KEY.get(slot, slot)] for slot in skill.slots}),
        action=values,
        skill=skill,
        template=carrier.format(c=core),
        verb=verb,
        verb_decides=decides,
    )


def _varied(rng: Random, core: str, carrier: str) -> tuple[str, str]:
    for part, others in VARIED.items():
        if rng.random() < _VARIED_SHARE:
            core = core.replace(part, rng.choice(others), 1)
    if rng.random() < _VARIED_SHARE:
        carrier = rng.choice(VARIED_CARRIERS)
    if rng.random() < _VARIED_SHARE:
        carrier = carrier.replace("{c}", "{c}" + rng.choice((" ", " ", ", ")) + rng.choice(TRAILING))
    return core, carrier


def _made_up(rng: Random) -> str:
    while (verb := nonsense(rng)) in _REAL_VERBS:  # a made-up verb may equal a held-out one
        pass
    return verb


def draw_slots(rng: Random, skill: Skill) -> tuple[dict[str, str], dict[str, Value]]:
    """The slots of a skill as said, and the action that holds their values."""
    spoken: dict[str, str] = {}
    action: dict[str, Value] = {"action": skill.action}
    for slot in skill.slots:
        spoken[slot], action[KEY.get(slot, slot)] = DRAW[slot](rng)
    return spoken, action


def finish(rng: Random, said: str) -> str:
    """A sentence as people type it: mostly with a capital and a stop, sometimes loosely."""
    if rng.random() < _LOOSE_SHARE:
        return said if rng.random() < 0.5 else said.rstrip("?").lower()
    said = said[0].upper() + said[1:]
    return said if said.endswith("?") else said + rng.choice((".", ".", "", "!"))


_ELSEWHERE = (
    "and in the {room}?", "the same in the {room}, please", "and the {room}?", "also in the {room}",
    "now the {room}", "do that in the {room} too", "what about the {room}?",
)  # fmt: skip
_OTHER_VALUE = (
    "make it {x}", "no, {x}", "rather {x}", "change that to {x}", "{x} is better", "actually {x}, please",
)  # fmt: skip


def follow_up(rng: Random, before: Command) -> tuple[str, str] | None:
    """What may be said after a command, and its answer: the same elsewhere, or with another value."""
    skill, action = before.skill, dict(before.action)
    numeric = [slot for slot in skill.slots if slot in ("percent", "degrees", "level", "minutes")]
    if numeric and rng.random() < 0.5:
        spoken, action[KEY.get(numeric[0], numeric[0])] = DRAW[numeric[0]](rng)
        said = rng.choice(_OTHER_VALUE).format(x=spoken)
    elif "room" in skill.slots:
        action["room"] = rng.choice(ROOMS)
        said = rng.choice(_ELSEWHERE).format(room=action["room"])
    else:
        return None
    reply = skill.reply.format(**{slot: action[KEY.get(slot, slot)] for slot in skill.slots})
    return finish(rng, said), f"{reply}\n{action_line(action)}"


_WITHOUT_ROOM = {
    "light.on": ("turn on the light", "switch the light on", "lights on", "light, please"),
    "light.off": ("turn off the light", "switch the light off", "lights off"),
    "blind.open": ("open the blinds", "raise the blinds", "blinds up"),
    "blind.close": ("close the blinds", "lower the blinds", "blinds down"),
    "heating.on": ("turn on the heating", "start the heating"),
    "heating.off": ("turn off the heating", "stop the heating"),
    "music.stop": ("stop the music", "music off", "pause the music"),
}


def clarified(rng: Random) -> list[tuple[str, str]]:
    """A command without its room, the question in return, and the room."""
    action = rng.choice(sorted(_WITHOUT_ROOM))
    skill = next(skill for skill in SKILLS if skill.action == action)
    room = rng.choice(ROOMS)
    named = rng.choice(("in the {room}", "the {room}", "{room}", "{room}, please")).format(room=room)
    done = f"{skill.reply.format(room=room)}\n{action_line({'action': action, 'room': room})}"
    asked = finish(rng, rng.choice(_WITHOUT_ROOM[action]))
    return [(asked, "In which room?"), (finish(rng, named), done)]
