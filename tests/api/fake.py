"""A household whose devices, models and answers are scripted, and a tokenizer small enough to make on the spot."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import aiohttp
from aiohttp import web
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from peerllm.api.text.model_text import ModelText
from peerllm.api.text.tokens.decoding_table import DecodingTable
from peerllm.chat_templates import abilities_in
from peerllm.daemon.decide.owner_limits import OwnerLimits
from peerllm.daemon.facade import (
    Chunk,
    GenerateRequest,
    InheritedAnswer,
    PeerHandler,
    RelayedAnswer,
    RunOptions,
    RunProgress,
    ServedModel,
)
from peerllm.daemon.owner.limits_file import changed
from peerllm.errors import BadInputError, InfeasibleError, LinkError, NotFoundError, PairingError, RefusedError
from peerllm.logprobs import packed

DEPLOYMENT = "d" * 32
CONTEXT = 256
LONG = (*range(0x1000, 0xD001, 0x1000), 0xE000, 0xF000)  # characters of three bytes, one for each first byte
LONGEST = range(0x10000, 0x110000, 0x10000)  # ... and of four
END = 256  # id of <|end|>
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
WEIGHTS = "16-bit, rounded to 8 bits (--quantize none keeps them)"
BOUND_S = 10.0  # seconds a test waits for an event
TRACE: dict[str, Any] = {
    "otherData": {
        "model": "builtin",
        "seconds": 0.25,
        "devices": {
            "laptop": {"offset_us": 0.0, "uncertainty_us": 40.0, "drift_ppm": 0.0, "spans_lost": 0},
            "mini-pc": {"offset_us": 9e6, "uncertainty_us": 300.0, "drift_ppm": 3.0, "spans_lost": 12},
        },
        "missing": {"jetson": "it is gone"},
    },
    "traceEvents": [
        {"ph": "M", "pid": 1, "tid": 0, "ts": 0, "name": "process_name", "args": {"name": "laptop"}},
        {"ph": "M", "pid": 2, "tid": 0, "ts": 0, "name": "process_name", "args": {"name": "mini-pc"}},
        {"ph": "X", "pid": 1, "tid": 1, "ts": 100, "dur": 60, "name": "stage 0: step", "args": {}},
        {"ph": "X", "pid": 1, "tid": 1, "ts": 160, "dur": 40, "name": "idle", "args": {}},
        {"ph": "X", "pid": 2, "tid": 1, "ts": 150, "dur": 50, "name": "stage 1: step", "args": {}},
        {"ph": "X", "pid": 1, "tid": 2, "ts": 150, "dur": 40, "name": "send activation", "args": {}},
        {"ph": "b", "pid": 1, "tid": 0, "ts": 150, "name": "hop to mini-pc", "cat": "hop", "id": "h1"},
        {"ph": "e", "pid": 1, "tid": 0, "ts": 170, "name": "hop to mini-pc", "cat": "hop", "id": "h1"},
    ],
}


def byte_tokenizer() -> Tokenizer:
    """One token per byte, id 256 is <|end|>."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: index for index, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<|end|>", special=True)])
    return tokenizer


def as_told(tokenizer: Tokenizer) -> DecodingTable:
    """By the process that has read it."""
    with TemporaryDirectory() as directory:
        tokenizer.save(f"{directory}/tokenizer.json")
        text = ModelText(Path(directory))
    facts, tokens = text.table(), list[str | None]()
    while len(tokens) < facts["ids"]:
        tokens += text.tokens(len(tokens))
    return DecodingTable(facts, tokens)


def make_model_dir(path: Path, template: str | None = TEMPLATE, generation: dict[str, Any] | None = None) -> Path:
    """A model directory as far as text is concerned."""
    path.mkdir(parents=True, exist_ok=True)
    byte_tokenizer().save(str(path / "tokenizer.json"))
    config: dict[str, Any] = {"bos_token": "<s>", "eos_token": {"content": "<|end|>"}}
    if template is not None:
        config["chat_template"] = template
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    if generation is not None:
        (path / "generation_config.json").write_text(json.dumps(generation))
    return path


SCENARIO: dict[str, Any] = {
    "model": {
        "name": "builtin",
        "layers": [
            {"name": "e", "kind": "embedding", "memory_bytes": 9, "kv_bytes_per_token": 0, "output_bytes_per_token": 8},
            {
                "name": "block",
                "kind": "block",
                "repeat": 2,
                "memory_bytes": 9,
                "kv_bytes_per_token": 1,
                "output_bytes_per_token": 8,
            },
            {"name": "h", "kind": "head", "memory_bytes": 9, "kv_bytes_per_token": 0, "output_bytes_per_token": 4},
        ],
    },
    "devices": [
        {
            "name": "laptop",
            "memory_bytes": 1_000_000,
            "layer_ms": {"embedding": {"1": 0.1}, "block": {"1": 1.5}, "head": {"1": 0.9}},
        }
    ],
    "links": {"default": None, "pairs": []},
    "source": "laptop",
    "workload": {"prompt_tokens": 32, "output_tokens": 96, "sequences": 4, "context": 256},
}


