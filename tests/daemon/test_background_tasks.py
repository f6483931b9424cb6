"""Work that nobody waits for."""

from __future__ import annotations

import asyncio
import logging

import pytest

from peerllm.daemon.background_tasks import BackgroundTasks, LatestTasks

WAIT_S = 5.0


async def test_what_fails_is_logged_by_its_name_and_what_goes_on_is_ended(caplog: pytest.LogCaptureFixture) -> None:
    tasks, ended, logged = BackgroundTasks(), asyncio.Event(), asyncio.Event()

    async def endless() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    async def failing() -> None:
        asyncio.get_running_loop().call_soon(logged.set)
        raise ValueError("no such shelf")

    with caplog.at_level(logging.ERROR):
        tasks.start(failing(), "tidy up")
        tasks.start(endless(), "wait for ever")
        await asyncio.wait_for(logged.wait(), WAIT_S)
        await asyncio.sleep(0)
        await tasks.close()
        await tasks.close()
    assert ended.is_set()
    assert "tidy up failed" in caplog.text
    assert "no such shelf" in caplog.text
    assert "wait for ever" not in caplog.text


async def test_a_new_task_takes_the_place_of_one_of_its_kind_and_hears_that_it_is_the_current_one() -> None:
    errors: list[BaseException] = []
    tasks, done, cancelled = LatestTasks("shelf", errors.append), asyncio.Event(), asyncio.Event()
    current: dict[str, bool] = {}

    async def first() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            current["first"] = tasks.current("sort")
            cancelled.set()

    async def second() -> None:
        await cancelled.wait()
        for _ in range(3):  # the first one's end is heard of
            await asyncio.sleep(0)
        current["second"] = tasks.current("sort")
        current["of no such kind"] = tasks.current("dust")
        done.set()

    tasks.start("sort", first())
    await asyncio.sleep(0)  # it begins
    tasks.start("sort", second())
    await asyncio.wait_for(done.wait(), WAIT_S)
    assert current == {"first": False, "second": True, "of no such kind": False}
    await tasks.close()
    assert errors == []


async def test_what_a_task_raises_is_told_once_and_what_is_cancelled_is_no_error() -> None:
    errors: list[BaseException] = []
    told = asyncio.Event()

    def failed(error: BaseException) -> None:
        errors.append(error)
        told.set()

    tasks = LatestTasks("shelf", failed)

    async def failing() -> None:
        raise ValueError("no such shelf")

    tasks.start("sort", asyncio.sleep(1000))
    tasks.start("dust", failing())
    await asyncio.wait_for(told.wait(), WAIT_S)
    tasks.cancel("sort")
    tasks.cancel("sort")
    await tasks.close()
    assert [str(error) for error in errors] == ["no such shelf"]
