"""A device's answers to coordinators, honest and otherwise: what is refused is refused before memory is taken."""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import replace

import pytest

from peerllm.codec import decode, encode
from peerllm.daemon.control_messages import Activate, Ask, Carry, Computing, Control, Release, Reserve, Trouble
from peerllm.daemon.decide.assignments import MAX_LINKS, assignments, check, travelling
from peerllm.daemon.decide.demand import draw_up
from peerllm.daemon.deployment.loading import coordinator_grace
from peerllm.daemon.facade import RunOptions
from peerllm.engine.messages import Connect, LinkLost, LoadStage, Unload
from peerllm.errors import BadInputError, EngineError, LinkError, ModelError, RefusedError
from peerllm.request_ids import CauseInLog
from peerllm.transport.links.data_plane import MAX_EXPECTED
from peerllm.transport.roster.roster import MAX_MEMBERS
from peerllm.types import MAX_CUTS, Stage
from tests.daemon.house import BLOCK, House, inspected

A, B, C = "a" * 64, "b" * 64, "c" * 64
D = "d" * 32
SPARE = 100_000


@pytest.fixture
def house(tmp_path):
    return House(tmp_path, [n * BLOCK + SPARE for n in (3, 3, 3)], {})


@pytest.fixture
def plan(house):
    """(blueprint, Assign for device B of a model that needs all three)."""
    model = inspected("big", 8)
    blueprint = draw_up(RunOptions("big"), model, house["a"].candidates(), A)
    hashes = {tensor.name: "0" * 64 for tensor in travelling(blueprint, model, A)}
    made = assignments(D, 1, blueprint, model, hashes=hashes, address=lambda _: (("127.0.0.1",), 7))
    return blueprint, made[B]


@pytest.fixture
def worker(house):
    return house["b"].worker


async def reserve(worker, nbytes, sender=A, epoch=1):
    return await worker.answer(sender, Reserve(D, epoch, nbytes, 10))


async def loaded(worker, plan, sender=A):
    blueprint, assign = plan
    assert not (await reserve(worker, blueprint.promises[B])).error
    assert not (await worker.answer(sender, assign)).error


def test_assignments_cover_the_model_and_close_the_ring(house, plan):
    blueprint, _ = plan
    model = inspected("big", 8)
    hashes = {tensor.name: "0" * 64 for tensor in travelling(blueprint, model, A)}
    made = assignments(D, 1, blueprint, model, hashes=hashes, address=lambda _: (("10.0.0.1",), 7))
    work = sorted((w for assign in made.values() for w in assign.work), key=lambda w: w.stage)
    assert [w.stage for w in work] == list(range(len(blueprint.plan.stages)))
    assert work[0].upstream is None and work[0].first_layer == 0 and work[-1].last_layer == 9
    devices = [stage.device for stage in blueprint.plan.stages]
    for w, device, after in zip(work, devices, [*devices[1:], devices[0]], strict=True):
        assert w.downstream == (after if after != device else None)
        assert w.downstream_stage == w.stage + 1
        assert bool(w.downstream_hosts) == (after not in (A, device))
    zoned = assignments(
        D, 1, blueprint, model, hashes=hashes, address=lambda _: (("fe80::1%eth0", "10.0.0.1", "fe80::2%3"), 7)
    )
    assert zoned == made, "an address on one of the source's own interfaces helps nobody else"
    before = [Stage(A, 0, 2), Stage(C, 3, 4), Stage(B, 5, 9)]
    moved = assignments(D, 1, blueprint, model, hashes=hashes, address=lambda _: ((), 7), before=before)
    for w in (w for assign in moved.values() for w in assign.work):
        held = {old.device for old in before if old.first_layer <= w.last_layer and w.first_layer <= old.last_layer}
        assert set(w.state_from) == held - {devices[w.stage]}
        assert not work[w.stage].state_from
    assert any(w.state_from for assign in moved.values() for w in assign.work)
    names = [t.name for w in work for t in w.tensors]
    assert sorted(names) == sorted(t.name for layer in model.tensors for t in layer)
    assert all(assign.head_device == devices[-1] for assign in made.values())


