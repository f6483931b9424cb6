"""What a model thinks before it answers, told apart from the answer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peerllm.api.text.stops import overlap
from peerllm.chat_templates import Marks


def thinking_variables(reasoning: bool | str | None) -> Mapping[str, Any]:
    """What chat templates call the switch; a text is how much is to be thought."""
    if reasoning is None:
        return {}
    switch = {"enable_thinking": bool(reasoning), "thinking": bool(reasoning)}
    return {**switch, "reasoning_effort": reasoning} if isinstance(reasoning, str) else switch


class ReasoningSplitter:
    """Divides a text that arrives in pieces of any size; space around the marks is left out.

    What comes out does not depend on how the text was cut into pieces. `opened`: the prompt ended with the first mark.
    """

    def __init__(self, marks: Marks | None, opened: bool) -> None:
        self._open, self._close = marks or ("", "")
        self._held = ""
        self._state = "answer" if marks is None else "thought" if opened else "start"
        self._space = opened  # what comes next begins with space that is left out

    @property
    def done(self) -> bool:
        """Whether all that comes is answer."""
        return self._state == "answer" and not self._space

    @property
    def held(self) -> int:
        """Characters that are not out yet."""
        return len(self._held)

    def push(self, text: str) -> tuple[str, str]:
        """What is certain now of what is thought, and of the answer."""
        if self.done:
            return "", text
        self._held += text
        thought = ""
        if self._state == "start":
            begun = self._held.lstrip()
            if begun.startswith(self._open):
                self._held, self._state, self._space = begun[len(self._open) :], "thought", True
            elif not self._open.startswith(begun):
                self._state = "answer"
        if self._state == "thought":
            thought = self._thought()
        return thought, self._answer() if self._state == "answer" else ""

    def flush(self) -> tuple[str, str]:
        """The rest: no more text comes."""
        rest, self._held = self._held, ""
        return (rest.rstrip(), "") if self._state == "thought" else ("", rest)

    def _thought(self) -> str:
        self._skip_space()
        at = self._held.find(self._close)
        if at >= 0:
            thought, self._held = self._held[:at].rstrip(), self._held[at + len(self._close) :]
            self._state, self._space = "answer", True
            return thought
        thought = self._held[: len(self._held) - overlap(self._held, self._close)].rstrip()
        self._held = self._held[len(thought) :]
        return thought

    def _answer(self) -> str:
        self._skip_space()
        text, self._held = self._held, ""
        return text

    def _skip_space(self) -> None:
        if self._space:
            self._held = self._held.lstrip()
            self._space = not self._held
