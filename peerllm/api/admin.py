"""/peerllm/v1: what the command line and the page do with the household."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Coroutine
from contextlib import aclosing
from typing import Annotated, Any, Literal, TypeVar

from aiohttp import web
from msgspec import Meta, Struct

from peerllm.api.bodies import read_body
from peerllm.api.error_answers import FieldError, failing_as, household_error, json_response, refused
from peerllm.api.guard import is_loopback
from peerllm.api.keys import EXPECTED, HOUSEHOLD, TASKS
from peerllm.api.streams import KEEP_ALIVE_S, SSE, Stream, each, pulsed
from peerllm.daemon.facade import (
    MAX_BENCH_SEQUENCES,
    MAX_BENCH_TOKENS,
    MAX_PROMPT_CHUNK,
    RunOptions,
    RunProgress,
)
from peerllm.types import Activations, Objective, ScheduleName

T = TypeVar("T")
Note = Callable[[RunProgress], None]
WAIT_S = 25.0  # seconds that GET status?wait=1 waits for a change
INVITE_S = 120  # seconds the pairing door stays open
MAX_TEXT_CHARS = 4096  # of a model's path, a code, a device's name
MAX_PROGRESS = 256  # lines waiting for a client that reads slowly
MAX_CONTEXT = 2**31 - 1
MAX_SLOTS = 4096
MAX_RECORDING = 2**53  # its number

Line = Annotated[str, Meta(min_length=1, max_length=MAX_TEXT_CHARS)]
MaybeLine = Annotated[str, Meta(max_length=MAX_TEXT_CHARS)] | None
BenchTokens = Annotated[int, Meta(ge=1, le=MAX_BENCH_TOKENS)]


class NoFields(Struct):
    """The body of what needs none."""


class JoinBody(Struct):
    code: Line
    at: MaybeLine = None  # HOST:PORT


class DeviceBody(Struct):
    device: Line  # a name or an id


class ModelBody(Struct):
    model: Line


class BenchBody(ModelBody):
    sequences: Annotated[int, Meta(ge=1, le=MAX_BENCH_SEQUENCES)] | None = None
    prompt_tokens: BenchTokens | None = None
    output_tokens: BenchTokens | None = None
    apart: bool | None = None


class TraceBody(ModelBody):
    recording: Annotated[int, Meta(ge=1, le=MAX_RECORDING)] | None = None


class RunBody(ModelBody):
    """facade.RunOptions; what is absent or null is as there."""

    objective: Objective | None = None
    context: Annotated[int, Meta(ge=1, le=MAX_CONTEXT)] | None = None
    slots: Annotated[int, Meta(ge=1, le=MAX_SLOTS)] | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] | None = None
    quantize: Literal["auto", "none", "int8", "int4"] | None = None
    prompt_chunk: Annotated[int, Meta(ge=1, le=MAX_PROMPT_CHUNK)] | None = None
    private: bool | None = None
    schedule: ScheduleName | None = None
    activations: Activations | None = None
    name: MaybeLine = None

    def options(self) -> RunOptions:
        said = {name: value for name in self.__struct_fields__ if (value := getattr(self, name)) is not None}
        return RunOptions(**said)


async def status(request: web.Request) -> web.Response:
    """The object of `peerllm status --json`; with ?wait=1 not before it changes, or after WAIT_S."""
    household = request.app[HOUSEHOLD]
    if request.query.get("wait") in {"1", "true"}:
        with request.app[TASKS].stream(request.remote or ""):
            async with aclosing(pulsed(each(household.changed()), WAIT_S)) as changes:
                await anext(changes, None)  # at once
                await anext(changes, None)
    return json_response(household.status())


async def engine(request: web.Request) -> web.Response:
    """What this device's engine holds now."""
    return json_response(await request.app[HOUSEHOLD].engine())


async def process(request: web.Request) -> web.Response:
    """{"pid", "tasks"}: of this daemon, its asyncio tasks counted; for who sits at this machine."""
    if not is_loopback(request.remote or ""):
        return refused(request, 403, "this is told on the device itself only")
    return json_response({"pid": os.getpid(), "tasks": len(asyncio.all_tasks())})


async def events(request: web.Request) -> web.StreamResponse:
    """The status now and after every change, as SSE."""
    household = request.app[HOUSEHOLD]
    stream = Stream(request, SSE, failing_as(household_error))
    with request.app[TASKS].stream(request.remote or ""):
        async with aclosing(pulsed(each(household.changed()), KEEP_ALIVE_S)) as changes:
            async for changed in changes:
                if changed:
                    await stream.send(household.status())
                else:
                    await stream.comment("unchanged")
    return await stream.end()


async def invite(request: web.Request) -> web.Response:
    """Open the pairing door: {"code", "port", "hosts", "expires_s"}."""
    await read_body(request, NoFields)
    code, port = await _change(request, request.app[HOUSEHOLD].invite(), "invite")
    hosts = list(request.app[HOUSEHOLD].hosts())
    return json_response({"code": code, "port": port, "hosts": hosts, "expires_s": INVITE_S})


