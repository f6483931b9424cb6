"""How long lists of models take to begin to come while a household does all that it can at once.

Three devices of this machine serve the built-in model. By turns each list is asked for of each device, and a small
server beside them that does nothing else: what that takes longer than alone, the machine takes. Then again while all
slots decode and more wait, long prompts are encoded, bodies of 6 MB are read, schemas are compiled, texts embedded,
plans sought, and another model with a large vocabulary is loaded, asked and stopped, over and over.

With --watch the longest time that one callback of a device's event loop computed stands beside, and where.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from pathlib import Path
from typing import Any

import aiohttp

from benchmarks.models import LLAMA_3_2_1B, write_llama
from peerllm.cli.demo.demo import NAMES, SLOTS
from tests.clients import clients
from tests.household import Device, household
from tests.loop_watch import longest
from tests.mixed_requests import CHAT, MODEL, SCHEMA

SERVER = "a server that does nothing else"
LISTS = ("/api/tags", "/api/ps", "/v1/models")
SHAPE = LLAMA_3_2_1B | {
    "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 4, "head_dim": 64, "vocab_size": 128_256,
}  # fmt: skip
BESIDE = """
import asyncio
from aiohttp import web
async def main():
    app = web.Application()
    async def handle(request): return web.json_response({"models": []})
    app.router.add_get("/", handle)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    print(f"http://127.0.0.1:{runner.addresses[0][1]}/", flush=True)
    await asyncio.Event().wait()
asyncio.run(main())
"""
TURNS = 60  # of each list at each device
PAUSE_S = 0.02  # between two
WARM_S = 5.0  # until all is under way
LARGE_CHARS = 6 << 20

Asking = Callable[[aiohttp.ClientSession], Coroutine[Any, Any, object]]


async def first_byte_ms(session: aiohttp.ClientSession, url: str) -> float:
    since = time.perf_counter()
    async with session.get(url) as response:
        await response.content.readany()
        assert response.status == 200
    return 1000 * (time.perf_counter() - since)


async def by_turns(places: Mapping[str, Sequence[str]], turns: int) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {name: [] for name in places}
    async with clients() as session:
        for _ in range(turns):
            for name, urls in places.items():
                for url in urls:
                    found[name].append(await first_byte_ms(session, url))
                    await asyncio.sleep(PAUSE_S)
    return found


@contextlib.asynccontextmanager
async def beside() -> AsyncIterator[str]:
    """Where a process of its own answers a small object."""
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", BESIDE, stdout=asyncio.subprocess.PIPE)
    assert process.stdout is not None
    try:
        yield (await process.stdout.readline()).decode().strip()
    finally:
        process.terminate()
        await process.wait()


def loads(devices: Sequence[Device], model: Path) -> list[Asking]:
    """Each is done over and over until the end."""
    urls = [device.url for device in devices]

    def chat(url: str, text: str, **more: Any) -> Asking:
        asked = {"model": MODEL, "messages": [{"role": "user", "content": text}], "max_tokens": 100, **more}

        async def ask(session: aiohttp.ClientSession) -> None:
            async with session.post(url + CHAT, json=asked) as response:
                await response.read()

        return ask

    def post(url: str, path: str, **body: Any) -> Asking:
        async def ask(session: aiohttp.ClientSession) -> None:
            async with session.post(url + path, json=body, headers={"X-PeerLLM": "bench"}) as response:
                await response.read()

        return ask

    async def another_model(session: aiohttp.ClientSession) -> None:
        await post(urls[0], "/peerllm/v1/run", model=str(model))(session)
        await post(urls[0], "/api/generate", model=str(model), prompt="Hello", options={"num_predict": 2})(session)
        await post(urls[0], "/peerllm/v1/stop", model=str(model))(session)

    form = {"type": "json_schema", "json_schema": {"name": "room", "schema": SCHEMA}}
    return [
        *(chat(url, "Tell me a story.", stream=True) for url in urls for _ in range(SLOTS)),
        *(chat(url, "word " * (LARGE_CHARS // 5)) for url in urls),  # too long: read, and then encoded or refused
        *(chat(url, "word " * 150) for url in urls),
        *(chat(url, "Is it warm?", response_format=form) for url in urls),
        *(post(url, "/v1/embeddings", model=MODEL, input=["a small house"] * 16) for url in urls),
        post(urls[0], "/peerllm/v1/plan", model=str(model)),
        another_model,
    ]


def large_vocabulary(directory: Path) -> Path:
    """A model as small as it can be with as many tokens as models have nowadays."""
    model = write_llama(directory, SHAPE)
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    vocabulary, last = tokenizer["model"]["vocab"], int(str(SHAPE["vocab_size"]))
    known = {*vocabulary.values(), *(one["id"] for one in tokenizer["added_tokens"])}
    vocabulary |= {f"token{number}": number for number in range(last) if number not in known}
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    return model


async def measured(devices: Sequence[Device], model: Path, turns: int) -> dict[str, dict[str, list[float]]]:
    async with beside() as server, clients() as session:
        places = {path: [device.url + path for device in devices] for path in LISTS}
        places[SERVER] = [server]
        alone, over = await by_turns(places, turns), asyncio.Event()

        async def on(ask: Asking) -> None:
            while not over.is_set():
                await ask(session)

        doing = [asyncio.create_task(on(ask)) for ask in loads(devices, model)]
        await asyncio.sleep(WARM_S)
        busy = await by_turns(places, turns)
        over.set()
        for task in doing:
            task.cancel()
        ended = await asyncio.gather(*doing, return_exceptions=True)
        for error in ended:
            if isinstance(error, Exception):
                raise error
    return {"alone": alone, "busy": busy}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=TURNS)
    parser.add_argument("--watch", action="store_true", help="tell what the loops computed longest; slows them down")
    args = parser.parse_args(argv)
    names = NAMES[:3]
    with tempfile.TemporaryDirectory(prefix="peerllm-bench-") as directory:
        place = Path(directory)
        model, files = large_vocabulary(place / "model"), {name: place / f"{name}.jsonl" for name in names}
        prefixes = {name: (sys.executable, "-m", "tests.loop_watch", str(file)) for name, file in files.items()}
        with household(place, names, prefixes=prefixes if args.watch else None) as devices:
            devices[0].cli("run", MODEL, "--slots", str(SLOTS), "--context", "1024")
            began = time.time()
            for when, times in asyncio.run(measured(devices, model, args.turns)).items():
                for path, each in times.items():
                    ms = sorted(each)
                    figures = {"median_ms": statistics.median(ms), "p95_ms": ms[len(ms) * 95 // 100], "most_ms": ms[-1]}
                    rounded = {name: round(figure, 1) for name, figure in figures.items()}
                    print(json.dumps({"when": when, "of": path, **rounded}), flush=True)
            for name, file in files.items():
                for stand in longest(file, began) if args.watch else ():
                    print(json.dumps({"device": name, **stand}), flush=True)


if __name__ == "__main__":
    main()
