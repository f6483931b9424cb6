"""Carrying sequences' state to another engine: bounded turns in the compute thread, sent as fast as the other takes it.

On the loop only.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress

from peerllm.engine.messages import CarryState
from peerllm.engine.process.compute import CarryTurn, Event
from peerllm.engine.process.inbox import Inbox
from peerllm.engine.schedule.state_export import StateExport
from peerllm.engine.wire.state_frames import CarriedPart, to_state_frame
from peerllm.errors import LinkError
from peerllm.transport.links.channels import KEY_VALUE
from peerllm.transport.links.link import Link

STALL_S = 30.0  # the receiver takes one turn's parts in far less
MOST_S = 60.0  # for all of it: nobody waits for longer, and one who takes a little now and then must not add up


async def carry(message: CarryState, inbox: Inbox[Event], link: Link) -> None:
    """Until all has arrived over `link`, which ends.

    LinkError if the other end takes no more, RefusedError if the epoch has ended.
    """
    export = StateExport(message)
    try:
        async with asyncio.timeout(MOST_S):
            while parts := await _turn(export, inbox):
                await _send(link, export, parts)
    except BaseException as error:
        link.abort("the state could not be carried")
        if isinstance(error, TimeoutError):
            raise LinkError(f"{link.device[:8]} did not take all state within {MOST_S:g} s") from error
        raise
    link.close()
    await link.wait_closed()


async def _turn(export: StateExport, inbox: Inbox[Event]) -> list[CarriedPart]:
    loop = asyncio.get_running_loop()
    due: asyncio.Future[list[CarriedPart]] = loop.create_future()

    def told(parts: list[CarriedPart], error: Exception | None) -> None:
        if due.done():
            return
        if error is None:
            due.set_result(parts)
        else:
            due.set_exception(error)

    def reply(parts: list[CarriedPart], error: Exception | None = None) -> None:
        with suppress(RuntimeError):  # the loop has ended, and with it whoever waits
            loop.call_soon_threadsafe(told, parts, error)

    inbox.put(CarryTurn(export, reply))
    return await due


async def _send(link: Link, export: StateExport, parts: list[CarriedPart]) -> None:
    about = export.message
    for carried in parts:
        link.send(to_state_frame(carried, export.form, about.deployment, about.to_epoch, about.to.stage))
    try:
        async with asyncio.timeout(STALL_S):
            await link.drained(KEY_VALUE)
    except TimeoutError as error:
        raise LinkError(f"{link.device[:8]} took no state for {STALL_S:g} s") from error
