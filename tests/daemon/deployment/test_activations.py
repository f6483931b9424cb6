"""How hidden states travel: decided where it is planned, told to both ends of each link, shown to people."""

from __future__ import annotations

from dataclasses import replace

import pytest

from peerllm.cli.look import deployment_text
from peerllm.codec import decode, encode
from peerllm.daemon.control_messages import Ask, Control
from peerllm.daemon.decide.assignments import assignments, check, travelling
from peerllm.daemon.decide.demand import Blueprint, draw_up
from peerllm.daemon.decide.device_profiles import Candidate
from peerllm.daemon.facade import RunOptions
from peerllm.daemon.status.status import deployment_entry
from peerllm.engine.messages import LoadStage
from peerllm.errors import BadInputError, LinkError
from peerllm.planner.cost.working_space import working_bytes
from peerllm.planner.scenario.scenario_parser import parse
from peerllm.planner.strategies.strategy_plan import plan
from tests.daemon.house import BLOCK, House, hello, inspected, quiet

A, B, C = "a" * 64, "b" * 64, "c" * 64
HIDDEN = 4096


def model(dtype: str = "bfloat16", blocks: int = 8):
    """Of so many blocks of BLOCK bytes, with hidden states that take a while on a slow link."""
    toy = inspected("big", blocks)
    sent = HIDDEN * (4 if dtype == "float32" else 2)
    layers = (*(replace(one, output_bytes_per_token=sent) for one in toy.profile.layers[:-1]), toy.profile.layers[-1])
    return replace(toy, dtype=dtype, hidden_size=HIDDEN, profile=replace(toy.profile, layers=layers))


def room(blocks: int, dtype: str = "bfloat16") -> int:
    return blocks * BLOCK + 100_000 + working_bytes(model(dtype).working, 64, 4)


def candidates(mbps: float, dtype: str = "bfloat16", **slower: float) -> dict[str, Candidate]:
    """Three that hold three blocks each; `slower` by letter."""
    gbytes = {dtype: 10.0}
    return {
        letter * 64: Candidate(
            letter * 64,
            replace(hello(letter, room(3, dtype)), dtypes=(dtype,), gbytes_per_s=gbytes, gflops={dtype: 50.0}),
            room(3, dtype),
            1.0,
            slower.get(letter, mbps),
        )
        for letter in "abc"
    }


def drawn(mbps: float, activations: str = "auto", dtype: str = "bfloat16", **slower: float) -> Blueprint:
    options = RunOptions("big", activations=activations)  # type: ignore[arg-type]
    return draw_up(options, model(dtype), candidates(mbps, dtype, **slower), A)


def test_slow_links_are_rounded_fast_ones_and_float32_never_are():
    assert drawn(2.0).activations == ("int8", "int8")
    assert drawn(20_000.0).activations == ("exact", "exact")
    assert drawn(2.0, "exact").activations == ("exact", "exact")
    assert drawn(20_000.0, "int8").activations == ("int8", "int8")
    assert drawn(2.0, dtype="float32").activations == ("exact", "exact")
    assert drawn(2.0, dtype="float32") == drawn(2.0, "exact", dtype="float32")
    assert drawn(2.0, dtype="float16").activations == ("int8", "int8")
    mixed = replace(model(), mixed_rows=True)
    assert draw_up(RunOptions("big"), mixed, candidates(2.0), A).activations == ("exact", "exact")
    with pytest.raises(BadInputError, match="more than hidden states"):
        draw_up(RunOptions("big", activations="int8"), mixed, candidates(2.0), A)
    with pytest.raises(BadInputError, match="stays exact"):
        drawn(2.0, "int8", dtype="float32")
    with pytest.raises(BadInputError, match="--activations"):
        drawn(2.0, "int4")