async def test_reserve_assign_activate_release(house, plan, worker):
    blueprint, assign = plan
    await loaded(worker, plan)
    specs = [m for m in house["b"].engine.seen if isinstance(m, LoadStage)]
    assert [(s.first_layer, s.last_layer) for s in specs] == [(w.first_layer, w.last_layer) for w in assign.work]
    assert {(s.chunk, s.cuts) for s in specs} == {(blueprint.chunk, blueprint.cuts)} and blueprint.cuts
    assert decode(encode(Ask(1, assign), Control), Control) == Ask(1, assign)
    assert specs[0].tensors[0].path.startswith("/kept/") and specs[0].tensors[0].offset == 0
    assert not (await worker.answer(A, Activate(D, 1))).error
    assert isinstance(house["b"].engine.seen[-1], Connect)
    answer = await worker.answer(A, Release(D, 1))
    assert not answer.error and answer.free_bytes == house["b"].lent
    assert any(isinstance(m, Unload) for m in house["b"].engine.seen) and house.empty()
    assert (await reserve(worker, 1)).error == "RefusedError"  # a late question does not revive it
    assert not (await reserve(worker, blueprint.promises[B], epoch=2)).error


async def test_without_a_reservation_nothing_is_loaded(house, plan, worker):
    answer = await worker.answer(A, plan[1])
    assert answer.error == "RefusedError" and "no reservation" in answer.reason
    assert not house["b"].engine.seen and not house["b"].store.used


