"""Slot words of the smart-home commands: each draw gives what is said and what goes into the action."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

Value = str | int
Drawn = tuple[str, Value]  # as said, as written in the action

ROOMS = (
    "kitchen", "bedroom", "living room", "bathroom", "office", "hall", "garage", "attic", "cellar",
    "nursery", "dining room", "guest room", "study", "laundry room", "library", "workshop",
    "hobby room", "playroom", "pantry", "porch", "terrace", "balcony", "garden", "winter garden",
    "stairwell", "corridor", "gym", "music room", "children's room", "utility room",
)  # fmt: skip
DOORS = (
    "front door", "back door", "garage door", "cellar door", "garden gate", "side door", "terrace door",
    "balcony door", "shed door", "main door",
)  # fmt: skip
SCENES = ("movie", "dinner", "night", "party", "reading", "morning", "away", "holiday", "romantic", "work")
GENRES = ("jazz", "rock", "classical", "pop", "folk", "blues", "piano", "dance", "ambient", "country", "soul")
COLORS = ("red", "blue", "green", "yellow", "orange", "purple", "pink", "white", "turquoise")
DEVICES = (
    "coffee machine", "kettle", "television", "fan", "dehumidifier", "washing machine", "toaster",
    "radio", "sprinkler", "oven", "dishwasher", "projector", "heat lamp", "fountain",
)  # fmt: skip
MEASURES = ("temperature", "humidity")

_SMALL = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven",
    "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
)  # fmt: skip
_TENS = ("", "", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
_SPELLED_SHARE = 0.12  # of the numbers are said in words


def spelled(number: int) -> str:
    """The English words of a number from 0 to 100."""
    if number < len(_SMALL):
        return _SMALL[number]
    if number == 100:
        return "one hundred"
    tens, ones = divmod(number, 10)
    return _TENS[tens] + (f"-{_SMALL[ones]}" if ones else "")


def _number(rng: Random, low: int, high: int, step: int) -> Drawn:
    fine = rng.random() < 0.4
    number = rng.randint(low, high) if fine else rng.randrange(low, high + 1, step)
    spell = number <= 100 and rng.random() < _SPELLED_SHARE
    return (spelled(number) if spell else str(number)), number


def _percent(rng: Random) -> Drawn:
    said, number = _number(rng, 0, 100, 5)
    if number == 50 and rng.random() < 0.2:
        return "half", 50
    unit = rng.choice((" percent", " percent", "%", " %")) if said.isdigit() else " percent"
    return said + unit, number


def _degrees(rng: Random) -> Drawn:
    said, number = _number(rng, 14, 26, 1)
    return said + rng.choice((" degrees", " degrees", " degrees Celsius", "")), number


def _minutes(rng: Random) -> Drawn:
    lot = rng.random()
    if lot < 0.06:
        return "half an hour", 30
    if lot < 0.12:
        return "an hour", 60
    said, number = _number(rng, 1, 120, 5)
    return f"{said} minute{'' if number == 1 else 's'}", number


def _from(words: tuple[str, ...]) -> Callable[[Random], Drawn]:
    def draw(rng: Random) -> Drawn:
        word = rng.choice(words)
        return word, word

    return draw


DRAW: dict[str, Callable[[Random], Drawn]] = {
    "room": _from(ROOMS),
    "door": _from(DOORS),
    "scene": _from(SCENES),
    "genre": _from(GENRES),
    "color": _from(COLORS),
    "device": _from(DEVICES),
    "what": _from(MEASURES),
    "percent": _percent,
    "degrees": _degrees,
    "level": _percent,
    "minutes": _minutes,
}
KEY = {"percent": "value", "degrees": "value", "level": "value"}  # slot -> its name in the action, if another

_ONSETS = (
    "b", "br", "d", "fl", "g", "gl", "j", "kr", "l", "m", "n", "pl", "r", "sk", "sn", "t", "tr", "v",
    "w", "z",
)  # fmt: skip
_VOWELS = ("a", "e", "i", "o", "u", "oo", "ee")
_CODAS = ("b", "ck", "d", "ft", "g", "lp", "m", "n", "nk", "p", "rk", "sh", "sp", "t", "x", "zz")


def nonsense(rng: Random) -> str:
    """A made-up verb, which teaches that words like 'on' or 'to 40 %' decide when the verb is unknown."""
    return rng.choice(_ONSETS) + rng.choice(_VOWELS) + rng.choice(_CODAS)
