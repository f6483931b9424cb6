"""How much each has asked this device for: names and counts, never what was said."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import TypedDict

from peerllm.api.core.answer_events import AnswerEnds, AnswerEvent
from peerllm.api.core.caller import Caller

MAX_ACCOUNTS = 256  # those without an answer under way go first, the longest silent before others


@dataclass(slots=True)
class Account:
    """`by`: how it is known who asks (caller.Caller.known_by). Answers are those that came to their end."""

    name: str
    by: str
    device: str  # that relays, "": this one is asked
    under_way: int = 0
    answers: int = 0
    prompt_tokens: int = 0
    answer_tokens: int = 0


class AskerStatus(TypedDict):
    """An account as it is shown; `device` by its name."""

    name: str
    by: str
    device: str
    under_way: int
    answers: int
    prompt_tokens: int
    answer_tokens: int


class Accounts:
    """Since the device's start."""

    def __init__(self) -> None:
        self._accounts: OrderedDict[tuple[str, str, str], Account] = OrderedDict()

    async def counted(self, caller: Caller, events: AsyncGenerator[AnswerEvent]) -> AsyncGenerator[AnswerEvent]:
        """The same events."""
        account = self._of(caller)
        account.under_way += 1
        try:
            async with aclosing(events):
                async for event in events:
                    if isinstance(event, AnswerEnds):
                        account.answers += 1
                        account.prompt_tokens += event.usage.prompt_tokens
                        account.answer_tokens += event.usage.answer_tokens
                    yield event
        finally:
            account.under_way -= 1

    def told(self, device_name: Callable[[str], str]) -> list[AskerStatus]:
        """Who asked last comes first."""
        return [
            {
                "name": one.name,
                "by": one.by,
                "device": device_name(one.device) if one.device else "",
                "under_way": one.under_way,
                "answers": one.answers,
                "prompt_tokens": one.prompt_tokens,
                "answer_tokens": one.answer_tokens,
            }
            for one in reversed(self._accounts.values())
        ]

    def _of(self, caller: Caller) -> Account:
        key = caller.device, caller.known_by, caller.shown
        account = self._accounts.setdefault(key, Account(caller.shown, caller.known_by, caller.device))
        self._accounts.move_to_end(key)
        idle = [one for one, held in self._accounts.items() if not held.under_way and held is not account]
        for one in idle[: max(0, len(self._accounts) - MAX_ACCOUNTS)]:
            del self._accounts[one]
        return account