async def test_more_weights_than_were_reserved_are_refused_before_any_is_fetched(house, plan, worker):
    await reserve(worker, BLOCK // 2)
    answer = await worker.answer(A, plan[1])
    assert answer.error == "RefusedError" and "were reserved" in answer.reason
    assert not house["b"].engine.seen and not house["b"].store.used


@pytest.mark.parametrize("question", [Activate(D, 1), Release(D, 1), "assign", Reserve(D, 2, 1, 10)])
async def test_a_deployment_obeys_one_coordinator(house, plan, worker, question):
    await loaded(worker, plan)
    answer = await worker.answer(C, replace(plan[1], epoch=2) if question == "assign" else question)
    assert answer.error == "RefusedError"
    assert house["b"].engine.stages and house["b"].ledger.promised_bytes


async def test_epochs_only_grow(house, plan, worker):
    blueprint, assign = plan
    await loaded(worker, plan)
    assert (await worker.answer(A, assign)).error == "RefusedError"
    assert (await worker.answer(A, Activate(D, 0))).error == "RefusedError"
    assert not (await worker.answer(A, Release(D, 0))).error  # over already: nothing happens
    assert house["b"].engine.stages
    await worker.answer(A, Release(D, 1))
    await reserve(worker, blueprint.promises[B], epoch=3)
    assert not (await worker.answer(A, replace(assign, epoch=3))).error
    assert (await worker.answer(A, replace(assign, epoch=2))).error == "RefusedError"


async def test_activate_before_everything_is_loaded_is_refused(house, plan, worker):
    blueprint, assign = plan
    await reserve(worker, blueprint.promises[B])
    house["b"].engine.gate.clear()
    loading = asyncio.ensure_future(worker.answer(A, assign))
    await asyncio.wait_for(house["b"].engine.loading.wait(), 5)
    assert (await worker.answer(A, Activate(D, 1))).error == "RefusedError"
    house["b"].engine.gate.set()
    assert not (await loading).error


@pytest.mark.parametrize("stuck", ["fetch", "load"])
async def test_release_ends_a_load_midway(house, plan, worker, stuck):
    blueprint, assign = plan
    await reserve(worker, blueprint.promises[B])
    (house["b"].store if stuck == "fetch" else house["b"].engine).gate.clear()
    loading = asyncio.ensure_future(worker.answer(A, assign))
    await asyncio.wait_for(house["b"].store.fetching.wait(), 5)
    if stuck == "load":
        await asyncio.wait_for(house["b"].engine.loading.wait(), 5)
    assert not (await worker.answer(A, Release(D, 1))).error
    answer = await asyncio.wait_for(loading, 5)
    assert answer.error == "UnavailableError" and "released" in answer.reason
    assert house.empty()


async def test_weights_that_changed_on_the_disk_are_fetched_and_loaded_again_before_they_serve(house, plan, worker):
    engine, store = house["b"].engine, house["b"].store
    store.damaged = [True, False]
    await reserve(worker, plan[0].promises[B])
    assert not (await worker.answer(A, plan[1])).error
    kinds = [type(message).__name__ for message in engine.seen if isinstance(message, LoadStage | Unload)]
    assert kinds == ["LoadStage", "Unload", "LoadStage"] and not store.damaged
    await worker.answer(A, Release(D, 1))
    store.damaged = [True, True]
    await reserve(worker, plan[0].promises[B], epoch=2)
    answer = await worker.answer(A, replace(plan[1], epoch=2))
    assert answer.error == "UnavailableError" and "its disk changes weights" in answer.reason
    assert house.empty()


@pytest.mark.parametrize("damaged", [True, False])
async def test_a_file_that_is_removed_as_changed_while_the_engine_reads_it_is_fetched_again(
    house, plan, worker, damaged
):
    engine, store = house["b"].engine, house["b"].store
    store.damaged = [damaged, False]
    engine.failures = [ModelError("a tensor's file cannot be read")]
    await reserve(worker, plan[0].promises[B])
    answer = await worker.answer(A, plan[1])
    assert answer.error == ("" if damaged else "ModelError")
    kinds = [type(message).__name__ for message in engine.seen if isinstance(message, LoadStage | Unload)]
    assert kinds == (["LoadStage", "Unload", "LoadStage"] if damaged else ["LoadStage", "Unload"])


async def test_an_engine_that_fails_gives_its_reason_and_the_memory_back(house, plan, worker):
    house["b"].engine.fail = EngineError("not enough address space")
    await reserve(worker, plan[0].promises[B])
    answer = await worker.answer(A, plan[1])
    assert (answer.error, answer.reason) == ("EngineError", "not enough address space")
    assert answer.free_bytes == house["b"].lent and house.empty()


async def test_lost_links_and_engines_are_told_to_the_coordinator(house, plan, worker):
    told = []
    worker._report = lambda device, message: told.append((device, message))
    await loaded(worker, plan)
    told.clear()
    worker.link_lost(LinkLost(D, C, "reset by peer", 1))
    worker.link_lost(LinkLost("e" * 32, C, "of another deployment"))
    assert told == [(A, Trouble(D, 1, "reset by peer", other=C))]
    house["b"].engine.clear()
    worker.engine_lost("the engine crashed")
    assert told[-1] == (A, Trouble(D, 1, "the engine crashed", engine_died=True))
    assert house.empty()


async def test_an_engine_that_dies_while_loading_is_the_reason(house, plan, worker):
    blueprint, assign = plan
    await reserve(worker, blueprint.promises[B])
    house["b"].engine.gate.clear()
    loading = asyncio.ensure_future(worker.answer(A, assign))
    await asyncio.wait_for(house["b"].engine.loading.wait(), 5)
    worker.engine_lost("the engine ran out of memory")
    answer = await asyncio.wait_for(loading, 5)
    assert (answer.error, answer.reason) == ("UnavailableError", "the engine ran out of memory")
    assert house.empty()


def test_questions_pass_the_wire_as_they_are(plan):
    for question in (plan[1], Activate(D, 1), Release(D, 1), Reserve(D, 1, 5, 0.5)):
        assert decode(encode(Ask(7, question), Control), Control) == Ask(7, question)


async def test_leases_lapse_by_themselves(house, worker):
    assert not (await worker.answer(A, Reserve(D, 1, 5, 0.02))).error
    assert not (await worker.answer(C, Reserve("e" * 32, 1, 7, 0.05))).error
    assert house["b"].ledger.promised_bytes == 12
    await house.until(lambda: not house["b"].ledger.promised_bytes)


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": "float8"},
        {"slots": 0},
        {"slots": 10**9},
        {"context": 1 << 30},
        {"chunk": 10**6},
        {"cuts": ((1, 10**6),)},
        {"cuts": ((1, 0),)},
        {"cuts": ((2, 1),)},
        {"cuts": ((1, 1), (1, 2))},
        {"cuts": tuple((least, 1) for least in range(1, MAX_CUTS + 2))},
        {"micro_batch": 99},
        {"micro_batches": 0},
        {"micro_batches": 99},
        {"schedule": "fast"},
        {"stages": 0},
        {"stages": 10**6},
        {"work": ()},
        {"deployment": "../" * 10 + "dd"},
        {"deployment": "D" * 32},
        {"epoch": -1},
        {"epoch": 1 << 32},
    ],
)
def test_nonsense_is_refused(plan, change):
    with pytest.raises(BadInputError):
        check(replace(plan[1], **change), 10**12, own=False)