def chances(token: int, place: int, asked: int | None) -> tuple[bytes, ...]:
    """Of the token at this place of an answer: the next ids are likelier."""
    others = [((token + 1 + at) % (END + 1), -(at + 1) / 8) for at in range(asked or 0)]
    return () if asked is None else (packed([(token, -(place + 1) / 16), *others]),)


class FakeHousehold:
    """Says `reply` byte by byte; every way of failing can be switched on."""

    def __init__(self, model_dir: Path) -> None:
        self.tokenizer = byte_tokenizer()
        self.model = ServedModel(
            deployment=DEPLOYMENT,
            name="builtin",
            model="builtin",
            state="serving",
            reason="",
            created=1_700_000_000,
            model_dir=model_dir,
            context=CONTEXT,
            stop_ids=(END,),
            abilities=abilities_in(model_dir),
        )
        self.served = [self.model]
        self.token_bytes: dict[int, int] = {}
        self.reply = "Hello, wörld 🏡!"
        self.endless = False
        self.pace_s = 0.0  # between two tokens; all of an answer that ends come at once where it is 0
        self.queued: list[int] = []
        self.error_at_once: Exception | None = None
        self.error_midway: Exception | None = None
        self.error_in_gate: Exception | None = None  # before the first token, behind `gate`
        self.finish: Any = "stop"
        self.reused = 0  # of a prompt's tokens
        self.gate: asyncio.Event | None = None  # holds the answer back until set
        self.middle: asyncio.Event | None = None  # holds back the rest of an answer, after its fourth token
        self.requests: list[GenerateRequest] = []
        self.runs: list[RunOptions] = []
        self.calls: list[tuple[Any, ...]] = []
        self.start_gate: asyncio.Event | None = None  # the device is starting until it is set
        self.pairing_port = 8645
        self.owner, self.leaving = OwnerLimits(), ""
        self.addresses: tuple[str, ...] = ("192.168.1.7", "fd00::7", "fe80::7")
        self.asked = asyncio.Event()
        self.closed = asyncio.Event()
        self.produced = 0
        self.run_gate: asyncio.Event | None = None
        self.run_error: Exception | None = None
        self.burst = 0  # lines of progress that come at once
        self.run_done = asyncio.Event()
        self.rounded_layers: list[int] = []  # of what is planned
        self.change = asyncio.Event()
        self.watched, self.unwatched = asyncio.Event(), asyncio.Event()  # somebody waits for a change, and no more
        self.nearby: list[dict[str, Any]] = []
        self.devices: list[dict[str, Any]] = [device("laptop", 0), device("mini-pc", 1), device("jetson", 2)]
        self.deployments: list[dict[str, Any]] = [deployment()]
        self.id = "a" * 64
        self.peers: dict[str, str] = {}  # where other devices take what is relayed to them, by device
        self.handler: PeerHandler | None = None

    def limits(self) -> dict[str, Any]:
        return {**asdict(self.owner), "leaving": "paused by its owner" if self.owner.paused else self.leaving}

    async def set_limits(self, changes: Mapping[str, Any]) -> dict[str, Any]:
        self.owner = changed(self.owner, changes)
        return self.limits()

    async def started(self) -> None:
        if self.start_gate is not None:
            await self.start_gate.wait()

    async def engine(self) -> dict[str, Any]:
        return {"stages": [], "weight_bytes": 0, "kv_bytes": 0, "resident_bytes": 0, "decode_ms": {}}

    def status(self) -> dict[str, Any]:
        first = self.devices[0]
        return {
            "device": {"id": first["id"], "name": first["name"]},
            "devices": self.devices,
            "deployments": self.deployments,
            "version": "0",
            "nearby": self.nearby,
            "api": "http://127.0.0.1:0",
        }

    def touch(self) -> None:
        self.change.set()
        self.change = asyncio.Event()

    async def changed(self) -> AsyncIterator[None]:
        try:
            while True:
                change = self.change
                yield
                self.watched.set()
                await change.wait()
        finally:
            self.unwatched.set()

    def models(self) -> list[ServedModel]:
        return self.served

    def ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer.encode(text).ids
        return ids

    def bytes_of(self, token: int) -> bytes:
        """What a token of `byte_tokenizer` stands for."""
        if not self.token_bytes:
            text = "".join(map(chr, (*range(0x801), *LONG, *LONGEST)))
            self.token_bytes = dict(zip(self.ids(text), text.encode(), strict=True))
        if token == END:
            return b"<|end|>"
        known = self.token_bytes.get(token)
        return bytes([ord(self.tokenizer.id_to_token(token)) if known is None else known])  # some are in no text

    @asynccontextmanager
    async def relay(
        self, source: str, path: str, headers: Mapping[str, str], body: bytes
    ) -> AsyncIterator[RelayedAnswer]:
        """Over plain HTTP, with the errors of the real one."""
        if source not in self.peers:
            raise LinkError(f"{source[:8]} is away")
        asked = {**headers, "X-Device": self.id}
        async with (
            aiohttp.ClientSession() as session,
            session.post(self.peers[source] + path, headers=asked, data=body) as response,
        ):
            yield RelayedAnswer(response.status, response.headers, pieces(response))

    def inherit_answers(self, handler: Callable[[InheritedAnswer], None]) -> None:
        self.inherit = handler

    def answer_peers(self, handler: PeerHandler) -> None:
        self.handler = handler

    @asynccontextmanager
    async def control_port(self) -> AsyncIterator[str]:
        """Where the devices of `relay` reach this one."""

        async def take(request: web.Request) -> web.StreamResponse:
            assert self.handler is not None
            return await self.handler(request, request.headers["X-Device"])

        app = web.Application(client_max_size=1024)  # as the real port
        app.router.add_route("*", "/{path:.*}", take)
        runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        try:
            yield f"http://127.0.0.1:{runner.addresses[0][1]}"
        finally:
            await runner.cleanup()

    async def generate(self, request: GenerateRequest) -> AsyncIterator[Chunk]:
        self.requests.append(request)
        self.asked.set()
        try:
            if self.error_at_once:
                raise self.error_at_once
            for place in self.queued:
                yield Chunk((), queued=place)
                await asyncio.sleep(self.pace_s)
            if self.gate is not None:
                await self.gate.wait()
            if self.error_in_gate:
                raise self.error_in_gate
            if request.pool:
                yield Chunk((), "stop", vector=(float(len(request.prompt)), float(request.prompt[-1]), 2.0, -4.0))
                return
            ids = self.ids(self.reply)[len(request.answer) :]
            while self.endless:
                self.produced += 1
                yield Chunk((ids[self.produced % len(ids)],))
                await asyncio.sleep(self.pace_s)
            for index, one in enumerate(ids):
                self.produced += 1
                if index == request.max_tokens:
                    yield Chunk((), "length")
                    return
                place = len(request.answer) + index
                yield Chunk((one,), reused=self.reused, logprobs=chances(one, place, request.logprobs))
                if self.pace_s:
                    await asyncio.sleep(self.pace_s)
                if self.middle is not None and index == 3:
                    await self.middle.wait()
                if self.error_midway and index == 3:
                    raise self.error_midway
            ended = self.finish == "stop"
            yield Chunk(
                (END,) if ended else (), self.finish, logprobs=chances(END, len(ids), request.logprobs) if ended else ()
            )
        finally:
            self.closed.set()

    async def run(self, options: RunOptions, progress: Callable[[RunProgress], None]) -> str:
        self.runs.append(options)
        try:
            if options.model == "unknown":
                raise NotFoundError("no model 'unknown'")
            for number in range(self.burst):
                progress(RunProgress("planning", f"step {number}"))
            progress(RunProgress("planning", "planning over 3 devices"))
            if self.run_gate is not None:
                await self.run_gate.wait()
            for share in (0.5, 1.0):
                progress(RunProgress("loading", "loading", {"laptop": share, "mini-pc": share / 2}))
            if options.model == "huge":
                raise InfeasibleError("huge needs 4.0 GB more than the household lends", 4_000_000_000)
            if self.run_error:
                raise self.run_error
            return options.name or options.model.rpartition("/")[2]
        finally:
            self.run_done.set()

    async def start_model(self, model: str) -> None:
        self.calls.append(("start", model))
        self.asked.set()
        if self.run_gate is not None:
            await self.run_gate.wait()
        if self.run_error:
            raise self.run_error
        self.served = [
            replace(self.model, name=one.name, model=one.model, names=one.names) if one.model == model else one
            for one in self.served
        ]
        self.touch()

    async def keep(self, deployment: str, keep_alive_s: float | None) -> None:
        self.calls.append(("keep", deployment, keep_alive_s))

    async def pull(self, name: str, told: Callable[[int, int], None]) -> None:
        self.calls.append(("pull", name))
        try:
            if name == "unknown":
                raise NotFoundError("no model 'unknown'")
            told(250, 1000)
            if self.run_gate is not None:
                await self.run_gate.wait()
            if self.run_error:
                raise self.run_error
        finally:
            self.run_done.set()

    async def alias(self, name: str, model: str) -> None:
        self.calls.append(("alias", name, model))

    async def delete(self, name: str) -> None:
        self.calls.append(("delete", name))
        if name == "builtin":
            raise BadInputError("builtin is a part of peerllm and cannot be deleted")

    async def preview(self, options: RunOptions, progress: Callable[[RunProgress], None]) -> dict[str, Any]:
        self.calls.append(("preview", options))
        progress(RunProgress("planning", "measuring laptop"))
        if options.model == "unknown":
            raise NotFoundError("no model 'unknown'")
        return {"scenario": SCENARIO, "most_chunk": 16, "rounded_layers": self.rounded_layers, "weights": WEIGHTS}

    async def scenario(self, model: str) -> dict[str, Any]:
        if model != "builtin":
            raise NotFoundError(f"{model} does not run from here")
        stages = [{"device": "laptop", "first_layer": 0, "last_layer": 3}]
        return {name: SCENARIO for name in ("scenario", "running")} | {
            "stages": stages, "micro_batch": 1, "micro_batches": 4, "schedule": "no-bubble", "cuts": [[1, 16]],
            "spreads": {"0": {"4": 0.2}},
        }  # fmt: skip

    async def bench(
        self, model: str, sequences: int, prompt_tokens: int, output_tokens: int, apart: bool = False
    ) -> dict[str, Any]:
        self.calls.append(("bench", model, sequences, prompt_tokens, output_tokens, apart))
        return {
            "sequences": sequences,
            "prompt_tokens": prompt_tokens,
            "output_tokens": output_tokens,
            "time_to_first_token_ms": [20.0] * sequences,
            "step_ms": [4.0] * sequences,
            "tokens_per_second": 200.0 * sequences,
            "steady_tokens_per_second": 250.0 * sequences,
        }

    async def record(self, model: str) -> int:
        self.calls.append(("record", model))
        return 7

    async def recorded(self, model: str, recording: int) -> bytes:
        self.calls.append(("recorded", model, recording))
        if recording != 7:
            raise RefusedError("this recording is over")
        return json.dumps(TRACE).encode()

    async def stop(self, model: str) -> None:
        self.calls.append(("stop", model))
        if model != "builtin":
            raise NotFoundError(f"no model {model!r} is served")

    async def invite(self) -> tuple[str, int]:
        self.calls.append(("invite",))
        return "K7-4PQ9MX", self.pairing_port

    def hosts(self) -> tuple[str, ...]:
        return self.addresses

    async def join(self, code: str, at: tuple[str, int] | None) -> str:
        self.calls.append(("join", code, at))
        if code == "wrong":
            raise PairingError("the code is wrong; two tries are left")
        return "laptop"

    async def leave(self) -> None:
        self.calls.append(("leave",))

    async def remove(self, name: str) -> None:
        self.calls.append(("remove", name))


