"""/peerllm/v1: what the command line and the page do with the household."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Coroutine
from contextlib import aclosing
from functools import partial
from typing import Annotated, Any, Literal, TypedDict, TypeVar

from aiohttp import web
from msgspec import Meta, Struct

from peerllm.api.askers.accounts import AskerStatus
from peerllm.api.core.generation import Name
from peerllm.api.core.named_models import device_name
from peerllm.api.error_answers import FieldError, failing_as, household_error, json_response
from peerllm.api.guard import ADMIN_PREFIX, is_loopback
from peerllm.api.keys import ACCOUNTS, ANSWERS, EXPECTED, HOUSEHOLD, TASKS
from peerllm.api.routes.api_route import JSON, ApiRoute, NoFields, add_routes
from peerllm.api.streams import KEEP_ALIVE_S, LINES, SSE, Stream, each, pulsed
from peerllm.daemon.facade import (
    MAX_BENCH_SEQUENCES,
    MAX_BENCH_TOKENS,
    MAX_PROMPT_CHUNK,
    RunOptions,
    RunProgress,
)
from peerllm.daemon.facade_objects import EngineStatus, HouseholdStatus, MeasuredSpeed, Preview
from peerllm.errors import PeerLLMError
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


class ChangeMade(TypedDict):
    ok: bool


class StartedModel(ChangeMade):
    name: str


class Inviter(TypedDict):
    name: str


class Invitation(TypedDict):
    """`hosts`: the addresses at which other devices reach this one, the likeliest first."""

    code: str
    port: int
    hosts: list[str]
    expires_s: int


class ProcessFacts(TypedDict):
    pid: int
    tasks: int
    answers: int


class ProgressLine(TypedDict):
    """facade.RunProgress."""

    state: str
    message: str
    devices: dict[str, float]


class NotHereError(PeerLLMError):
    """Only who sits at this machine is told."""

    http_status = 403


class ToldStatus(HouseholdStatus):
    """And who asks, who asked last first."""

    asking: list[AskerStatus]


class StatusQuery(Struct):
    wait: bool = False  # for a change, at most WAIT_S


class ScenarioQuery(Struct):
    model: Name


def add_admin(app: web.Application) -> None:
    """What changes the household goes on when its client hangs up."""
    change = partial(ApiRoute, "POST", refuses=(404, 409))
    prefix = ADMIN_PREFIX + "v1"
    add_routes(
        app,
        ApiRoute("GET", f"{prefix}/status", status),
        ApiRoute("GET", f"{prefix}/engine", engine),
        ApiRoute("GET", f"{prefix}/process", process),
        ApiRoute("GET", f"{prefix}/scenario", scenario, refuses=(404, 409)),
        ApiRoute("GET", f"{prefix}/events", events, {SSE: ToldStatus}, heads=False),
        change(f"{prefix}/invite", invite),
        change(f"{prefix}/join", join),
        change(f"{prefix}/leave", leave),
        change(f"{prefix}/remove", remove),
        change(f"{prefix}/bench", bench),
        change(f"{prefix}/plan", plan, {LINES: (ProgressLine, Preview)}),
        change(f"{prefix}/run", run, {LINES: (ProgressLine, StartedModel)}),
        change(f"{prefix}/stop", stop),
        change(f"{prefix}/trace", trace, {JSON: dict[str, Any]}),
    )


async def status(request: web.Request, *, query: StatusQuery) -> ToldStatus:
    """What `peerllm status --json` prints; with `wait` not before it changes, or some time has passed."""
    household = request.app[HOUSEHOLD]
    if query.wait:
        with request.app[TASKS].stream(request.remote or ""):
            async with aclosing(pulsed(each(household.changed()), WAIT_S)) as changes:
                await anext(changes, None)  # at once
                await anext(changes, None)
    return _status(request.app)


def _status(app: web.Application) -> ToldStatus:
    return {**app[HOUSEHOLD].status(), "asking": app[ACCOUNTS].told(partial(device_name, app))}


async def engine(request: web.Request) -> EngineStatus:
    """What this device's engine holds now."""
    return await request.app[HOUSEHOLD].engine()


async def process(request: web.Request) -> ProcessFacts:
    """This daemon's process, its asyncio tasks and kept answers counted; for who sits at this machine."""
    if not is_loopback(request.remote or ""):
        raise NotHereError("this is told on the device itself only")
    return {"pid": os.getpid(), "tasks": len(asyncio.all_tasks()), "answers": len(request.app[ANSWERS])}