def test_what_was_planned_for_says_what_hops_cost():
    short, exact = drawn(2.0), drawn(2.0, "exact")
    cuts = [stage.last_layer for stage in short.plan.stages[:-1]]
    assert short.rounded_layers == tuple(cuts) and exact.rounded_layers == ()
    layers = short.scenario.model.layers
    assert [layers[cut].output_bytes_per_token for cut in cuts] == [HIDDEN + 4] * 2
    assert sum(one.output_bytes_per_token == 2 * HIDDEN for one in layers) == len(layers) - 1 - 2
    assert short.plan.predicted.request_ms < 0.9 * exact.plan.predicted.request_ms
    assert plan(short.scenario, "edgeshard", "latency").stages == short.plan.stages


def assigned(blueprint: Blueprint):
    found = model()
    hashes = {tensor.name: "0" * 64 for tensor in travelling(blueprint, found, A)}
    return assignments("d" * 32, 1, blueprint, found, hashes=hashes, address=lambda _: (("127.0.0.1",), 7))


def test_both_ends_of_a_link_are_told_the_same():
    found = draw_up(RunOptions("big", activations="int8", private=True), model(), candidates(50.0), A)
    assert found.plan.stages[-1].device == A and len(found.plan.stages) == 4, "the head is back home"
    made = assigned(found)
    work = sorted((one for assign in made.values() for one in assign.work), key=lambda one: one.stage)
    assert [one.downstream_activations for one in work] == ["int8", "int8", "int8", "exact"]
    assert [one.upstream_activations for one in work] == ["exact", "int8", "int8", "int8"]
    for assign in made.values():
        check(assign, 10**12, own=True)
        with pytest.raises(BadInputError, match="float32"):
            check(replace(assign, dtype="float32"), 10**12, own=True)
    text = encode(Ask(1, made[B]), Control)
    assert decode(text, Control) == Ask(1, made[B])
    with pytest.raises(LinkError, match="malformed"):
        decode(text.replace(b'"int8"', b'"int4"', 1), Control)


@pytest.fixture
async def house(tmp_path):
    made = House(tmp_path, [room(3)] * 3, {"big": model(), "whole": model("float32")})
    for device in made.devices.values():
        device.candidates = lambda: {
            one: replace(candidates(2.0)[one], free_bytes=other.ledger.free_bytes)
            for one, other in made.devices.items()
        }
    yield made
    await made.close()


async def test_what_runs_is_what_was_decided_and_is_shown(house):
    coordinator = house["a"].coordinator
    preview = await coordinator.figures.preview(RunOptions("big"), quiet)
    await coordinator.run(RunOptions("big"), quiet)
    (view,) = coordinator.views()
    assert preview["rounded_layers"] == [stage.last_layer for stage in view.stages[:-1]]
    assert plan(parse(preview["scenario"]), "edgeshard", "latency").stages[-1].last_layer == 9
    specs = sorted(
        (one for device in house.devices.values() for one in device.engine.seen if isinstance(one, LoadStage)),
        key=lambda one: one.stage,
    )
    assert [one.downstream_activations for one in specs] == ["int8", "int8", "exact"]
    assert [one.upstream_activations for one in specs] == ["exact", "int8", "int8"]
    entry = deployment_entry(view, house["a"].name)
    assert entry["activations"] == "auto" and entry["plan"]["activations"] == ["int8", "int8"]
    b, c = (stage["device"] for stage in entry["plan"]["stages"][1:])
    assert deployment_text(entry).splitlines()[-1] == (
        f"activations travel as int8 to {b}, {c}: the links are the bottleneck"
    )
    running = await coordinator.figures.scenario("big")
    assert running["scenario"] == preview["scenario"], "`bench` predicts with what hops cost"


async def test_asking_again_need_not_name_it(house):
    run = house["a"].coordinator.run
    await run(RunOptions("big", activations="int8"), quiet)
    await run(RunOptions("big"), quiet)
    await run(RunOptions("big", activations="int8"), quiet)
    with pytest.raises(BadInputError, match="other options"):
        await run(RunOptions("big", activations="exact"), quiet)
    (view,) = house["a"].coordinator.views()
    assert view.epoch == 1
    text = deployment_text(deployment_entry(view, house["a"].name))
    assert text.endswith(": as asked for")
