"""/peerllm/v1: what the command line and the page do with the household."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Coroutine
from contextlib import aclosing
from typing import Any, TypeVar, cast

from aiohttp import web

from peerllm.api.error_answers import error_object, json_response
from peerllm.api.fields import Fields, read_object
from peerllm.api.guard import is_loopback
from peerllm.api.keys import EXPECTED, HOUSEHOLD, TASKS
from peerllm.api.streams import KEEP_ALIVE_S, Stream, each, pulsed
from peerllm.daemon.facade import (
    MAX_BENCH_SEQUENCES,
    MAX_BENCH_TOKENS,
    MAX_PROMPT_CHUNK,
    RunOptions,
    RunProgress,
)
from peerllm.types import ACTIVATIONS, QUANTIZE, SCHEDULE_NAMES, Activations, ScheduleName

T = TypeVar("T")
Note = Callable[[RunProgress], None]
WAIT_S = 25.0  # seconds that GET status?wait=1 waits for a change
INVITE_S = 120  # seconds the pairing door stays open
MAX_TEXT_CHARS = 4096  # of a model's path, a code, a device's name
MAX_PROGRESS = 256  # lines waiting for a client that reads slowly
MAX_CONTEXT = 2**31 - 1
MAX_SLOTS = 4096
MAX_RECORDING = 2**53  # its number
DTYPES = ("auto", "float32", "bfloat16", "float16")


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
        return json_response(error_object(403, "this is told on the device itself only"), 403)
    return json_response({"pid": os.getpid(), "tasks": len(asyncio.all_tasks())})


async def events(request: web.Request) -> web.StreamResponse:
    """The status now and after every change, as SSE."""
    household = request.app[HOUSEHOLD]
    stream = Stream(request, "text/event-stream; charset=utf-8")
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
    await read_object(request)
    code, port = await _change(request, request.app[HOUSEHOLD].invite(), "invite")
    hosts = list(request.app[HOUSEHOLD].hosts())
    return json_response({"code": code, "port": port, "hosts": hosts, "expires_s": INVITE_S})


async def join(request: web.Request) -> web.Response:
    """{"code", "at": "host:port" or null} gives {"name": the inviter's}."""
    fields = await read_object(request)
    code = fields.text("code", MAX_TEXT_CHARS)
    at = _address(fields)
    return json_response({"name": await _change(request, request.app[HOUSEHOLD].join(code, at), "join")})


async def leave(request: web.Request) -> web.Response:
    await read_object(request)
    await _change(request, request.app[HOUSEHOLD].leave(), "leave")
    return json_response({"ok": True})


async def remove(request: web.Request) -> web.Response:
    """{"device": name or id}."""
    device = (await read_object(request)).text("device", MAX_TEXT_CHARS)
    await _change(request, request.app[HOUSEHOLD].remove(device), "remove")
    return json_response({"ok": True})


async def stop(request: web.Request) -> web.Response:
    """{"model": name}."""
    model = (await read_object(request)).text("model", MAX_TEXT_CHARS)
    await _change(request, request.app[HOUSEHOLD].stop(model), "stop")
    return json_response({"ok": True})


async def scenario(request: web.Request) -> web.Response:
    """?model=NAME: what that running model was planned for and how its stages do (facade.Household.scenario)."""
    return json_response(await request.app[HOUSEHOLD].scenario(request.query.get("model", "")[:MAX_TEXT_CHARS]))


async def bench(request: web.Request) -> web.Response:
    """{"model", "sequences", "prompt_tokens", "output_tokens", "apart"}: what was measured; ends with its client."""
    fields = await read_object(request)
    sequences = fields.integer("sequences", 1, MAX_BENCH_SEQUENCES) or 1
    prompt, output = (fields.integer(name, 1, MAX_BENCH_TOKENS) or 64 for name in ("prompt_tokens", "output_tokens"))
    with request.app[TASKS].stream(request.remote or ""):
        found = await request.app[HOUSEHOLD].bench(
            fields.text("model", MAX_TEXT_CHARS), sequences, prompt, output, fields.flag("apart")
        )
    return json_response(found)


async def trace(request: web.Request) -> web.Response:
    """{"model"} begins to record and gives {"recording": number}; {"model", "recording"} ends that: Chrome's trace."""
    fields = await read_object(request)
    model, recording = fields.text("model", MAX_TEXT_CHARS), fields.integer("recording", 1, MAX_RECORDING)
    household = request.app[HOUSEHOLD]
    if recording is None:
        return json_response({"recording": await _change(request, household.record(model), "record")})
    found = await _change(request, household.recorded(model, recording), "recorded")
    return web.Response(body=found, content_type="application/json")


async def plan(request: web.Request) -> web.StreamResponse:
    """Lines of JSON: every RunProgress, then facade.Household.preview or {"error": ...}."""
    options = _run_options(await read_object(request))
    household = request.app[HOUSEHOLD]

    async def work(note: Note) -> dict[str, Any]:
        return await household.preview(options, note)

    return await _lines(request, work, f"api: plan {options.model[:80]}")


async def run(request: web.Request) -> web.StreamResponse:
    """Lines of JSON: every RunProgress, then {"ok": true, "name": ...} or {"error": ...}.

    Hanging up does not stop the loading.
    """
    options = _run_options(await read_object(request))
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

    stream = Stream(request, "application/x-ndjson")
    with tasks.stream(request.remote or ""):
        task = tasks.start(work(note), name)
        task.add_done_callback(lambda _: lines.put_nowait(None))
        while (progress := await lines.get()) is not None:
            shares = dict(progress.devices)
            await stream.send({"state": progress.state, "message": progress.message, "devices": shares})
        await stream.send(task.result())
    return await stream.end()


def _run_options(fields: Fields) -> RunOptions:
    return RunOptions(
        model=fields.text("model", MAX_TEXT_CHARS),
        objective="throughput" if fields.choice("objective", ("latency", "throughput")) == "throughput" else "latency",
        context=fields.integer("context", 1, MAX_CONTEXT),
        slots=fields.integer("slots", 1, MAX_SLOTS),
        dtype=fields.choice("dtype", DTYPES),
        quantize=fields.choice("quantize", QUANTIZE),
        prompt_chunk=fields.integer("prompt_chunk", 1, MAX_PROMPT_CHUNK),
        private=fields.flag("private"),
        schedule=cast("ScheduleName", fields.choice("schedule", SCHEDULE_NAMES)),
        activations=cast("Activations", fields.choice("activations", ACTIVATIONS)),
        name=fields.text("name", MAX_TEXT_CHARS, default=""),
    )


def _address(fields: Fields) -> tuple[str, int] | None:
    at = fields.text("at", MAX_TEXT_CHARS, default="")
    if not at:
        return None
    host, _, port = at.rpartition(":")
    if not host or not port.isdecimal() or not 1 <= int(port) <= 65535:
        raise fields.wrong("at", "HOST:PORT, as `peerllm invite` prints it")
    return host.strip("[]"), int(port)


async def _change(request: web.Request, work: Coroutine[Any, Any, T], name: str) -> T:
    """Does it to the end even if the client hangs up halfway."""
    return await asyncio.shield(request.app[TASKS].start(work, f"api: {name}"))
