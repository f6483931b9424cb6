"""Deployments over a household in memory: planned, refused, raced for, broken, brought back."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import replace

import pytest

from peerllm.daemon.control_messages import Activate, Pace
from peerllm.daemon.decide.deployment_life import deployment_decider
from peerllm.daemon.deployment.loading import coordinator_grace
from peerllm.daemon.facade import GenerateRequest, RunOptions
from peerllm.daemon.status.status import deployment_entry
from peerllm.engine.messages import LoadStage, Submit, TimeLayers, Tokens
from peerllm.errors import BadInputError, EngineError, InfeasibleError, NotFoundError, PeerLLMError, RefusedError
from peerllm.planner.cost.layer_costs import layer_ms
from peerllm.planner.scenario.scenario_parser import parse
from peerllm.planner.strategies.strategy_plan import plan
from peerllm.types import Sampling, Stage
from tests.daemon.house import BLOCK, inspected, quiet, view

PACING = {"RETRY_S": 5.0}


async def test_a_model_for_three_is_served_by_three(houses):
    house = houses([3, 3, 3], big=8)
    told = []
    await house["a"].coordinator.run(RunOptions("big"), told.append)
    seen = view(house["a"])
    assert seen.state == "serving" and seen.progress == 1.0 and seen.epoch == 1
    assert {stage.device[0] for stage in seen.stages} == set("abc")
    assert seen.stages[0].first_layer == 0 and seen.stages[-1].last_layer == 9
    assert sum(seen.stage_memory_bytes) >= 8 * BLOCK
    assert told[-1].state == "serving" and {line.state for line in told} == {"planning", "loading", "serving"}
    assert any(line.devices == {"device-a": 1.0, "device-b": 1.0, "device-c": 1.0} for line in told)
    assert all(d.engine.held for d in house.devices.values())


async def test_stages_are_connected_from_the_last_to_the_first(houses):
    house = houses([3, 3, 3], big=8)
    a, ask, order = house["a"], house["a"].ask, []

    async def asking(device, question, timeout_s):
        if isinstance(question, Activate):
            order.append(device)
        return await ask(device, question, timeout_s)

    a.ask = asking
    await a.coordinator.run(RunOptions("big"), quiet)
    first = dict.fromkeys(stage.device for stage in view(a).stages)  # a device may hold several
    assert order == list(first)[::-1], "who is dialled is ready"


async def test_one_device_is_enough_when_it_is(houses):
    house = houses([9, 9], small=4)
    await house["a"].coordinator.run(RunOptions("small"), quiet)
    assert [type(m) for m in house["b"].engine.seen] == [TimeLayers] and len(view(house["a"]).stages) == 1


async def test_what_is_missing_is_said_and_nothing_stays(houses):
    house = houses([3, 3], huge=20)
    reason = r"huge needs 20\.\d MB .* the household lends 6\.20 MB: 13\.\d MB are missing"
    with pytest.raises(InfeasibleError, match=reason):
        await house["a"].coordinator.run(RunOptions("huge"), quiet)
    assert house.empty() and not house["a"].coordinator.views()


async def test_nothing_is_downloaded_without_a_plan(houses):
    house = houses([3, 3], huge=20, small=2)
    house.to_download = {"huge": 1_000_000, "small": 2_000_000}
    with pytest.raises(InfeasibleError, match="missing"):
        await house["a"].coordinator.run(RunOptions("huge"), quiet)
    assert (await house["a"].coordinator.figures.preview(RunOptions("small"), quiet))["scenario"]
    assert not house.downloads
    await house["a"].coordinator.run(RunOptions("small"), quiet)
    assert house.downloads == ["small"]


async def test_a_download_is_shown_as_it_goes_and_planned_for_anew(houses):
    house = houses([3, 3, 3], big=8)
    house.to_download = {"big": 2_500_000_000}
    house.download_gate.clear()
    told = []
    running = asyncio.ensure_future(house["a"].coordinator.run(RunOptions("big"), told.append))
    await house.until(lambda: house.downloads)
    seen = view(house["a"])
    assert (seen.state, seen.progress, seen.context) == ("planning", 0.4, 0)
    assert seen.message == told[-1].message == "downloading big, 2.50 GB: 40%"
    assert told[-1].devices == {"device-a": 0.4}
    assert house["a"].coordinator.served()[0].model_dir is None, "its files are not there yet"
    house.part("c", "gone")
    house.download_gate.set()
    await asyncio.wait({running}, timeout=0.1)
    assert not running.done(), "the plan was kept though a device of it had left"
    await house.come_back("c")
    await asyncio.wait_for(running, 10)
    seen = view(house["a"])
    assert (seen.state, seen.progress, seen.message, seen.context, seen.slots) == ("serving", 1.0, "", 64, 4)
    entry = deployment_entry(seen, str)
    assert (entry["context"], entry["slots"], entry["message"]) == (64, 4, "")
    (served,) = house["a"].coordinator.served()
    assert str(served.model_dir) == "/models/big"


async def test_a_device_that_is_about_to_arrive_is_waited_for(houses, monkeypatch):
    house = houses([3, 3, 3], big=8)
    house.part("c", "gone")
    running = asyncio.ensure_future(house["a"].coordinator.run(RunOptions("big"), quiet))
    await asyncio.wait({running}, timeout=0.2)
    assert not running.done()
    await house.come_back("c")
    await asyncio.wait_for(running, 10)
    await house["a"].coordinator.stop("big")
    monkeypatch.setattr(deployment_decider, "GATHER_S", 0.05)
    house.part("c", "gone")
    with pytest.raises(InfeasibleError, match=r"missing.*away: device-c"):
        await house["a"].coordinator.run(RunOptions("big"), quiet)


async def test_asking_again_is_fine_with_other_options_it_is_refused(houses):
    house = houses([9], small=4)
    run = house["a"].coordinator.run
    await asyncio.gather(run(RunOptions("small"), quiet), run(RunOptions("small"), quiet))
    await run(RunOptions("small"), quiet)
    assert view(house["a"]).epoch == 1
    with pytest.raises(BadInputError, match="peerllm stop small"):
        await run(RunOptions("small", context=32), quiet)
    with pytest.raises(BadInputError, match="peerllm stop small"):
        await run(RunOptions("small", schedule="sequential"), quiet)


async def test_context_gives_way_before_slots_and_both_before_giving_up(houses):
    house = houses([5], small=4)
    house.models["small"] = inspected("small", 4, max_context=4096)
    room = house["a"].lent
    await house["a"].coordinator.run(RunOptions("small"), quiet)
    (served,) = house["a"].coordinator.served()
    assert 512 <= served.context <= 2048
    await house["a"].coordinator.stop("small")
    assert house.empty() and room == house["a"].ledger.free_bytes
    with pytest.raises(BadInputError, match=r"1\.\.4096"):
        await house["a"].coordinator.run(RunOptions("small", context=5000), quiet)


async def test_a_device_that_refuses_is_planned_around(houses):
    """Its view said that memory is free; meanwhile it is not."""
    house = houses([3, 9, 9], big=8)
    a = house["a"]
    honest = a.candidates
    a.candidates = lambda: {d: replace(c, free_bytes=c.hello.lent_bytes) for d, c in honest().items()}
    house["b"].ledger.reserve(module_reserve(8 * BLOCK), "z" * 64, 0)
    house["b"].ledger.commit("e" * 32, 1, "z" * 64, 0)
    await a.coordinator.run(RunOptions("big"), quiet)
    used = {stage.device[0]: stage for stage in view(a).stages}
    assert "c" in used
    assert view(a).epoch >= 2
    house["b"].ledger.release("e" * 32, 1, "z" * 64)


def module_reserve(nbytes):
    from peerllm.daemon.control_messages import Reserve

    return Reserve("e" * 32, 1, nbytes, 60)


@pytest.mark.parametrize("seed", range(6))
async def test_two_deployments_at_once_never_lend_the_same_memory_twice(houses, seed):
    """The house checks at every call; here: both run, or the loser says what is missing."""
    blocks = 8 if seed % 2 else 4
    house = houses([3, 3, 3] if seed % 2 else [5, 5, 5], first=blocks, second=blocks)
    starts = [("a", "first"), ("b", "second")] if seed < 4 else [("c", "first"), ("a", "second")]
    results = await asyncio.gather(
        *(house[letter].coordinator.run(RunOptions(model), quiet) for letter, model in starts), return_exceptions=True
    )
    failures = [result for result in results if isinstance(result, BaseException)]
    if blocks == 4:
        assert not failures
    else:
        (failure,) = failures
        assert isinstance(failure, PeerLLMError)
        assert "promised to other models" in str(failure) and "missing" in str(failure)
    serving = [v for d in house.devices.values() for v in d.coordinator.views() if v.state == "serving"]
    assert len(serving) == 2 - len(failures)


async def test_a_device_that_vanishes_is_planned_around_and_the_answer_goes_on(houses):
    house = houses([3, 6, 6], big=8)
    a = house["a"]
    await a.coordinator.run(RunOptions("big"), quiet)
    other = next(stage.device[0] for stage in view(a).stages if stage.device != a.me)
    stream = a.coordinator.generate(GenerateRequest(view(a).deployment, (1, 2), 5, Sampling()))
    answer = asyncio.ensure_future(anext(stream))
    await house.until(lambda: a.told)
    a.coordinator.tokens(Tokens(view(a).deployment, a.told[0].sequence, 0, (3,)))
    assert (await answer).ids == (3,)
    await house.vanish(other)
    answer = asyncio.ensure_future(anext(stream))
    await house.until(lambda: view(a).state == "serving")
    assert view(a).epoch > 1 and other not in {stage.device[0] for stage in view(a).stages}
    assert a.switched == [1, view(a).epoch] and len(a.told) == 1, "the engine has the sequence and takes it along"
    a.coordinator.tokens(Tokens(view(a).deployment, a.told[0].sequence, 0, (3,)))  # told again: nothing new
    a.coordinator.tokens(Tokens(view(a).deployment, a.told[0].sequence, 1, (4,), "length"))
    assert (await answer).ids == (4,)


async def test_without_enough_memory_it_waits_and_says_so_until_a_device_returns(houses):
    house = houses([3, 3, 3], big=8)
    a = house["a"]
    await a.coordinator.run(RunOptions("big"), quiet)
    await house.vanish("b")
    await house.until(lambda: view(a).state == "waiting" and "missing" in view(a).reason)
    loaded = a.engine.loaded[:], house["c"].engine.loaded[:]
    assert all(loaded), "what they have stays loaded"
    await house.come_back("b")
    await house.until(lambda: view(a).state == "serving")
    assert loaded == (a.engine.loaded, house["c"].engine.loaded), "nothing is loaded twice"


async def test_a_vanishing_device_while_loading_does_not_hang_the_run(houses):
    house = houses([3, 6, 6], big=8)
    a = house["a"]
    for letter in "bc":
        house[letter].engine.gate.clear()
    running = asyncio.ensure_future(a.coordinator.run(RunOptions("big"), quiet))
    loading = [asyncio.ensure_future(house[letter].engine.loading.wait()) for letter in "bc"]
    await asyncio.wait(loading, return_when=asyncio.FIRST_COMPLETED, timeout=10)
    slow = "b" if house["b"].engine.loading.is_set() else "c"
    house["c" if slow == "b" else "b"].engine.gate.set()
    for task in loading:
        task.cancel()
    await house.vanish(slow)
    await asyncio.wait_for(running, 10)
    assert slow not in {stage.device[0] for stage in view(a).stages}


async def test_a_coordinator_that_vanishes_leaves_nothing_behind_after_the_grace(houses, monkeypatch):
    house = houses([3, 3, 3], big=8)
    await house["a"].coordinator.run(RunOptions("big"), quiet)
    assert house["b"].engine.stages and house["c"].engine.stages
    monkeypatch.setattr(coordinator_grace, "GRACE_S", 0.05)
    await house.vanish("a")
    assert house["b"].engine.stages and house["c"].engine.stages, "a short absence costs nothing"
    await house.until(lambda: not any(house[one].engine.stages or house[one].ledger.promised_bytes for one in "bc"))
    assert not house["b"].store.used


async def test_a_crashed_engine_is_trouble_and_is_planned_again(houses):
    house = houses([3, 3, 3], big=8)
    a, b = house["a"], house["b"]
    await a.coordinator.run(RunOptions("big"), quiet)
    b.engine.clear()
    b.worker.engine_lost("the engine ran out of memory")
    await house.until(lambda: view(a).epoch > 1 and view(a).state == "serving")
    assert b.engine.stages


async def test_a_failed_load_gives_its_reason_and_releases_all(houses):
    house = houses([3, 3, 3], big=8)
    house["b"].engine.fail = EngineError("tensor x is damaged")
    with pytest.raises(EngineError, match="device-b: tensor x is damaged"):
        await house["a"].coordinator.run(RunOptions("big"), quiet)
    assert house.empty() and not house["a"].coordinator.views()


async def test_a_device_that_refuses_to_load_is_asked_again_with_nothing_left_behind(houses):
    house = houses([3, 3, 3], big=8)
    house["b"].engine.fail = RefusedError("the disk lacks 3 GB")
    with pytest.raises(RefusedError, match="device-b: the disk lacks 3 GB"):
        await house["a"].coordinator.run(RunOptions("big"), quiet)
    assert house.empty() and not house["a"].coordinator.views()


async def test_stop_ends_a_load_midway(houses):
    house = houses([3, 3, 3], big=8)
    house["b"].engine.gate.clear()
    running = asyncio.ensure_future(house["a"].coordinator.run(RunOptions("big"), quiet))
    await asyncio.wait_for(house["b"].engine.loading.wait(), 10)
    await house["a"].coordinator.stop("big")
    with pytest.raises(PeerLLMError, match="was stopped"):
        await running
    assert house.empty()
    with pytest.raises(NotFoundError, match="does not run"):
        await house["a"].coordinator.stop("big")


async def test_who_started_it_is_said_to_who_stops_it_elsewhere(houses):
    house = houses([9, 9], small=4)
    await house["a"].coordinator.run(RunOptions("small"), quiet)
    with pytest.raises(BadInputError, match="started on device-a"):
        await house["b"].coordinator.stop("small")


async def test_what_served_is_brought_back_after_a_restart(houses):
    house = houses([3, 3, 3], big=8)
    await house["a"].coordinator.run(RunOptions("big", slots=2, schedule="bubble"), quiet)
    before = view(house["a"])
    await house["a"].coordinator.close()
    again = house["a"].restarted()
    house.part("c", "gone")
    await again.start()
    await house.until(lambda: again.views() and again.views()[0].state == "waiting")
    await house.come_back("c")
    await house.until(lambda: again.views()[0].state == "serving")
    assert [model.name for model in again.served()] == ["big"]
    assert (again.views()[0].deployment, again.views()[0].epoch > before.epoch) == (before.deployment, True)
    assert deployment_entry(again.views()[0], str)["schedule"] == "bubble"
    assert all({spec.schedule for spec in d.engine.seen if isinstance(spec, LoadStage)} == {"bubble"}
               for d in house.devices.values())  # fmt: skip
    await again.stop("big")
    forgotten = house["a"].restarted()
    await forgotten.start()
    assert not forgotten.views()


async def test_an_unknown_model_is_told_and_forgotten(houses):
    house = houses([9], small=4)
    with pytest.raises(NotFoundError):
        await house["a"].coordinator.run(RunOptions("nothing"), quiet)
    assert not house["a"].coordinator.views()
    with pytest.raises(NotFoundError):
        house["a"].coordinator.generate(GenerateRequest("0" * 32, (1,), 1, Sampling()))


async def test_submits_reach_the_engine_only_while_serving(houses):
    house = houses([9], small=4)
    a = house["a"]
    await a.coordinator.run(RunOptions("small"), quiet)
    stream = a.coordinator.generate(GenerateRequest(view(a).deployment, (1,), 1, Sampling()))
    task = asyncio.ensure_future(anext(stream))
    await house.until(lambda: a.told)
    assert isinstance(a.told[0], Submit)
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


async def test_a_preview_reserves_nothing_and_counts_what_the_model_holds_already(houses):
    house = houses([3, 3, 3], big=8)
    a = house["a"]
    before = await a.coordinator.figures.preview(RunOptions("big"), quiet)
    assert not any(device.ledger.promised_bytes for device in house.devices.values())
    await a.coordinator.run(RunOptions("big"), quiet)
    after = await a.coordinator.figures.preview(RunOptions("big"), quiet)
    lent = [[one["memory_bytes"] for one in found["scenario"]["devices"]] for found in (before, after)]
    assert lent[0] == lent[1]
    running = await a.coordinator.figures.scenario("big")
    assert running["scenario"] == before["scenario"] and running["cuts"][0][1] <= before["most_chunk"]
    planned = plan(parse(running["scenario"]), "edgeshard", "latency")
    assert [(stage.device, stage.first_layer, stage.last_layer) for stage in planned.stages] == [
        (one["device"], one["first_layer"], one["last_layer"]) for one in running["stages"]
    ]
    with pytest.raises(InfeasibleError, match="big"):
        await a.coordinator.figures.preview(RunOptions("big", slots=200), quiet)
    with pytest.raises(NotFoundError):
        await a.coordinator.figures.scenario("other")


async def test_what_runs_tells_how_its_stages_do_to_its_coordinator_alone(houses):
    house = houses([3, 3, 3], big=8)
    a, b = house["a"], house["b"]
    await a.coordinator.run(RunOptions("big"), quiet)
    quiet_one = await a.coordinator.figures.scenario("big")
    assert quiet_one["paces"] == {} and quiet_one["running"] == quiet_one["scenario"], "nothing was computed yet"
    for device in house.devices.values():
        device.engine.paces = ((1, 7.0, 0.5), (2, 9.0, 0.0))
    b.engine.paces = ((1, -1.0, 0.5),)
    running = await a.coordinator.figures.scenario("big")
    stages = [Stage(**stage) for stage in running["stages"]]
    told = [place for place, stage in enumerate(stages) if not stage.device.endswith("b")]
    assert len(told) < len(stages), "b is in it"
    assert running["paces"] == {str(place): {"1": 7.0, "2": 9.0} for place in told}, "what cannot be is dropped"
    assert running["spreads"] == {str(place): {"1": 0.5} for place in range(len(stages))}
    said = parse(running["running"])
    mine = [stage for stage in stages if stage.device == stages[0].device]
    layers = [layer for one in mine for layer in said.model.layers[one.first_layer : one.last_layer + 1]]
    total = sum(layer_ms(said.devices[stages[0].device], layer, 1) for layer in layers)
    assert total == pytest.approx(7.0 * len(mine))
    deployment = a.coordinator.views()[0].deployment
    answer = await a.worker.answer(b.me, Pace(deployment))
    assert answer.error == "RefusedError" and not answer.stage_ms


async def test_throughput_is_planned_with_micro_batches(houses):
    house = houses([9, 9, 9], big=8)
    a = house["a"]
    await a.coordinator.run(RunOptions("big", objective="throughput", slots=6), quiet)
    running = await a.coordinator.figures.scenario("big")
    planned = plan(parse(running["scenario"]), "edgeshard", "throughput")
    assert planned.optimal
    assert running["micro_batch"] == planned.predicted.micro_batch
    assert running["micro_batches"] == planned.predicted.micro_batches
    assert view(a).predicted["tokens_per_second"] == pytest.approx(planned.predicted.tokens_per_second)


async def test_bench_refuses_what_does_not_fit(houses):
    house = houses([9], big=8)
    coordinator = house["a"].coordinator
    await coordinator.run(RunOptions("big", slots=2, context=64), quiet)
    for asked in ((3, 8, 8), (1, 60, 8)):
        with pytest.raises(BadInputError, match="slots"):
            await coordinator.figures.bench("big", *asked)
    with pytest.raises(NotFoundError):
        await coordinator.figures.bench("other", 1, 8, 8)
