"""The masks of all constrained answers of this engine, each computed while the step it is for goes round the ring.

Two threads: one reads tokenizers and grammars, which may take seconds, the other goes on with answers. Both work in
compiled code mostly, which lets go of Python's lock.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peerllm.engine.masks.mask_vocabulary import mask_tokenizer
from peerllm.engine.messages import GRAMMAR_LIMITS, Constraint
from peerllm.engine.sampler import mask_bytes
from peerllm.errors import PeerLLMError, one_line
from peerllm.regular_files import read_regular
from peerllm.types import DeploymentId

MAX_TOKENIZERS = 2  # kept in memory; the largest takes some 130 MB
MAX_TOKENIZER_BYTES = 64 << 20

Key = tuple[DeploymentId, int]  # and the sequence


class MaskError(PeerLLMError):
    """An answer cannot be kept within its grammar."""


@dataclass(frozen=True, slots=True)
class MadeMask:
    """What an answer may go on with after its first `count` ids: a bit for each token id, the lowest first.

    Without any bit it is over. With an `error` it cannot go on.
    """

    deployment: DeploymentId
    sequence: int
    count: int
    mask: bytes = b""
    error: str = ""


class AnswerMatcher:
    """One answer within its grammar; it goes forward only."""

    def __init__(
        self, tokenizer: Any, constraint: Constraint, vocabulary: int, ids: Sequence[int] = (), endless: bool = False
    ) -> None:
        """`ids` are known of the answer. MaskError if they do not fit it, or it is no grammar.

        `endless`: the model has no end tokens.
        """
        from llguidance import LLMatcher, LLParserLimits

        self._bytes, self._endless = mask_bytes(vocabulary), endless
        self._matcher = LLMatcher(tokenizer, constraint.grammar, log_level=0, limits=LLParserLimits(**GRAMMAR_LIMITS))
        self._check()
        self.count = len(ids)
        self._matcher.consume_tokens(list(ids))
        self._check()

    def advance(self, token: int) -> None:
        self._matcher.consume_token(token)
        self._check()
        self.count += 1

    def mask(self) -> bytes:
        """What may come next; no bit: nothing."""
        bits: bytes = self._matcher.compute_bitmask()
        self._check()
        over = self._endless and self._matcher.is_stopped()
        return b"" if over else bits[: self._bytes].ljust(self._bytes, b"\0")

    def _check(self) -> None:
        if self._matcher.is_error():
            raise MaskError(f"the answer cannot be kept in its form: {' '.join(self._matcher.get_error().split())}")


@dataclass(slots=True)
class _Answer:
    matcher: AnswerMatcher | None = None


class MaskMaker:
    """`made` is called by its threads. One thread calls all methods; the next mask is asked for when one was used."""

    def __init__(self, made: Callable[[MadeMask], None]) -> None:
        self._made = made
        self._answers: dict[Key, _Answer] = {}
        self._tokenizers: OrderedDict[tuple[str, tuple[int, ...]], Any] = OrderedDict()
        self._reading = ThreadPoolExecutor(1, thread_name_prefix="engine-grammars")
        self._going_on = ThreadPoolExecutor(1, thread_name_prefix="engine-masks")

    def begin(
        self, key: Key, constraint: Constraint, vocabulary: int, stop_ids: Sequence[int], ids: Sequence[int]
    ) -> None:
        """An answer starts, or goes on after `ids`."""
        answer = self._answers[key] = _Answer()
        self._reading.submit(self._begin, key, answer, constraint, vocabulary, tuple(stop_ids), tuple(ids))

    def advance(self, key: Key, token: int) -> None:
        """An answer's next token is known; none that ends it."""
        if (answer := self._answers.get(key)) is not None:
            self._going_on.submit(self._advance, key, answer, token)

    def end(self, key: Key) -> None:
        """Unknown answers are ignored."""
        self._answers.pop(key, None)

    def close(self) -> None:
        for pool in (self._reading, self._going_on):
            pool.shutdown(wait=False, cancel_futures=True)

    # ---- in its threads ---------------------------------------------------------------------------------------------

    def _begin(
        self,
        key: Key,
        answer: _Answer,
        constraint: Constraint,
        vocabulary: int,
        stop_ids: tuple[int, ...],
        ids: tuple[int, ...],
    ) -> None:
        def work() -> MadeMask:
            tokenizer = self._tokenizer(constraint.tokenizer, stop_ids)
            answer.matcher = AnswerMatcher(tokenizer, constraint, vocabulary, ids, not stop_ids)
            return MadeMask(*key, answer.matcher.count, answer.matcher.mask())

        if self._answers.get(key) is answer:  # else it ended while it waited
            self._do(key, work)

    def _advance(self, key: Key, answer: _Answer, token: int, begun: bool = False) -> None:
        if answer.matcher is None:  # it began anew, and the head had the mask that it was told before
            if not begun:
                self._reading.submit(self._advance, key, answer, token, True)
            return

        def work() -> MadeMask:
            assert answer.matcher is not None
            answer.matcher.advance(token)
            return MadeMask(*key, answer.matcher.count, answer.matcher.mask())

        self._do(key, work)

    def _do(self, key: Key, work: Callable[[], MadeMask]) -> None:
        try:
            made = work()
        except PeerLLMError as error:
            made = MadeMask(*key, 0, error=str(error))
        except Exception as error:  # foreign files, and a library's words about them
            made = MadeMask(*key, 0, error=f"the answer's form: {type(error).__name__}: {one_line(error)}")
        self._made(made)

    def _tokenizer(self, path: str, stop_ids: tuple[int, ...]) -> Any:
        key = path, stop_ids
        if key not in self._tokenizers:
            self._tokenizers[key] = mask_tokenizer(read_regular(Path(path), MAX_TOKENIZER_BYTES), stop_ids)
            while len(self._tokenizers) > MAX_TOKENIZERS:
                self._tokenizers.popitem(last=False)
        self._tokenizers.move_to_end(key)
        return self._tokenizers[key]