def test_an_unknown_schedule_is_no_message(plan):
    text = encode(Ask(1, plan[1]), Control).replace(b'"no-bubble"', b'"fast"')
    with pytest.raises(LinkError, match="malformed"):
        decode(text, Control)


@pytest.mark.parametrize(
    "change",
    [
        {"nbytes": -4, "shape": (-1,)},
        {"nbytes": 10**15},
        {"shape": (10**6, 10**6)},
        {"sha256": "../../etc/passwd"},
        {"sha256": ""},
        {"sha256": "0" * 63 + "G"},
        {"dtype": "F8_E4M3", "shape": (1 << 20, 1 << 20), "nbytes": 1},
        {"dtype": "C64", "shape": (1,), "nbytes": 8},
    ],
)
def test_tensors_that_lie_about_themselves_are_refused(plan, change):
    assign = plan[1]
    work = assign.work[0]
    lie = replace(work, tensors=(replace(work.tensors[0], **change), *work.tensors[1:]))
    with pytest.raises((BadInputError, RefusedError)):
        check(replace(assign, work=(lie, *assign.work[1:])), 10**12, own=False)


def test_a_shape_without_end_costs_no_time(plan):
    assign = plan[1]
    work = assign.work[0]
    endless = replace(work.tensors[0], shape=(9,) * 300_000)  # its product would take minutes
    began = time.monotonic()
    with pytest.raises(BadInputError, match="dimensions"):
        check(replace(assign, work=(replace(work, tensors=(endless,)),)), 10**12, own=False)
    assert time.monotonic() - began < 1.0


def test_stages_must_rise_and_be_assigned_once(plan):
    assign = plan[1]
    work = assign.work[0]
    for wrong in ((work, work), (replace(work, first_layer=5, last_layer=4),), (replace(work, stage=99),)):
        with pytest.raises(BadInputError):
            check(replace(assign, work=wrong), 10**12, own=False)


# ---- epochs side by side, and coordinators that are away ----


async def side_by_side(house, worker, plan):
    """Epoch 2 gives b one layer more than epoch 1, which stands."""
    blueprint, assign = plan
    await loaded(worker, plan)
    (work,) = assign.work
    last = work.last_layer + 1
    model = inspected("big", 8)
    more = replace(
        work, last_layer=last, tensors=(*work.tensors, replace(work.tensors[-1], name=model.tensors[last][0].name))
    )
    nbytes, added = blueprint.promises[B] + BLOCK, BLOCK
    house["b"].ledger.lent_bytes = house["b"].lent = nbytes
    assert (await worker.answer(A, Reserve(D, 2, nbytes, 10))).error == "RefusedError", "there is no room for both"
    assert not (await worker.answer(A, Reserve(D, 2, nbytes, 10, added))).error
    assert not (await worker.answer(A, replace(assign, epoch=2, work=(more,)))).error
    return work, more


async def test_a_later_epoch_stands_beside_the_earlier_and_shares_its_shards(house, plan, worker):
    work, more = await side_by_side(house, worker, plan)
    engine, ledger = house["b"].engine, house["b"].ledger
    assert engine.loaded == [(work.first_layer, work.last_layer), (more.last_layer, more.last_layer)]
    assert ledger.promised_bytes == plan[0].promises[B] + BLOCK
    assert [(h.epoch, h.first_layer, h.last_layer) for h in worker.holdings()] == [
        (2, work.first_layer, work.last_layer), (2, more.last_layer, more.last_layer),
    ]  # fmt: skip
    for epoch in (1, 2):
        assert not (await worker.answer(A, Activate(D, epoch))).error
    answer = await worker.answer(A, Release(D, 1))
    assert not answer.error and ledger.promised_bytes == plan[0].promises[B] + BLOCK and len(engine.shards) == 2
    assert (await worker.answer(A, Activate(D, 1))).error == "RefusedError"
    await worker.answer(A, Release(D, 2))
    assert house.empty()


