"""Reading numbers digit by digit: exercises of the later mixes, since sums need digits aligned by place."""

from __future__ import annotations

from random import Random

from peerllm.builtin.exchanges.sums import PLACES, is_held_out, operand

Exchange = tuple[str, str]

_REPEAT = ("repeat {n}", "say {n}", "read {n} back to me", "the number {n}", "write {n}")
_LAST = ("what is the last digit of {n}?", "last digit of {n}", "which digit is at the end of {n}?")
_PLACES = ("read {a} and {b} by places", "the digits of {a} and {b}", "line up {a} and {b}", "{a} and {b}, by places")


def digits(rng: Random) -> Exchange:
    """A number repeated, its last digit, or two numbers read place by place."""
    lot = rng.random()
    if lot < 0.3:
        number = rng.choice((operand(rng), rng.randint(0, 99_999)))
        return _typed(rng, rng.choice(_REPEAT).format(n=number)), f"{number}."
    if lot < 0.45:
        number = operand(rng)
        return _typed(rng, rng.choice(_LAST).format(n=number)), f"{number % 10}."
    first, second = operand(rng), operand(rng)
    while is_held_out("+", first, second) or is_held_out("-", *sorted((first, second), reverse=True)):
        first, second = operand(rng), operand(rng)
    places = range(len(str(max(first, second))))
    read = [f"{PLACES[n]}: {first // 10**n % 10} and {second // 10**n % 10}." for n in places]
    return _typed(rng, rng.choice(_PLACES).format(a=first, b=second)), " ".join(read)


def _typed(rng: Random, said: str) -> str:
    return said[0].upper() + said[1:] if rng.random() < 0.6 else said
