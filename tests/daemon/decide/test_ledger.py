"""The ledger never promises more than is lent, whatever is asked in whatever order."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from peerllm.daemon.control_messages import Reserve
from peerllm.daemon.decide import ledger as module
from peerllm.daemon.decide.ledger import Ledger
from peerllm.errors import RefusedError
from tests.sizes import examples

DEPLOYMENTS = st.sampled_from(["x" * 32, "y" * 32, "z" * 32])
COORDINATORS = st.sampled_from(["a", "b"])
EPOCHS = st.integers(0, 4)


class Promises(RuleBasedStateMachine):
    """Against a plain model: a dictionary that is summed up."""

    def __init__(self) -> None:
        super().__init__()
        self.ledger, self.now = Ledger(100), 0.0
        self.model: dict[tuple[str, int], tuple[int, str, float | None]] = {}
        self.over: dict[tuple[str, str], int] = {}

    def live(self) -> None:
        self.model = {k: v for k, v in self.model.items() if v[2] is None or v[2] > self.now}

    @rule(deployment=DEPLOYMENTS, epoch=EPOCHS, who=COORDINATORS, nbytes=st.integers(-1, 110), lease=st.floats(0, 700))
    def reserve(self, deployment, epoch, who, nbytes, lease):
        self.live()
        held = self.model.get((deployment, epoch))
        others = {k: v for k, v in self.model.items() if k[0] == deployment}
        allowed = (
            0 <= nbytes <= 100 - sum(v[0] for k, v in self.model.items() if k != (deployment, epoch))
            and 0 < lease <= module.MAX_LEASE_S
            and epoch > self.over.get((deployment, who), -1)
            and all(v[1] == who and k[1] <= epoch for k, v in others.items())
            and (held is None or held[2] is not None)
        )
        try:
            self.ledger.reserve(Reserve(deployment, epoch, nbytes, lease), who, self.now)
        except RefusedError:
            assert not allowed
        else:
            assert allowed
            self.model[deployment, epoch] = (nbytes, who, self.now + lease)

    @rule(deployment=DEPLOYMENTS, epoch=EPOCHS, who=COORDINATORS)
    def commit(self, deployment, epoch, who):
        self.live()
        held = self.model.get((deployment, epoch))
        allowed = held is not None and held[1] == who and held[2] is not None
        try:
            self.ledger.commit(deployment, epoch, who, self.now)
        except RefusedError:
            assert not allowed
        else:
            assert allowed
            self.model[deployment, epoch] = (held[0], who, None)

    @rule(deployment=DEPLOYMENTS, epoch=EPOCHS, who=COORDINATORS)
    def release(self, deployment, epoch, who):
        self.ledger.release(deployment, epoch, who)
        self.model = {k: v for k, v in self.model.items() if k[0] != deployment or k[1] > epoch or v[1] != who}
        self.over[deployment, who] = max(epoch, self.over.get((deployment, who), -1))

    @rule(seconds=st.floats(0, 400))
    def wait(self, seconds):
        self.now += seconds
        self.ledger.lapse(self.now)

    @invariant()
    def never_more_than_lent(self):
        self.live()
        assert self.ledger.promised_bytes <= 100
        self.ledger.lapse(self.now)
        assert self.ledger.promised_bytes == sum(v[0] for v in self.model.values())


TestPromises = Promises.TestCase
TestPromises.settings = settings(max_examples=examples(120), stateful_step_count=40)


def test_what_is_free_is_said():
    ledger = Ledger(5_000_000)
    ledger.reserve(Reserve("x", 1, 3_000_000, 10), "a", 0)
    with pytest.raises(RefusedError, match=r"2\.50 MB are asked for, 2\.00 MB of 5\.00 MB are free"):
        ledger.reserve(Reserve("y", 1, 2_500_000, 10), "b", 1)
    ledger.reserve(Reserve("y", 1, 2_500_000, 10), "b", 10)  # the first lapsed


def test_renewing_does_not_count_twice_and_committing_makes_it_last():
    ledger = Ledger(100)
    ledger.reserve(Reserve("x", 1, 100, 10), "a", 0)
    ledger.reserve(Reserve("x", 1, 100, 10), "a", 9)
    ledger.commit("x", 1, "a", 18)
    assert not ledger.lapse(10_000)
    assert ledger.free_bytes == 0
    with pytest.raises(RefusedError, match="already committed"):
        ledger.reserve(Reserve("x", 1, 1, 10), "a", 20)


def test_a_late_question_does_not_revive_a_released_epoch():
    ledger = Ledger(100)
    ledger.release("x", 3, "a")
    for epoch in (1, 3):
        with pytest.raises(RefusedError, match="is over"):
            ledger.reserve(Reserve("x", epoch, 1, 10), "a", 0)
    ledger.reserve(Reserve("x", 4, 1, 10), "a", 0)


def test_a_release_by_another_shuts_nobody_out():
    ledger = Ledger(100)
    ledger.reserve(Reserve("x", 1, 10, 10), "a", 0)
    ledger.release("x", 10**9, "b")
    assert ledger.promised_bytes == 10
    ledger.reserve(Reserve("x", 2, 10, 10), "a", 0)


def test_promises_and_fences_are_bounded(monkeypatch):
    monkeypatch.setattr(module, "MAX_PROMISES", 3)
    monkeypatch.setattr(module, "MAX_FENCES", 2)
    ledger = Ledger(100)
    for name in "xyz":
        ledger.reserve(Reserve(name, 1, 1, 10), "a", 0)
    with pytest.raises(RefusedError, match="stop a model"):
        ledger.reserve(Reserve("w", 1, 1, 10), "a", 0)
    for name in "xyz":
        ledger.release(name, 1, "a")
    assert len(ledger._fences["a"]) == 2


def test_each_coordinator_has_its_share_of_promises_and_fences(monkeypatch):
    """Else one that reserves nothing, again and again, keeps all others out."""
    monkeypatch.setattr(module, "MAX_PROMISES", 3)
    monkeypatch.setattr(module, "MAX_FENCES", 2)
    ledger = Ledger(100)
    ledger.release("mine", 7, "b")
    for name in "xyz":
        ledger.reserve(Reserve(name, 1, 0, 10), "a", 0)
        ledger.release(f"not {name}", 1, "a")
    with pytest.raises(RefusedError, match="given to you"):
        ledger.reserve(Reserve("w", 1, 0, 10), "a", 0)
    ledger.reserve(Reserve("x", 1, 0, 20), "a", 0)  # renewed
    ledger.reserve(Reserve("w", 1, 1, 10), "b", 0)
    with pytest.raises(RefusedError, match="is over"):
        ledger.reserve(Reserve("mine", 7, 1, 10), "b", 0)


def test_the_fence_longest_unrenewed_goes_first(monkeypatch):
    monkeypatch.setattr(module, "MAX_FENCES", 2)
    ledger = Ledger(100)
    for name, epoch in (("x", 1), ("y", 1), ("x", 2), ("z", 1)):
        ledger.release(name, epoch, "a")
    for name, epoch in (("x", 2), ("z", 1)):
        with pytest.raises(RefusedError, match="is over"):
            ledger.reserve(Reserve(name, epoch, 1, 10), "a", 0)
    ledger.reserve(Reserve("y", 1, 1, 10), "a", 0)


def test_an_epoch_cannot_say_that_it_shares_more_than_was_promised():
    """Else who promised one byte would load as much as it likes beside it."""
    ledger = Ledger(100)
    ledger.reserve(Reserve("x", 1, 10, 10), "a", 0)
    for added in (0, 80):
        with pytest.raises(RefusedError, match="91 bytes are asked for, 90 bytes"):
            ledger.reserve(Reserve("x", 2, 101, 10, added), "a", 0)
    for _ in range(2):  # asking again renews it
        ledger.reserve(Reserve("x", 2, 100, 10, 0), "a", 0)
        assert ledger.promised_bytes == ledger.promised_to("x") == 100
    ledger.release("x", 1, "a")
    assert ledger.promised_bytes == 100