async def pieces(response: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
    try:
        async for piece in response.content.iter_any():
            yield piece
    except aiohttp.ClientError as error:
        raise LinkError(f"the answer broke off: {error}") from error


def device(name: str, index: int, state: str = "here") -> dict[str, Any]:
    return {
        "id": f"{index:x}" * 64,
        "name": name,
        "state": state,
        "memory_bytes": 8_000_000_000,
        "lent_bytes": 20_000_000,
        "used_bytes": 112_000_000,
        "promised_bytes": 12_000_000,
        "problem": "",
        "engine": "running",
        "compute": {},
        "rtt_ms": 0.4,
        "address": "127.0.0.1:8643",
    }


def deployment(
    model: str = "builtin",
    state: str = "serving",
    cuts: Sequence[tuple[str, int, int]] = (("laptop", 0, 4), ("mini-pc", 5, 9), ("jetson", 10, 13)),
) -> dict[str, Any]:
    return {
        "id": DEPLOYMENT,
        "name": model,
        "model": model,
        "context": 1024,
        "slots": 4,
        "message": "",
        "state": state,
        "epoch": 1,
        "coordinator": "laptop",
        "reason": "",
        "measured": {},
        "progress": 1.0,
        "weights": WEIGHTS,
        "plan": {
            "stages": [
                {"device": name, "first_layer": first, "last_layer": last, "memory_bytes": 12_000_000}
                for name, first, last in cuts
            ],
            "predicted": {"tokens_per_second": 80.0},
        },
    }
