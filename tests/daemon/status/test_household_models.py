"""Which models a device lists that others are the source of."""

from __future__ import annotations

from dataclasses import replace

import pytest

from peerllm.codec import decode, encode
from peerllm.daemon.control_messages import Control, DeploymentView, DeviceView, DiskModel
from peerllm.daemon.status.household_models import AWAITED_S, MAX_ON_DISK, HouseholdModels, startable_models
from peerllm.errors import LinkError
from peerllm.types import Stage

A, B, C = "a" * 64, "b" * 64, "c" * 64


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def view(deployment: str, state: str = "serving", epoch: int = 1) -> DeploymentView:
    return DeploymentView(deployment, "/models/m", state, epoch, A, (), (), name="m", created=7, context=64)  # type: ignore[arg-type]


def test_what_a_model_can_do_is_listed_wherever_it_runs_or_lies() -> None:
    models, can = HouseholdModels(Clock()), ("tools", "thinking")
    models.hear([A], {A: [replace(view("1"), abilities=can)]})
    (other,) = models.others(lambda device: "laptop")
    (idle,) = startable_models([], [(B, [DiskModel("m", "m", 1, 1, abilities=can)])])
    assert other.abilities == idle.abilities == can


def listed(models: HouseholdModels) -> list[tuple[str, str, str]]:
    return [(one.deployment, one.state, one.source) for one in models.others(lambda device: f"device-{device[0]}")]


def test_what_devices_here_say_is_listed_as_they_say_it() -> None:
    models = HouseholdModels(Clock())
    models.hear([A, B], {A: [view("1"), view("2", "loading")]})
    assert listed(models) == [("1", "serving", A), ("2", "loading", A)]
    models.hear([A, B], {A: [view("2")]})
    assert listed(models) == [("2", "serving", A)], "one that was stopped is forgotten at once"


def test_a_model_whose_source_is_away_is_waited_for_a_while() -> None:
    clock = Clock()
    models = HouseholdModels(clock)
    models.hear([A, B], {A: [view("1")]})
    clock.now = 5.0
    models.hear([A, B], {})
    assert listed(models) == [("1", "waiting", "")]
    (one,) = models.others(lambda device: "laptop")
    assert one.reason == "laptop, where it was started, is not here"
    clock.now = AWAITED_S
    assert listed(models)
    clock.now = AWAITED_S + 0.1
    assert not listed(models)


def test_its_successor_takes_its_place_and_keeps_it() -> None:
    models = HouseholdModels(Clock())
    models.hear([A, B], {A: [view("1")]})
    assert listed(models) == [("1", "serving", A)]
    models.hear([A, B], {A: [view("1")], B: [view("1", epoch=3)]})
    assert listed(models) == [("1", "serving", A)], "A is heard: nobody follows it"
    models.hear([A, B], {A: [view("1")], B: [view("1", "loading", epoch=3)]}, silent=[A])
    assert listed(models) == [("1", "loading", B)]
    models.hear([A, B], {A: [view("1", epoch=9)], B: [view("1", epoch=3)]})
    assert listed(models) == [("1", "serving", B)], "until it gives way"
    models.hear([A, B], {A: [view("1", epoch=9)], B: []})
    assert listed(models) == [("1", "serving", A)]


def test_who_had_no_part_in_the_plan_cannot_claim_to_follow() -> None:
    models = HouseholdModels(Clock())
    planned = replace(view("1"), stages=(Stage(A, 0, 1), Stage(B, 2, 3)))
    models.hear([A, B, C], {A: [planned]})
    assert listed(models) == [("1", "serving", A)]
    models.hear([A, B, C], {A: [planned], C: [view("1", epoch=99)]}, silent=[A])
    assert listed(models) == [("1", "serving", A)]
    models.hear([A, B, C], {A: [planned], C: [view("1", epoch=99)], B: [view("1", epoch=2)]}, silent=[A])
    assert listed(models) == [("1", "serving", B)]


def test_a_device_that_was_removed_is_forgotten() -> None:
    models = HouseholdModels(Clock())
    models.hear([A, B], {A: [view("1")]})
    models.hear([B], {})
    assert not listed(models)


@pytest.mark.parametrize(("told", "lie"), [
    ('"made":7', '"made":253402300800'), ('"made":7', '"made":-1'), ('"nbytes":5', '"nbytes":18446744073709551615'),
    ('"created":8', '"created":18446744073709551615'), ('"expires":0', '"expires":253402300800'),
    ('"idle_since":0', '"idle_since":-1'), ('"context":64', '"context":18446744073709551615'),
    ('"parameters":0', '"parameters":18446744073709551615'), ('"missing_bytes":0', '"missing_bytes":-1'),
    ('"stage_memory_bytes":[9]', '"stage_memory_bytes":[18446744073709551615]'),
    ('"name":"disk"', f'"name":"{"x" * 4097}"'), ('"model":"/disk"', f'"model":"/{"x" * 4096}"'),
    ('"name":"m"', f'"name":"{"x" * 4097}"'),
])  # fmt: skip
def test_numbers_that_no_list_could_tell_are_refused(told: str, lie: str) -> None:
    """One device that says such a thing would leave all others without their lists of models."""
    deployment = replace(view("1"), created=8, stages=(Stage(A, 0, 1),), stage_memory_bytes=(9,))
    message = DeviceView(1, 2, "running", (deployment,), on_disk=(DiskModel("disk", "/disk", 5, 7),))
    data = encode(message, Control).decode()
    assert data.count(told) == 1 and decode(data, Control) == message
    with pytest.raises(LinkError, match="malformed message: a number is not from 0 to"):
        decode(data.replace(told, lie), Control)


def test_one_device_lists_so_many() -> None:
    many = (DiskModel(f"m{number}", f"/m{number}", 1, 1) for number in range(MAX_ON_DISK + 9))
    found = startable_models([], [(A, many), (B, [DiskModel("mine", "mine", 1, 1)])])
    assert len(found) == MAX_ON_DISK + 1 and found[-1].name == "mine"
