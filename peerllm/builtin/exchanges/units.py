"""Unit conversions by powers of ten and by the small factors of clock, calendar and dozen."""

from __future__ import annotations

from random import Random

from peerllm.builtin.exchanges.sums import Sum, is_held_out

_FACTORS: tuple[tuple[str, str, int], ...] = (
    ("kilometers", "meters", 1000),
    ("meters", "centimeters", 100),
    ("meters", "millimeters", 1000),
    ("centimeters", "millimeters", 10),
    ("kilograms", "grams", 1000),
    ("tons", "kilograms", 1000),
    ("liters", "milliliters", 1000),
    ("liters", "deciliters", 10),
    ("hours", "minutes", 60),
    ("minutes", "seconds", 60),
    ("days", "hours", 24),
    ("weeks", "days", 7),
    ("years", "months", 12),
    ("feet", "inches", 12),
    ("dozens", "pieces", 12),
)
_ASK = (
    "how many {b} are {n} {a}?", "convert {n} {a} to {b}", "what is {n} {a} in {b}?", "{n} {a} in {b}",
    "how many {b} are in {n} {a}?", "{n} {a} to {b}", "please convert {n} {a} into {b}",
    "I have {n} {a}, how many {b} is that?",
)  # fmt: skip
_SMALL = 12  # the largest amount where the factor is no power of ten


def unit_question(rng: Random, held_out: bool = False) -> Sum:
    """A conversion to the smaller unit, or back where it comes out whole."""
    while True:
        large, small, factor = rng.choice(_FACTORS)
        count = rng.randint(1, 99 if factor in (10, 100, 1000) else _SMALL)
        if is_held_out(large, small, count) == held_out:
            break
    back = rng.random() < 0.35
    given, source, result, target = (
        (count * factor, small, count, large) if back else (count, large, count * factor, small)
    )
    rule = f"{_one(large)} is {factor} {small}"
    said = rng.choice(_ASK).format(n=given, a=_plural(given, source), b=target)
    ending = f"{result} {_plural(result, target)}."
    answer = f"{rule}, so {given} {_plural(given, source)} {'is' if given == 1 else 'are'} {ending}"
    return Sum(said[0].upper() + said[1:] if rng.random() < 0.7 else said, answer, ending, "conversion")


def _singular(unit: str) -> str:
    return "foot" if unit == "feet" else unit[:-1]


def _plural(count: int, unit: str) -> str:
    return _singular(unit) if count == 1 else unit


def _one(unit: str) -> str:
    return f"One {_singular(unit)}"