async def join(request: web.Request) -> web.Response:
    """{"code", "at": "host:port" or null} gives {"name": the inviter's}."""
    body = await read_body(request, JoinBody)
    joining = request.app[HOUSEHOLD].join(body.code, _address(body.at or ""))
    return json_response({"name": await _change(request, joining, "join")})


async def leave(request: web.Request) -> web.Response:
    await read_body(request, NoFields)
    await _change(request, request.app[HOUSEHOLD].leave(), "leave")
    return json_response({"ok": True})


async def remove(request: web.Request) -> web.Response:
    """{"device": name or id}."""
    device = (await read_body(request, DeviceBody)).device
    await _change(request, request.app[HOUSEHOLD].remove(device), "remove")
    return json_response({"ok": True})


async def stop(request: web.Request) -> web.Response:
    """{"model": name}."""
    model = (await read_body(request, ModelBody)).model
    await _change(request, request.app[HOUSEHOLD].stop(model), "stop")
    return json_response({"ok": True})


async def scenario(request: web.Request) -> web.Response:
    """?model=NAME: what that running model was planned for and how its stages do (facade.Household.scenario)."""
    return json_response(await request.app[HOUSEHOLD].scenario(request.query.get("model", "")[:MAX_TEXT_CHARS]))


async def bench(request: web.Request) -> web.Response:
    """{"model", "sequences", "prompt_tokens", "output_tokens", "apart"}: what was measured; ends with its client."""
    body = await read_body(request, BenchBody)
    sequences, prompt, output = body.sequences or 1, body.prompt_tokens or 64, body.output_tokens or 64
    with request.app[TASKS].stream(request.remote or ""):
        found = await request.app[HOUSEHOLD].bench(body.model, sequences, prompt, output, bool(body.apart))
    return json_response(found)


async def trace(request: web.Request) -> web.Response:
    """{"model"} begins to record and gives {"recording": number}; {"model", "recording"} ends that: Chrome's trace."""
    body = await read_body(request, TraceBody)
    model, recording = body.model, body.recording
    household = request.app[HOUSEHOLD]
    if recording is None:
        return json_response({"recording": await _change(request, household.record(model), "record")})
    found = await _change(request, household.recorded(model, recording), "recorded")
    return web.Response(body=found, content_type="application/json")


async def plan(request: web.Request) -> web.StreamResponse:
    """Lines of JSON: every RunProgress, then facade.Household.preview or {"error": ...}."""
    options = (await read_body(request, RunBody)).options()
    household = request.app[HOUSEHOLD]

    async def work(note: Note) -> dict[str, Any]:
        return await household.preview(options, note)

    return await _lines(request, work, f"api: plan {options.model[:80]}")


async def run(request: web.Request) -> web.StreamResponse:
    """Lines of JSON: every RunProgress, then {"ok": true, "name": ...} or {"error": ...}.

    Hanging up does not stop the loading.
    """
    options = (await read_body(request, RunBody)).options()
    household, expected = request.app[HOUSEHOLD], request.app[EXPECTED]

    expected.expect(options.model, options.name)

    async def work(note: Note) -> dict[str, Any]:
        try:
            return {"ok": True, "name": await household.run(options, note)}
        finally:
            expected.forget(options.model)

    return await _lines(request, work, f"api: run {options.model[:80]}")


async def _lines(
    request: web.Request, work: Callable[[Note], Coroutine[Any, Any, dict[str, Any]]], name: str
) -> web.StreamResponse:
    """Tells what `work` notes, then what it gives; it goes on if the client hangs up."""
    lines: asyncio.Queue[RunProgress | None] = asyncio.Queue()
    tasks = request.app[TASKS]

    def note(progress: RunProgress) -> None:
        if lines.qsize() >= MAX_PROGRESS:
            lines.get_nowait()
        lines.put_nowait(progress)

    stream = Stream(request, "application/x-ndjson", failing_as(household_error))
    with tasks.stream(request.remote or ""):
        task = tasks.start(work(note), name)
        task.add_done_callback(lambda _: lines.put_nowait(None))
        while (progress := await lines.get()) is not None:
            shares = dict(progress.devices)
            await stream.send({"state": progress.state, "message": progress.message, "devices": shares})
        await stream.send(task.result())
    return await stream.end()


def _address(at: str) -> tuple[str, int] | None:
    if not at:
        return None
    host, _, port = at.rpartition(":")
    if not host or not port.isdecimal() or not 1 <= int(port) <= 65535:
        raise FieldError("at must be HOST:PORT, as `peerllm invite` prints it", "at")
    return host.strip("[]"), int(port)


async def _change(request: web.Request, work: Coroutine[Any, Any, T], name: str) -> T:
    """Does it to the end even if the client hangs up halfway."""
    return await asyncio.shield(request.app[TASKS].start(work, f"api: {name}"))