async def test_a_later_epoch_alone_is_given_up_and_the_earlier_keeps_its_own(house, plan, worker):
    work, _ = await side_by_side(house, worker, plan)
    assert not (await worker.answer(A, Release(D, 2, only=True))).error
    assert house["b"].ledger.promised_bytes == plan[0].promises[B]
    assert [(h.epoch, h.first_layer, h.last_layer) for h in worker.holdings()] == [
        (1, work.first_layer, work.last_layer)
    ]
    assert not (await worker.answer(A, Activate(D, 1))).error
    assert (await worker.answer(A, Reserve(D, 2, 1, 10))).error == "RefusedError", "an epoch that is over stays over"


async def test_state_is_copied_by_the_engine_to_where_this_device_or_the_coordinator_reaches_it(house, plan, worker):
    await loaded(worker, plan)
    carry = Carry(D, 1, 4, 5, 2, 3, C, ("10.0.0.9",), 9)
    assert not (await worker.answer(A, carry)).error
    (asked,) = house["b"].engine.carried
    assert (asked.first_layer, asked.last_layer, asked.to_epoch, asked.to.stage) == (4, 5, 2, 3)
    assert asked.to.hosts == ("127.0.0.1", "10.0.0.9")
    assert (await worker.answer(A, replace(carry, epoch=2))).error == "RefusedError"
    assert (await worker.answer(C, carry)).error == "RefusedError"


async def test_a_coordinator_that_is_back_within_the_grace_finds_everything_loaded(house, plan, worker, monkeypatch):
    monkeypatch.setattr(coordinator_grace, "GRACE_S", 0.05)
    await loaded(worker, plan)
    worker.away(A)
    worker.back(A)
    worker.away(C)  # another's absence is nothing to it
    await asyncio.sleep(0.1)
    assert worker.holdings() and not (await worker.answer(A, Activate(D, 1))).error
    worker.away(A)
    worker.away(A)  # told again: the time runs from the first
    await house.until(lambda: not worker.holdings())
    assert house.empty()


async def test_who_needs_the_room_gets_that_of_a_coordinator_that_is_away_and_of_no_other(
    house, plan, worker, monkeypatch
):
    await loaded(worker, plan)
    other, lent = "e" * 32, house["b"].lent
    assert (await worker.answer(C, Reserve(other, 1, lent, 10))).error == "RefusedError"
    worker.away(A)
    assert (await worker.answer(C, Reserve(other, 1, lent + 1, 10))).error == "RefusedError"
    assert worker.holdings(), "nothing is let go of in vain"
    free = house["b"].ledger.free_bytes
    assert not (await worker.answer(C, Reserve(other, 1, free, 10))).error and worker.holdings(), "there is room"
    await worker.answer(C, Release(other, 1))
    assert (await worker.answer(C, Reserve(other, 2, lent, 10))).error, "it may be back in a moment"
    monkeypatch.setattr(coordinator_grace, "EVICTABLE_S", 0.0)
    assert not (await worker.answer(C, Reserve(other, 2, lent, 10))).error
    assert not worker.holdings() and not house["b"].engine.shards
    await worker.answer(C, Release(other, 2))


async def test_a_dead_engine_is_told_for_each_epoch(house, plan, worker):
    await side_by_side(house, worker, plan)
    told = []
    worker._report = lambda device, message: told.append(message)
    house["b"].engine.clear()
    worker.engine_lost("killed")
    assert told == [Trouble(D, epoch, "killed", engine_died=True) for epoch in (1, 2)]
    assert house.empty() and not worker.holdings()


