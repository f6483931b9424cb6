"""What is said where no plan fits: the bytes missing, the layer that fits nowhere, and whether that is proven."""

from __future__ import annotations

from peerllm.errors import InfeasibleError
from peerllm.planner.cost.infeasibility import explain_infeasible
from peerllm.types import DeviceProfile, Layer, ModelProfile, Workload

SPEED = {kind: ((1, 1.0),) for kind in ("embedding", "block", "head")}


def explained(sizes: tuple[int, ...], rooms: tuple[int, ...], proven: bool = True, **more: int) -> InfeasibleError:
    """Devices a, b, ... of these rooms; the last of the layers is the head."""
    kinds = ["embedding", *["block"] * (len(sizes) - 2), "head"]
    model = ModelProfile("m", tuple(Layer(f"l{i}", kinds[i], nbytes, 0, 8) for i, nbytes in enumerate(sizes)))
    devices = {name: DeviceProfile(name, name, room, SPEED) for name, room in zip("abcd", rooms, strict=False)}
    return explain_infeasible(model, devices, "a", Workload(1, 1, 1, 1), {}, proven=proven, **more)


def test_what_is_missing_is_said_only_where_something_is() -> None:
    short = explained((1, 1, 6, 1), (4, 4))
    assert "1 bytes are missing" in str(short) and short.missing_bytes == 1
    exact = explained((1, 1, 5, 1), (4, 4))
    assert "layer 2 (l2) of m does not fit on any device" in str(exact) and exact.missing_bytes == 0


def test_what_was_given_up_is_not_called_impossible() -> None:
    assert str(explained((1, 1, 3, 3, 1), (4, 5))).endswith("or no link leads there")
    assert str(explained((1, 1, 3, 3, 1), (4, 5), proven=False)).endswith("though one may exist")


def test_layers_0_and_1_need_room_on_the_source() -> None:
    assert "must lie on a, which lends 1 bytes too little" in str(explained((2, 2, 1, 1), (3, 9)))
    assert "must lie on a" not in str(explained((2, 1, 3, 3, 3), (3, 9)))


def test_the_layer_named_is_the_one_behind_the_last_that_was_placed() -> None:
    assert "layer 3 (l3)" in str(explained((1, 1, 3, 3, 3), (5, 2, 2, 2)))
    assert "layer 4 (l4)" in str(explained((1, 1, 3, 3, 3), (5, 2, 2, 2), reached=3))
    assert "layer 4 (l4)" in str(explained((1, 1, 3, 3, 3), (5, 2, 2, 2), reached=4)), "no layer follows the head"
