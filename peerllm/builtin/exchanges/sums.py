"""Sums with their working, small products and quotients, and unit conversions."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from zlib import crc32

from peerllm.builtin.exchanges.words import spelled

HELD_OUT_OF = 10  # one pair of operands in ten is never trained on
LARGEST = 999
PLACES = ("Ones", "Tens", "Hundreds")


@dataclass(frozen=True, slots=True)
class Sum:
    """A question with a number as its result, and the answer that ends with it."""

    said: str
    answer: str
    result: str  # the last words of the answer
    kind: str


def is_held_out(*operands: int | str) -> bool:
    """Whether this pair of operands is kept out of training."""
    return crc32(repr(operands).encode()) % HELD_OUT_OF == 0


def sum_question(rng: Random, held_out: bool = False, largest: int = LARGEST) -> Sum:
    """A random sum, difference, product or quotient of the asked split; `largest` bounds the operands."""
    lot = rng.random()
    make = add if lot < 0.36 else subtract if lot < 0.66 else multiply if lot < 0.82 else divide
    while True:
        question = make(rng, held_out, largest)
        if question is not None:
            return question


def operand(rng: Random, largest: int = LARGEST) -> int:
    """A number of one to three digits, mostly two."""
    lot = rng.random()
    if lot < 0.25:
        return rng.randint(0, 20)
    return rng.randint(10, 99) if lot < 0.75 or largest < 100 else rng.randint(100, 999)


_ASK = (
    "what is {q}?", "what is {q}", "how much is {q}?", "calculate {q}", "{q}", "{q} = ?", "{q}?",
    "compute {q}", "can you work out {q}?", "please work out {q}", "tell me what {q} is",
    "I need to know {q}",
)  # fmt: skip


_SIGNS = {
    "+": ("+", "+", "plus"), "-": ("-", "-", "minus"),
    "x": ("x", "*", "times"), "/": ("/", ":", "divided by"),
}  # fmt: skip


def _ask(rng: Random, left: int, sign: str, right: int) -> str:
    words = {"+": "plus", "-": "minus", "x": "times", "/": "divided by"}
    if max(left, right) <= 100 and rng.random() < 0.08:
        query = f"{spelled(left)} {words[sign]} {spelled(right)}"
    else:
        query = f"{left} {rng.choice(_SIGNS[sign])} {right}"
        if rng.random() < 0.1:
            query = query.replace(" ", "") if not any(c.isalpha() for c in query) else query
    said = rng.choice(_ASK).format(q=query)
    return said[0].upper() + said[1:] if rng.random() < 0.7 else said


def add(rng: Random, held_out: bool, largest: int) -> Sum | None:
    """Addition up to three digits, worked place by place."""
    left, right = operand(rng, largest), operand(rng, largest)
    if is_held_out("+", left, right) != held_out:
        return None
    steps, carry = [], 0
    if max(left, right) >= 10 and min(left, right) > 0:
        for place, a, b in _digits(left, right):
            total = a + b + carry
            steps.append(f"{place}: {a} + {b}{' + 1' if carry else ''} = {total}.")
            carry = total // 10
    steps.append(f"{'So ' if steps else ''}{left} + {right} = {left + right}.")
    return Sum(_ask(rng, left, "+", right), " ".join(steps), f"{left + right}.", "addition")


def subtract(rng: Random, held_out: bool, largest: int) -> Sum | None:
    """Subtraction up to three digits with a result of zero or more, worked place by place."""
    right, left = sorted((operand(rng, largest), operand(rng, largest)))
    if is_held_out("-", left, right) != held_out:
        return None
    steps, borrow = [], 0
    if left >= 10 and right > 0:
        for place, a, b in _digits(left, right):
            have, take = a, b + borrow
            borrow = int(have < take)
            have += 10 * borrow
            steps.append(f"{place}: {have} - {take} = {have - take}{', borrow' if borrow else ''}.")
    steps.append(f"{'So ' if steps else ''}{left} - {right} = {left - right}.")
    return Sum(_ask(rng, left, "-", right), " ".join(steps), f"{left - right}.", "subtraction")


def _digits(left: int, right: int) -> list[tuple[str, int, int]]:
    count = len(str(max(left, right)))
    return [(PLACES[n], left // 10**n % 10, right // 10**n % 10) for n in range(count)]


def multiply(rng: Random, held_out: bool, largest: int) -> Sum | None:
    """Small products. The whole table is trained, so only the wording differs between the splits."""
    left, right = rng.randint(0, 12), rng.randint(0, 12)
    return Sum(_ask(rng, left, "x", right), f"{left} x {right} = {left * right}.", f"{left * right}.", "product")


def divide(rng: Random, held_out: bool, largest: int) -> Sum | None:
    """Quotients without remainder from the same table."""
    left, right = rng.randint(0, 12), rng.randint(1, 12)
    return Sum(_ask(rng, left * right, "/", right), f"{left * right} / {right} = {left}.", f"{left}.", "quotient")