async def events(request: web.Request) -> web.StreamResponse:
    """The status now and after every change, as SSE."""
    household = request.app[HOUSEHOLD]
    stream = Stream(request, SSE, failing_as(household_error))
    with request.app[TASKS].stream(request.remote or ""):
        async with aclosing(pulsed(each(household.changed()), KEEP_ALIVE_S)) as changes:
            async for changed in changes:
                if changed:
                    await stream.send(_status(request.app))
                else:
                    await stream.comment("unchanged")
    return await stream.end()


async def invite(request: web.Request, _: NoFields) -> Invitation:
    """Open the pairing door."""
    code, port = await _change(request, request.app[HOUSEHOLD].invite(), "invite")
    hosts = list(request.app[HOUSEHOLD].hosts())
    return {"code": code, "port": port, "hosts": hosts, "expires_s": INVITE_S}


async def join(request: web.Request, body: JoinBody) -> Inviter:
    """Pair with the household behind a code."""
    joining = request.app[HOUSEHOLD].join(body.code, _address(body.at or ""))
    return {"name": await _change(request, joining, "join")}


async def leave(request: web.Request, _: NoFields) -> ChangeMade:
    """Leave the household."""
    await _change(request, request.app[HOUSEHOLD].leave(), "leave")
    return {"ok": True}


async def remove(request: web.Request, body: DeviceBody) -> ChangeMade:
    """Remove a device from the household."""
    await _change(request, request.app[HOUSEHOLD].remove(body.device), "remove")
    return {"ok": True}


async def stop(request: web.Request, body: ModelBody) -> ChangeMade:
    """Stop a model."""
    await _change(request, request.app[HOUSEHOLD].stop(body.model), "stop")
    return {"ok": True}


async def scenario(request: web.Request, *, query: ScenarioQuery) -> dict[str, Any]:
    """What a running model was planned for and how its stages do (facade.Household.scenario)."""
    return await request.app[HOUSEHOLD].scenario(query.model)


async def bench(request: web.Request, body: BenchBody) -> MeasuredSpeed:
    """Measure how fast a model answers; ends with its client."""
    sequences, prompt, output = body.sequences or 1, body.prompt_tokens or 64, body.output_tokens or 64
    with request.app[TASKS].stream(request.remote or ""):
        return await request.app[HOUSEHOLD].bench(body.model, sequences, prompt, output, bool(body.apart))


async def trace(request: web.Request, body: TraceBody) -> web.Response:
    """Begin to record what every device does for a model, which gives {"recording": number}, or end that.

    With this number the answer is what was recorded, in Chrome's format.
    """
    model, recording = body.model, body.recording
    household = request.app[HOUSEHOLD]
    if recording is None:
        return json_response({"recording": await _change(request, household.record(model), "record")})
    found = await _change(request, household.recorded(model, recording), "recorded")
    return web.Response(body=found, content_type="application/json")


async def plan(request: web.Request, body: RunBody) -> web.StreamResponse:
    """What `run` would plan for now: what is done meanwhile, then facade.Household.preview."""
    options = body.options()
    household = request.app[HOUSEHOLD]

    async def work(note: Note) -> Preview:
        return await household.preview(options, note)

    return await _lines(request, work, f"api: plan {options.model[:80]}")


async def run(request: web.Request, body: RunBody) -> web.StreamResponse:
    """Start a model: what is done meanwhile, then its name.

    Hanging up does not stop the loading.
    """
    options = body.options()
    household, expected = request.app[HOUSEHOLD], request.app[EXPECTED]

    expected.expect(options.model, options.name)

    async def work(note: Note) -> StartedModel:
        try:
            return {"ok": True, "name": await household.run(options, note)}
        finally:
            expected.forget(options.model)

    return await _lines(request, work, f"api: run {options.model[:80]}")


async def _lines(
    request: web.Request, work: Callable[[Note], Coroutine[Any, Any, object]], name: str
) -> web.StreamResponse:
    """Tells what `work` notes, then what it gives; it goes on if the client hangs up."""
    lines: asyncio.Queue[RunProgress | None] = asyncio.Queue()
    tasks = request.app[TASKS]

    def note(progress: RunProgress) -> None:
        if lines.qsize() >= MAX_PROGRESS:
            lines.get_nowait()
        lines.put_nowait(progress)

    stream = Stream(request, LINES, failing_as(household_error))
    with tasks.stream(request.remote or ""):
        task = tasks.start(work(note), name)
        task.add_done_callback(lambda _: lines.put_nowait(None))
        while (progress := await lines.get()) is not None:
            line: ProgressLine = {
                "state": progress.state,
                "message": progress.message,
                "devices": dict(progress.devices),
            }
            await stream.send(line)
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
