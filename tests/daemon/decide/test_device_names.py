"""Which device a person means."""

from __future__ import annotations

import pytest

from peerllm.daemon.decide.device_names import device_called
from peerllm.errors import BadInputError, NotFoundError

ME, DESK, BED, TWIN = "a" * 64, "b" * 64, "c0" + "c" * 62, "c1" + "d" * 62
NAMES = {DESK: {"desk", "old desk"}, BED: {"phone"}, TWIN: {"phone", "twin"}}


@pytest.mark.parametrize(
    ("text", "device"),
    [("desk", DESK), ("old desk", DESK), ("twin", TWIN), (BED, BED), ("c0cccccc", BED), ("c1dddddd", TWIN)],
)
def test_a_device_is_found_by_name_by_id_and_by_the_start_of_its_id(text: str, device: str) -> None:
    assert device_called(text, NAMES, ME, "mine") == device


@pytest.mark.parametrize("text", ["nobody", "", "bbbbbbb", "e" * 8])
def test_what_names_no_device_and_too_short_an_id_are_refused(text: str) -> None:
    with pytest.raises(NotFoundError, match="belongs to this household"):
        device_called(text, NAMES, ME, "mine")


@pytest.mark.parametrize("text", ["mine", ME, "aaaaaaaa"])
def test_this_device_itself_leaves_by_another_command(text: str) -> None:
    with pytest.raises(BadInputError, match="peerllm leave"):
        device_called(text, NAMES, ME, "mine")


def test_a_name_of_several_devices_is_refused_and_one_that_is_another_s_too_means_that_one() -> None:
    with pytest.raises(BadInputError, match="2 devices are called 'phone'"):
        device_called("phone", NAMES, ME, "mine")
    assert device_called("desk", NAMES, ME, "desk") == DESK
