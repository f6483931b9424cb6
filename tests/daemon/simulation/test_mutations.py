"""Planted mistakes, two or more for each invariant that lives here: the histories must catch each of them.

The numbers are those of the design's invariants: 1 the same tokens, 2 one coordinator, 3 frames of their epoch only,
4 no silent end, 6 bounds, 8 no more memory than lent. "epochs": they grow, one switch at a time, nothing in use is let
go of. "pause": what is back in time is not replaced. "noise": plans do not flap.

Of a coordinator that is lost: "votes": a strict majority, one of each device in a term. "patience": one that is back in
time, or needed, is not followed. "terms": no two use one epoch. "one left": at the end one coordinates, whom all obey.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from peerllm.daemon.decide import ledger
from peerllm.daemon.decide.deployment_life import deployment_events as on
from peerllm.daemon.decide.deployment_life import pacing, situation
from peerllm.daemon.decide.deployment_life.deployment_decider import DeploymentDecider
from peerllm.daemon.decide.deployment_life.pacing import Attempts, Comparisons
from peerllm.daemon.decide.deployment_life.rules import DeploymentRules
from peerllm.daemon.decide.deployment_life.situation import Establishing, HouseholdDevices, PlanInHand
from peerllm.daemon.decide.ledger import Ledger
from peerllm.daemon.decide.succession import followed_deployment, own_deployments
from peerllm.daemon.decide.succession.followed_deployment import FollowedDeployment
from peerllm.daemon.decide.succession.own_deployments import OwnDeployments
from peerllm.daemon.decide.succession.succession_decider import Succession
from tests.daemon.simulation.history import LONG, LOSSES, History
from tests.daemon.simulation.model_coordinator import ModelCoordinator
from tests.daemon.simulation.model_engine import ModelEngine, ModelSlot
from tests.daemon.simulation.model_source import ModelSource
from tests.sizes import FULL

MOST_HISTORIES = 400  # until a mistake is caught
NOISE_S = 600.0

Patch = pytest.MonkeyPatch


def short_silences(seed: int) -> None:
    """Silences of less than two seconds: answers pause, and nobody says that the deployment waits."""
    history = History(seed, {"blip": 3, "one_way": 1, "freeze": 3}, (0.3, 0.9, 1.3), resets=False, apart_s=3.0)
    history.run()
    assert history.house.coordinator.waits == 0, "\n".join(history.house.coordinator.log)


def noise(seed: int) -> None:
    """Measurements change all the time, and there is always a plan that looks better: two moves in ten minutes."""
    history = History(seed, {"conditions": 1}, most=200, least=100, until=NOISE_S)
    history.run()
    assert history.house.coordinator.moves <= 1 + pacing.MOVES


def scarce_memory(seed: int) -> None:
    """Other models come and go, and devices with them."""
    History(seed, {"memory": 3, "leave": 2, "die": 2}).run()


def refusals(seed: int) -> None:
    """Devices refuse everything for a while, die, and come back."""
    History(seed, {"stubborn": 3, "die": 2}, (4.0, 12.0), least=8).run()


def anything(seed: int) -> None:
    History(seed).run()


def losses(seed: int) -> None:
    """Whoever coordinates dies, stands still or is cut off, and comes back."""
    History(seed, LOSSES, LONG, succession=True).run()


def wrapped(patch: Patch, owner: Any, name: str, around: Callable[..., Any]) -> None:
    """Have `around(original, self, ...)` called instead."""
    original = getattr(owner, name)
    patch.setattr(owner, name, lambda self, *args, **more: around(original, self, *args, **more))


# ---- the mistakes ---------------------------------------------------------------------------------------------------


def replays_one_layer_too_few(patch: Patch) -> None:
    wrapped(patch, ModelSource, "_replay", lambda do, self, running, last, has: do(self, running, last - 1, has))


def replays_one_token_too_few(patch: Patch) -> None:
    wrapped(patch, ModelSource, "_replay", lambda do, self, running, last, has: do(self, running, last, has + 1))


def carries_a_wrong_state(patch: Patch) -> None:
    def take(do: Any, self: ModelEngine, number: int, epoch: int, kept: dict[int, tuple[int, list[int]]]) -> None:
        do(self, number, epoch, {slot: (one, [*values[:-1], 7][: len(values)]) for slot, (one, values) in kept.items()})

    wrapped(patch, ModelEngine, "take", take)


def keeps_the_state_of_the_last_sequence(patch: Patch) -> None:
    def slot(self: ModelEngine, number: int, frame: Any) -> Any:
        found = self.slots[number].setdefault(frame.slot, ModelSlot())
        found.sequence = frame.sequence
        return found

    patch.setattr(ModelEngine, "_slot", slot)


def obeys_every_coordinator(patch: Patch) -> None:
    patch.setattr(Ledger, "_check_turn", lambda self, deployment, epoch, coordinator: None)


def lets_anybody_release(patch: Patch) -> None:
    def release(do: Any, self: Ledger, deployment: str, epoch: int, coordinator: str, only: bool = False) -> None:
        for promise in self.promises():
            do(self, deployment, epoch, promise.coordinator, only)
        do(self, deployment, epoch, coordinator, only)

    wrapped(patch, Ledger, "release", release)


def computes_frames_of_any_epoch(patch: Patch) -> None:
    def hear(do: Any, self: ModelEngine, stage: int, frame: Any) -> None:
        if frame.kind != "open" and frame.slot in self.current:
            self.current[frame.slot] = frame.sequence, frame.epoch
        do(self, stage, frame)

    wrapped(patch, ModelEngine, "hear", hear)
    patch.setattr(ModelEngine, "_fits", lambda self, first, last, frame: True)


def takes_tokens_of_any_position(patch: Patch) -> None:
    def expected(do: Any, self: ModelSource, running: Any, frame: Any) -> bool:
        moved = replace(frame, start=running.position) if frame.kind == "step" else frame
        return bool(do(self, running, moved))

    wrapped(patch, ModelSource, "expected", expected)


def takes_late_answers_for_new_ones(patch: Patch) -> None:
    def note(do: Any, self: DeploymentDecider, event: on.DeploymentEvent, now: float) -> Any:
        work = self._rules.under_way
        if isinstance(event, on.Established) and isinstance(work, Establishing):
            event = replace(event, epoch=work.epoch)
        return do(self, event, now)

    wrapped(patch, DeploymentDecider, "_note", note)
    _answers_after_abandon(patch)


def _answers_after_abandon(patch: Patch) -> None:
    """The coordinator answers once more for an epoch that was abandoned, as one that is slow to hear of it may."""

    def do(original: Any, self: Any, action: on.DeploymentAction) -> None:
        original(self, action)
        if isinstance(action, on.Abandon):
            self._later(0.05, lambda: self.feed(on.Established(action.epoch)))

    wrapped(patch, ModelCoordinator, "_do", do)


def gives_up_though_it_has_served(patch: Patch) -> None:
    wrapped(
        patch,
        DeploymentRules,
        "switch",
        lambda do, self, work, now: [do(self, work, now), setattr(self, "lasting", False)][0],
    )


def never_tries_again(patch: Patch) -> None:
    patch.setattr(Attempts, "next_at", lambda self, without: 1e9 if self._hopeless is not None else 0.0)
    patch.setattr(Attempts, "hope", lambda self: None)


def forgets_broken_links(patch: Patch) -> None:
    patch.setattr(DeploymentDecider, "_note_links", lambda self, event, now: [])


def forgets_lost_engines(patch: Patch) -> None:
    patch.setattr(DeploymentDecider, "_note_engine", lambda self, device, epoch, reason, now: [])


def does_not_serve_on(patch: Patch) -> None:
    without(patch, DeploymentRules.serve_on)


def without(patch: Patch, rule: Any) -> None:
    patch.setattr(DeploymentRules, "TABLE", tuple(one for one in DeploymentRules.TABLE if one is not rule))


def keeps_a_plan_whose_device_is_gone(patch: Patch) -> None:
    without(patch, DeploymentRules.give_up_target)


def tries_at_once_again(patch: Patch) -> None:
    patch.setattr(pacing, "CONTENTION_S", 0.0)
    patch.setattr(pacing, "MAX_ATTEMPTS", 1_000_000)


def retries_without_a_wait(patch: Patch) -> None:
    patch.setattr(pacing, "RETRY_S", 0.0)


def promises_what_it_has_not(patch: Patch) -> None:
    patch.setattr(Ledger, "free_bytes", property(lambda self: 1 << 40))


def counts_too_little(patch: Patch) -> None:
    patch.setattr(ledger, "added_to", lambda promised, nbytes, added: 0 if promised else nbytes)


def makes_no_room(patch: Patch) -> None:
    def establish(do: Any, self: DeploymentRules, now: float) -> Any:
        if isinstance(self.under_way, PlanInHand):
            self.under_way = replace(self.under_way, beside=True)
        return do(self, now)

    rules = DeploymentRules.TABLE
    original = DeploymentRules.establish
    patch.setattr(
        DeploymentRules, "TABLE",
        tuple((lambda self, now: establish(original, self, now)) if one is original else one for one in rules),
    )  # fmt: skip


def switches_before_it_stands(patch: Patch) -> None:
    rule = DeploymentRules.establish

    def establish(self: DeploymentRules, now: float) -> Any:
        done = rule(self, now)
        if done is not None and isinstance(self.under_way, Establishing):
            done = [*done, *self.switch(self.under_way, now)]
        return done

    patch.setattr(DeploymentRules, "TABLE", tuple(establish if one is rule else one for one in DeploymentRules.TABLE))


def releases_before_it_is_switched_to(patch: Patch) -> None:
    wrapped(patch, DeploymentRules, "switch", lambda do, self, work, now: [*do(self, work, now), *self.release()])


def uses_an_epoch_twice(patch: Patch) -> None:
    rule = DeploymentRules.renew_links

    def renew(self: DeploymentRules, now: float) -> Any:
        before = self.epoch
        done = rule(self, now)
        if done is not None:
            self.epoch = before
            self.under_way = replace(self.under_way, epoch=before)  # type: ignore[arg-type]
            done = [on.Renew(before)]
        return done

    patch.setattr(DeploymentRules, "TABLE", tuple(renew if one is rule else one for one in DeploymentRules.TABLE))


def abandons_what_it_runs_on(patch: Patch) -> None:
    def switch(do: Any, self: DeploymentRules, work: Any, now: float) -> Any:
        done = do(self, work, now)
        self.under_way = work if isinstance(work, Establishing) else self.under_way
        return done

    wrapped(patch, DeploymentRules, "switch", switch)


def waits_for_nobody(patch: Patch) -> None:
    patch.setattr(situation, "GO_ON_S", 0.0)


def moves_away_at_once(patch: Patch) -> None:
    patch.setattr(HouseholdDevices, "given_up", lambda self, devices, now: self.of(devices, "silent", "gone"))


def moves_as_often_as_it_likes(patch: Patch) -> None:
    patch.setattr(Comparisons, "moved", lambda self, now: None)


def counts_moves_for_a_minute(patch: Patch) -> None:
    patch.setattr(pacing, "MOVES_S", 60.0)


def takes_half_for_a_majority(patch: Patch) -> None:
    patch.setattr(FollowedDeployment, "_majority", lambda self, count: 2 * count >= len(self.plan.devices))


def takes_a_refusal_for_a_vote(patch: Patch) -> None:
    wrapped(patch, FollowedDeployment, "counted", lambda do, self, came: do(self, replace(came, granted=True)))


def waits_for_no_coordinator(patch: Patch) -> None:
    patch.setattr(followed_deployment, "SILENT_S", 0.0)
    patch.setattr(followed_deployment, "GONE_S", 0.0)


def does_not_ask_whether_it_can_serve(patch: Patch) -> None:
    wrapped(patch, FollowedDeployment, "sought", lambda do, self, feasible, *more: do(self, True, *more))


def stands_though_its_coordinator_is_back(patch: Patch) -> None:
    def present(do: Any, self: Succession, device: str, presence: Any, now: float) -> Any:
        before = {one: (known.lost_at, known.due) for one, known in self._followed.items()}
        done = do(self, device, presence, now)
        for one, (lost_at, due) in before.items() if presence == "online" else ():
            self._followed[one].lost_at, self._followed[one].due = lost_at, due
        return done

    wrapped(patch, Succession, "_present", present)


def goes_on_with_the_same_epochs(patch: Patch) -> None:
    patch.setattr(followed_deployment, "EPOCHS_OF_TERM", 0)


def goes_one_epoch_further(patch: Patch) -> None:
    patch.setattr(followed_deployment, "EPOCHS_OF_TERM", 1)


def gives_way_to_nobody(patch: Patch) -> None:
    patch.setattr(OwnDeployments, "met", lambda self, own, other: [])


def gives_way_both_ways(patch: Patch) -> None:
    patch.setattr(own_deployments, "_chooses", lambda own, other: True)


def gives_way_to_what_a_lost_device_told(patch: Patch) -> None:
    def look_around(do: Any, self: Succession, own: Any) -> Any:
        self._outdated.clear()
        return do(self, own)

    wrapped(patch, Succession, "_look_around", look_around)


def obeys_whom_it_voted_for_in_vain(patch: Patch) -> None:
    patch.setattr(FollowedDeployment, "vote_ended", lambda self, now: False)


MISTAKES: list[tuple[str, Callable[[Patch], None], Callable[[int], None]]] = [
    ("1", replays_one_layer_too_few, anything),
    ("1", replays_one_token_too_few, anything),
    ("1", carries_a_wrong_state, anything),
    ("1", keeps_the_state_of_the_last_sequence, anything),
    ("2", obeys_every_coordinator, anything),
    ("2", lets_anybody_release, anything),
    ("3", computes_frames_of_any_epoch, anything),
    ("3", takes_tokens_of_any_position, anything),
    ("3", takes_late_answers_for_new_ones, anything),
    ("4", gives_up_though_it_has_served, anything),
    ("4", never_tries_again, anything),
    ("4", forgets_broken_links, anything),
    ("4", forgets_lost_engines, anything),
    ("4", does_not_serve_on, anything),
    ("4", keeps_a_plan_whose_device_is_gone, anything),
    ("6", tries_at_once_again, refusals),
    ("6", retries_without_a_wait, refusals),
    ("8", promises_what_it_has_not, scarce_memory),
    ("8", counts_too_little, scarce_memory),
    ("8", makes_no_room, anything),
    ("epochs", switches_before_it_stands, anything),
    ("epochs", releases_before_it_is_switched_to, anything),
    ("epochs", uses_an_epoch_twice, anything),
    ("epochs", abandons_what_it_runs_on, anything),
    ("pause", waits_for_nobody, short_silences),
    ("pause", moves_away_at_once, short_silences),
    ("noise", moves_as_often_as_it_likes, noise),
    ("noise", counts_moves_for_a_minute, noise),
    ("votes", takes_half_for_a_majority, losses),
    ("votes", takes_a_refusal_for_a_vote, losses),
    ("patience", waits_for_no_coordinator, losses),
    ("patience", does_not_ask_whether_it_can_serve, losses),
    ("patience", stands_though_its_coordinator_is_back, losses),
    ("terms", goes_on_with_the_same_epochs, losses),
    ("terms", goes_one_epoch_further, losses),
    ("one left", gives_way_to_nobody, losses),
    ("one left", gives_way_both_ways, losses),
    ("one left", gives_way_to_what_a_lost_device_told, losses),
    ("one left", obeys_whom_it_voted_for_in_vain, losses),
]


RARE = {
    forgets_broken_links, forgets_lost_engines, tries_at_once_again, counts_too_little, goes_one_epoch_further,
    gives_way_to_what_a_lost_device_told, obeys_whom_it_voted_for_in_vain,
}  # caught late, so slowly  # fmt: skip


@pytest.mark.parametrize(
    ("mistake", "history"),
    [
        pytest.param(mistake, history, id=f"{kind}-{mistake.__name__}", marks=[pytest.mark.slow] * (mistake in RARE))
        for kind, mistake, history in MISTAKES
    ],
)
def test_a_planted_mistake_is_caught(
    mistake: Callable[[Patch], None], history: Callable[[int], None], monkeypatch: Patch
) -> None:
    def histories() -> None:
        for seed in range(MOST_HISTORIES):
            history(seed)

    mistake(monkeypatch)
    with pytest.raises(AssertionError):
        histories()


def test_each_invariant_has_two_mistakes() -> None:
    assert min(Counter(kind for kind, _, _ in MISTAKES).values()) >= 2


@pytest.mark.parametrize("history", [short_silences, noise, refusals, scarce_memory, losses])
def test_nothing_is_caught_without_a_mistake(history: Callable[[int], None]) -> None:
    for seed in range(500 if FULL else 8):
        history(seed)