async def test_what_an_epoch_says_that_it_shares_and_does_not_is_not_loaded_beside_the_other(house, plan, worker):
    """Its promise counts once what both need; other layers than those that are loaded have no room there."""
    await loaded(worker, plan)
    blueprint, assign = plan
    engine, ledger = house["b"].engine, house["b"].ledger
    before = engine.held
    lie = [replace(work, first_layer=work.first_layer - 1, last_layer=work.last_layer - 1) for work in assign.work]
    assert not (await worker.answer(A, Reserve(D, 2, blueprint.promises[B], 10, 0))).error
    answer = await worker.answer(A, replace(assign, epoch=2, work=tuple(lie)))
    assert answer.error == "RefusedError" and "are promised" in answer.reason
    assert engine.held == before and ledger.promised_bytes == blueprint.promises[B]
    assert not (await worker.answer(A, Activate(D, 1))).error, "the first one stands"


async def test_epochs_load_one_after_the_other_so_that_each_knows_its_room(house, plan, worker):
    await loaded(worker, plan)
    blueprint, assign = plan
    engine = house["b"].engine
    other = [replace(work, first_layer=work.first_layer - 1, last_layer=work.last_layer - 1) for work in assign.work]
    engine.gate.clear()
    tasks, lent = [], house["b"].lent
    house["b"].ledger.lent_bytes = house["b"].lent = 3 * lent
    for epoch in (2, 3):  # each says that it shares what the one before has
        added = blueprint.promises[B] if epoch == 2 else 0
        assert not (await worker.answer(A, Reserve(D, epoch, blueprint.promises[B], 10, added))).error
        sizes = {"slots": assign.slots + epoch, "micro_batch": 1, "micro_batches": 1}
        work = tuple(other) if epoch == 3 else assign.work
        tasks.append(asyncio.ensure_future(worker.answer(A, replace(assign, epoch=epoch, work=work, **sizes))))
        for _ in range(50):  # turns of the loop until it waits for the engine, or for the epoch before
            await asyncio.sleep(0)
    assert sum(isinstance(one, LoadStage) for one in engine.seen) == 2 * len(assign.work), "the third has to wait"
    engine.gate.set()
    assert sorted(answer.error for answer in await asyncio.gather(*tasks)) == ["", "RefusedError"]


async def test_links_that_a_coordinator_has_expected_are_its_own_share(house, plan, worker):
    blueprint, assign = plan
    many = tuple(f"{n:064x}" for n in range(MAX_LINKS))
    greedy = replace(assign, work=(replace(assign.work[0], state_from=many), *assign.work[1:]))
    with pytest.raises(BadInputError, match="links"):
        check(greedy, 1 << 40, own=False)
    greedy = replace(assign, work=(replace(assign.work[0], state_from=many[: MAX_LINKS - 4]), *assign.work[1:]))
    house["b"].ledger.lent_bytes = house["b"].lent = 10 * blueprint.promises[B]
    for deployment, sender, error in ((D, A, ""), ("e" * 32, A, "RefusedError"), ("f" * 32, C, "")):
        await worker.answer(sender, Reserve(deployment, 1, blueprint.promises[B], 10))
        answer = await worker.answer(sender, replace(greedy, deployment=deployment))
        assert answer.error == error, answer.reason
        await worker.answer(sender, Release(deployment, 0))
    assert MAX_LINKS * MAX_MEMBERS <= MAX_EXPECTED, "engines have room for the shares of all"


async def test_only_the_coordinator_names_requests_in_the_log(house, plan, worker, caplog):
    caplog.set_level(logging.INFO)
    caplog.handler.addFilter(CauseInLog())
    await loaded(worker, plan)
    caplog.clear()
    for sender, told in (
        (C, Computing(D, 1, "stranger")),
        (A, Computing("e" * 32, 2, "no-deployment")),
        (A, Computing(D, 3, "two\nlines")),
        (A, Computing(D, 4, "")),
        (A, Computing(D, 5, "req-5")),
    ):
        worker.computing(sender, told)
    assert [(one.cause, one.getMessage()) for one in caplog.records] == [
        ("[req-5] ", f"sequence 5 of {D[:8]} is computed here")
    ]
    assert decode(encode(told, Control), Control) == told
