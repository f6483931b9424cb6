"""What is done about the limits: the ledger closes and opens, deployments are let go of, the engine starts anew."""

from __future__ import annotations

import asyncio
import json
import threading
from dataclasses import asdict

import pytest

from peerllm.daemon.control_messages import Reserve
from peerllm.daemon.decide import owner_limits
from peerllm.daemon.decide.ledger import Ledger
from peerllm.daemon.decide.owner_limits import SPARE_BYTES, MachineRead, OwnerLimits
from peerllm.daemon.owner import lending
from peerllm.daemon.owner.lending import Lending
from peerllm.daemon.owner.limits_file import LIMITS_FILE, recalled
from peerllm.errors import BadInputError, RefusedError

BOUND_S = 10.0
LENT = 1000
ME, OTHER = "a" * 64, "b" * 64
GIVEN = {"memory_bytes": None, "threads": None, "hours": None, "battery_percent": None, "hot_celsius": None}


class FakeLender:
    def __init__(self):
        self.ledger, self.told, self.engines = Ledger(LENT), asyncio.Queue(), []
        self.epoch = 1

    def lent_now(self, limits):
        return limits.memory_bytes or LENT

    def lending_changed(self):
        self.told.put_nowait(self.ledger.leaving)

    async def let_go(self, reason):
        for promise in self.ledger.promises():
            self.ledger.release(promise.deployment, promise.epoch, promise.coordinator)
        self.told.put_nowait(f"let go: {reason}")
        self.lending.look()

    async def restart_engine(self, threads):
        self.engines.append(threads)

    def promise(self, coordinator=OTHER, nbytes=400):
        self.ledger.reserve(Reserve("d" * 32, self.epoch, nbytes, 60.0), coordinator, 0.0)
        self.lending.look()

    def release(self):
        self.ledger.release("d" * 32, self.epoch, OTHER)
        self.epoch += 1
        self.lending.look()

    async def hear(self):
        async with asyncio.timeout(BOUND_S):
            return await self.told.get()


@pytest.fixture
async def lender(tmp_path, monkeypatch):
    monkeypatch.setattr(lending, "READ_S", 0.01)
    made = FakeLender()
    made.machine = MachineRead(available_bytes=10**10)
    made.lending = Lending(made, tmp_path, OwnerLimits(), GIVEN, lambda limits: made.machine)
    await made.lending.start()
    yield made
    await made.lending.close()
    await made.lending.close()
    assert not [task for task in asyncio.all_tasks() if "owner" in task.get_name()]


async def test_a_device_that_leaves_promises_nothing_and_says_so(lender, tmp_path):
    lender.promise()
    await lender.lending.change({"paused": True})
    assert await lender.hear() == "paused by its owner" == lender.lending.leaving
    assert lender.ledger.free_bytes == 0
    with pytest.raises(RefusedError, match="paused by its owner"):
        lender.promise(nbytes=1)
    assert recalled(tmp_path, GIVEN).paused
    lender.release()
    await lender.lending.change({"paused": False})
    assert lender.lending.leaving == "" and lender.ledger.free_bytes == LENT
    lender.promise()


async def test_what_nobody_took_over_in_time_is_let_go_of(lender, monkeypatch):
    monkeypatch.setattr(owner_limits, "FAREWELL_S", 0.05)
    lender.promise()
    await lender.lending.change({"paused": True})
    while (told := await lender.hear()) != "let go: paused by its owner":
        assert told == "paused by its owner"
    assert not lender.ledger.promises()


async def test_the_machine_is_looked_at_again_and_again(lender):
    lender.machine = MachineRead(battery_percent=14.0)
    assert await lender.hear() == "paused: on battery, 14 %"
    lender.machine = MachineRead(battery_percent=30.0)
    assert await lender.hear() == ""


async def test_a_machine_without_memory_offers_no_more_than_it_holds(lender, monkeypatch):
    monkeypatch.setattr(owner_limits, "LESS_S", 0.02)
    monkeypatch.setattr(owner_limits, "CALM_S", 0.02)
    lender.promise()
    lender.machine = MachineRead(available_bytes=SPARE_BYTES - 1)
    assert await lender.hear() == ""
    assert lender.ledger.full and lender.ledger.offered_bytes == 400 and lender.ledger.free_bytes == 0
    lender.promise()  # renewing what is promised is not more
    with pytest.raises(RefusedError, match="0 bytes of"):
        lender.ledger.reserve(Reserve("e" * 32, 1, 1, 60.0), OTHER, 0.0)
    lender.machine = MachineRead(available_bytes=10**10)
    assert await lender.hear() == ""
    assert not lender.ledger.full and lender.ledger.offered_bytes == LENT


async def test_a_lowered_limit_of_memory_counts_at_once(lender):
    lender.promise()
    await lender.lending.change({"memory_bytes": 300})
    assert await lender.hear() == "it lends less memory now"
    lender.release()
    assert lender.lending.leaving == "" and lender.ledger.free_bytes == 300
    await lender.lending.change({"memory_bytes": 0})
    assert lender.ledger.lent_bytes == LENT


async def test_other_processors_wait_until_nothing_is_held(lender):
    lender.promise()
    await lender.lending.change({"threads": 2})
    assert await lender.hear() == "it lends other processors now" and not lender.engines
    lender.release()
    await asyncio.sleep(0)
    assert lender.engines == [2] and lender.lending.leaving == ""


async def test_what_is_no_limit_changes_nothing(lender, tmp_path):
    before = (tmp_path / LIMITS_FILE).read_text() if (tmp_path / LIMITS_FILE).exists() else ""
    with pytest.raises(BadInputError, match="threads"):
        await lender.lending.change({"paused": True, "threads": -1})
    assert lender.lending.limits == OwnerLimits() and lender.told.empty()
    assert ((tmp_path / LIMITS_FILE).read_text() if before else "") == before


async def test_a_full_disk_forgets_the_limits_at_the_next_start_and_nothing_more(lender, monkeypatch, caplog):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(lending.limits_file, "keep", full)
    await lender.lending.change({"paused": True})
    assert lender.lending.leaving and "No space left" in caplog.text


async def test_a_reading_that_fails_does_not_end_the_watch(lender, caplog):
    again = threading.Event()
    tries = iter(range(2))

    def broken(limits):
        if next(tries, None) is None:
            again.set()
        raise ZeroDivisionError

    lender.lending._read = broken
    assert await asyncio.to_thread(again.wait, BOUND_S) and "cannot be read" in caplog.text
    lender.lending._read = lambda limits: MachineRead(battery_percent=3.0)
    assert await lender.hear() == "paused: on battery, 3 %"


async def test_a_farewell_waits_for_what_others_have_here_and_for_answers_and_no_longer_than_it_may(lender):
    lender.promise()
    busy = True
    lender.lending.go("going down")
    waiting = asyncio.create_task(lender.lending.gone(OTHER.__eq__, lambda: busy, BOUND_S))
    done, _ = await asyncio.wait({waiting}, timeout=0.15)
    assert not done
    lender.release()
    done, _ = await asyncio.wait({waiting}, timeout=0.15)
    assert not done  # an answer is under way
    busy = False
    assert await waiting
    assert not await lender.lending.gone(OTHER.__eq__, lambda: True, 0.01)


async def test_what_this_device_holds_for_its_own_models_keeps_nobody_waiting(lender):
    lender.promise(coordinator=ME)
    lender.lending.go("going down")
    assert await lender.lending.gone(OTHER.__eq__, lambda: False, 0.0)
    lender.lending.go("")
    assert lender.lending.leaving == "" and not lender.lending.going


async def test_it_starts_without_lending_where_it_was_paused(tmp_path):
    lender = FakeLender()
    lender.lending = Lending(lender, tmp_path, OwnerLimits(paused=True), GIVEN, lambda limits: MachineRead())
    await lender.lending.start()
    try:
        assert lender.ledger.leaving == "paused by its owner"
    finally:
        await lender.lending.close()


async def test_it_is_looked_at_before_it_lends_anything(tmp_path):
    lender = FakeLender()
    low = MachineRead(battery_percent=3.0)
    lender.lending = Lending(lender, tmp_path, OwnerLimits(), GIVEN, lambda limits: low)
    await lender.lending.start()
    try:
        assert lender.ledger.leaving == "paused: on battery, 3 %"
    finally:
        await lender.lending.close()


def test_the_defaults_are_plain_json():
    assert json.loads(json.dumps(asdict(OwnerLimits())))["battery_percent"] == 15
