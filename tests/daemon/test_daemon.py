"""Three whole daemons on loopback, engines as processes of their own: one model, exact, through every change."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
from dataclasses import replace

import aiohttp
import pytest
import pytest_asyncio
import torch
import transformers

from peerllm.api.server import ApiServer
from peerllm.builtin import MODEL_DIR
from peerllm.daemon.control_messages import Trace
from peerllm.daemon.daemon import Daemon
from peerllm.daemon.decide import owner_limits
from peerllm.daemon.facade import GenerateRequest, RunOptions
from peerllm.daemon.settings import Settings
from peerllm.daemon.weights import hub_header
from peerllm.engine.weights.checkpoint import read_tensors
from peerllm.errors import (
    BadInputError,
    EngineError,
    InfeasibleError,
    NotFoundError,
    PeerLLMError,
    RefusedError,
    UnavailableError,
)
from peerllm.types import Sampling
from tests import traces
from tests.daemon.weights.hub_server import hub_server

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(240)]
LENT = 17_000_000  # bytes: too little for any of the models below
BOUND_S = 60
LAPTOP, MINI, JETSON = 0, 1, 2
ROOM = {"slots": 2, "context": 64}


def settings(folder, name):
    return Settings(folder / name, name, port=0, memory_bytes=LENT, threads=1, hosts=("127.0.0.1",), mdns=False)


async def until(daemons, condition):
    """Wait for a change of any daemon that makes `condition` true."""

    async def watch(daemon, seen):
        async for _ in daemon.changed():
            seen.set()

    seen = asyncio.Event()
    watchers = [asyncio.create_task(watch(daemon, seen)) for daemon in daemons]
    try:
        async with asyncio.timeout(BOUND_S):
            while not condition():
                await seen.wait()
                seen.clear()
    finally:
        for watcher in watchers:
            watcher.cancel()
        await asyncio.gather(*watchers, return_exceptions=True)


def met(daemons):
    """The first knows all others, and they it."""
    first = daemons[0].home.candidates()
    return len(first) == len(daemons) and all(len(d.home.candidates()) >= 2 for d in daemons)


def running(daemon):
    """Its models but those that only lie on a disk."""
    return [one for one in daemon.models() if one.deployment]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("household")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def daemons(folder):
    made = [Daemon(settings(folder, name)) for name in ("laptop", "mini-pc", "jetson")]
    try:
        await asyncio.gather(*(daemon.start() for daemon in made))
        for daemon in made[1:]:
            code, port = await made[0].invite()
            assert await daemon.join(code, ("127.0.0.1", port)) == "laptop"
        await until(made, lambda: met(made))
        yield made
    finally:
        await asyncio.gather(*(daemon.close() for daemon in made))


@pytest.fixture(scope="module")
def llama(folder):
    """A random Llama that needs three devices, and what it says by itself."""
    torch.set_num_threads(1)
    torch.manual_seed(1)
    config = transformers.LlamaConfig(
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=12,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=97,
        max_position_embeddings=128,
        initializer_range=0.25,
        eos_token_id=96,
        tie_word_embeddings=False,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    model.save_pretrained(folder / "llama")
    return str(folder / "llama"), model


async def expected(model, prompt, count):
    """What the whole model says by itself; in a thread, for the daemons live on this loop."""

    def work():
        with torch.inference_mode():
            row = torch.tensor([prompt])
            ids = model.generate(row, attention_mask=torch.ones_like(row), max_new_tokens=count, do_sample=False)
        return ids[0, len(prompt) :].tolist()

    return await asyncio.to_thread(work)


async def answer(daemon, model, prompt, count):
    served = next(one for one in daemon.models() if one.model == model)
    ids, finish = [], None
    async with asyncio.timeout(BOUND_S):
        async for chunk in daemon.generate(GenerateRequest(served.deployment, prompt, count, Sampling())):
            ids += chunk.ids
            finish = chunk.finish
    return ids + ([96] if finish == "stop" and model not in ("builtin", "maker/small") else [])


def quiet(_):
    pass


def nothing_left(daemons):
    return all(not daemon.ledger.promised_bytes for daemon in daemons)


def deployment(daemon, model):
    return next((one for one in daemon.status()["deployments"] if one["model"] == model), None)


async def test_the_builtin_model_over_three_says_what_one_device_says(daemons):
    laptop = daemons[LAPTOP]
    told = []
    await laptop.run(RunOptions("builtin"), told.append)
    assert told[-1].state == "serving" and set(told[-1].devices) == {"laptop", "mini-pc", "jetson"}
    load = transformers.AutoModelForCausalLM.from_pretrained
    model = await asyncio.to_thread(load, MODEL_DIR, dtype=torch.float32)
    prompts = [[1, 50, 60, 70], list(range(100, 400)), [7]]
    answers = await asyncio.gather(*(answer(laptop, "builtin", prompt, 24) for prompt in prompts))
    for prompt, ids in zip(prompts, answers, strict=True):
        wanted = await expected(model, prompt, 24)
        assert ids == wanted[: len(ids)] and (len(ids) == 24 or wanted[len(ids)] == model.config.eos_token_id)
    await until(daemons, lambda: all((deployment(d, "builtin") or {}).get("measured") for d in daemons))
    profiles = deployment(laptop, "builtin")["profiles"]
    assert set(profiles) == {"laptop", "mini-pc", "jetson"}, "one machine; too small for all of it"
    for profile in profiles.values():
        shared = sum(daemon.hello().threads for daemon in daemons) / (os.cpu_count() or 1)
        assert profile["source"] == "measured" and profile["contention"] == pytest.approx(max(1.0, shared), abs=1e-3)
        times = profile["alone"]
        assert set(times) == {"pass", "embedding", "block", "head", "attention:block"}
        assert {"1", "4", "128"} <= set(times["block"])
    for daemon in daemons:
        seen = deployment(daemon, "builtin")
        assert (seen["state"], seen["epoch"], seen["coordinator"]) == ("serving", 1, "laptop")
        stages = seen["plan"]["stages"]
        assert {stage["device"] for stage in stages} == {"laptop", "mini-pc", "jetson"}
        assert stages[0]["device"] == "laptop" and stages[0]["first_layer"] == 0 and stages[-1]["last_layer"] == 13
        assert seen["measured"]["tokens_per_second"] > 0 and seen["plan"]["predicted"]["tokens_per_second"] > 0
        entries = {entry["name"]: entry for entry in daemon.status()["devices"]}
        assert entries["laptop"]["lent_bytes"] == LENT and entries["laptop"]["state"] == "online"
    for daemon in daemons:
        assert 0 < daemon.ledger.promised_bytes <= LENT
    await laptop.run(RunOptions("builtin"), quiet)  # again: nothing happens
    assert deployment(laptop, "builtin")["epoch"] == 1
    await laptop.stop("builtin")
    await until(daemons, lambda: nothing_left(daemons))


@contextlib.asynccontextmanager
async def apis(daemons):
    """A client of each daemon's API."""
    async with contextlib.AsyncExitStack() as stack:
        sessions = []
        for daemon in daemons:
            server = ApiServer(daemon, "127.0.0.1", 0, daemon.settings.data_dir, in_process=True)
            await server.start()
            stack.push_async_callback(server.close)
            sessions.append(await stack.enter_async_context(aiohttp.ClientSession(server.url)))
        yield sessions


async def test_what_several_are_asked_for_at_once_is_started_once_and_all_embed_with_it(daemons, monkeypatch):
    async def ask(session, path, **body):
        async with asyncio.timeout(BOUND_S), session.post(path, json={"model": "builtin", **body}) as response:
            assert response.status == 200, await response.text()
            return await response.json()

    text = "The kettle sings."
    await until(daemons, lambda: not any(map(running, daemons)))  # all have heard that the last model was stopped
    async with apis(daemons) as sessions:
        chat = {"messages": [{"role": "user", "content": text}], "max_tokens": 8, "temperature": 0}
        told, all_begun = {daemon: daemon.network.broadcast for daemon in daemons}, asyncio.Event()
        for daemon in daemons:
            daemon.network.broadcast = lambda view: None  # nobody hears yet what the others start

            @contextlib.asynccontextmanager
            async def held_up(*what, was=daemon.home.looked_up):
                await all_begun.wait()  # before one has promises that leave no memory for another
                async with was(*what) as found:
                    yield found

            monkeypatch.setattr(daemon.home, "looked_up", held_up)
        asking = [asyncio.create_task(ask(one, "/v1/chat/completions", **chat)) for one in sessions]
        await until(daemons, lambda: all(daemon.coordinator.views() for daemon in daemons))
        for daemon in daemons:
            daemon.network.broadcast = told[daemon]
            told[daemon](daemon._view())
        all_begun.set()
        answers = await asyncio.gather(*asking)
        assert len({one["choices"][0]["message"]["content"] for one in answers}) == 1
        await until(daemons, lambda: all(len(running(daemon)) == 1 for daemon in daemons))
        assert {(one.name, one.state) for daemon in daemons for one in running(daemon)} == {("builtin", "serving")}
        made = [await ask(one, "/v1/embeddings", input=[text, "x"], dimensions=100) for one in sessions]
        assert made[1:] == made[:-1]
        older = [await ask(one, "/api/embed", input=text) for one in sessions]
        assert older[0]["embeddings"] == older[1]["embeddings"] == older[2]["embeddings"]
        await ask(sessions[JETSON], "/api/generate", keep_alive=0)
    tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL_DIR)
    model = transformers.AutoModel.from_pretrained(MODEL_DIR, dtype=torch.float32)
    with torch.inference_mode():
        states = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
    mean = states.mean(0)
    found = torch.tensor(older[0]["embeddings"][0])
    assert torch.nn.functional.cosine_similarity(found, mean, dim=0) > 0.9999
    cut = torch.tensor(made[0]["data"][0]["embedding"])
    assert torch.allclose(cut, torch.nn.functional.normalize(mean[:100], dim=0), atol=1e-3)
    await until(daemons, lambda: nothing_left(daemons) and not any(map(running, daemons)))


async def test_more_sequences_than_slots_are_queued_and_all_exact(daemons, llama):
    name, model = llama
    laptop = daemons[LAPTOP]
    await laptop.run(RunOptions(name, **ROOM), quiet)
    prompts = [[(7 * i + 3 * j) % 96 for j in range(1 + 5 * i)] for i in range(6)]
    answers = await asyncio.gather(*(answer(laptop, name, prompt, 12) for prompt in prompts))
    for prompt, ids in zip(prompts, answers, strict=True):
        assert ids == await expected(model, prompt, 12)


async def test_a_client_that_leaves_frees_its_slot(daemons, llama):
    name, model = llama
    laptop = daemons[LAPTOP]
    (served,) = running(laptop)
    for _ in range(2 * ROOM["slots"]):
        stream = laptop.generate(GenerateRequest(served.deployment, (1, 2), 60, Sampling()))
        async with asyncio.timeout(BOUND_S):
            await anext(stream)
        await stream.aclose()
    assert await answer(laptop, name, [1, 2], 5) == await expected(model, [1, 2], 5)
    with pytest.raises(BadInputError, match="64"):
        await answer(laptop, name, list(range(64)), 5)


async def test_a_trace_shows_every_device_on_one_clock_and_only_its_coordinator_gets_it(daemons, llama):
    name, model = llama
    laptop, mini, jetson = daemons
    (served,) = running(laptop)
    recording = await laptop.record(name)
    prompts = [[5, 6, 7], [8] * 20]
    answers = await asyncio.gather(*(answer(laptop, name, prompt, 12) for prompt in prompts))
    assert answers == [await expected(model, prompt, 12) for prompt in prompts], "recorded steps are steps"
    for other, asked in ((jetson, laptop), (mini, jetson), (jetson, mini)):
        for want in ("clock", "start", "take"):
            with pytest.raises(RefusedError, match="coordinator"):
                await other.network.ask(asked.identity.device, Trace(served.deployment, want), BOUND_S)
    with pytest.raises(NotFoundError):
        await jetson.record(name)
    trace = json.loads(await laptop.recorded(name, recording))
    names = [daemon.settings.name for daemon in daemons]
    traces.check(trace, names)
    assert not trace["otherData"]["missing"]
    stages = deployment(laptop, name)["plan"]["stages"]
    for place, stage in enumerate(stages):
        mine = [one for one in traces.passes(trace, stage["device"]) if one["args"]["stage"] == place]
        tokens = sum(one["args"]["tokens"] for one in mine)
        assert tokens == sum(len(prompt) + 12 - 1 for prompt in prompts), f"stage {place} saw each token once"
        assert {sequence for one in mine for sequence in one["args"]["sequences"]} == {
            sequence for one in traces.passes(trace, "laptop") for sequence in one["args"]["sequences"]
        }
    arrows = [one for one in trace["traceEvents"] if one["ph"] in "st"]
    hops = sum(a["device"] != b["device"] for a, b in zip(stages, [*stages[1:], stages[0]], strict=True))
    assert len(arrows) >= 2 * 12 * hops, "a frame for each step and hop"
    with pytest.raises(RefusedError):
        await laptop.recorded(name, recording)


async def test_an_engine_that_dies_is_planned_around_by_itself(daemons, llama):
    name, model = llama
    laptop, jetson = daemons[LAPTOP], daemons[JETSON]
    epoch = deployment(laptop, name)["epoch"]
    (served,) = running(laptop)
    stream = laptop.generate(GenerateRequest(served.deployment, (5, 6), 62, Sampling()))
    async with asyncio.timeout(BOUND_S):
        seen = list((await anext(stream)).ids)
    os.kill(jetson.host.pid, signal.SIGKILL)
    finish = ""
    try:
        async with asyncio.timeout(BOUND_S):
            async for chunk in stream:
                seen += chunk.ids
                finish = chunk.finish
    except EngineError as error:
        finish = str(error)
    assert finish, "a silent stop"
    wanted = await expected(model, [5, 6], 62)
    assert seen == wanted[: len(seen)]
    await until(
        daemons, lambda: deployment(laptop, name)["state"] == "serving" and deployment(laptop, name)["epoch"] > epoch
    )
    assert await answer(laptop, name, [5, 6], 8) == wanted[:8]
    assert all(daemon.ledger.promised_bytes <= LENT for daemon in daemons)


async def test_a_device_that_leaves_and_returns(daemons, llama, folder):
    name, model = llama
    laptop = daemons[LAPTOP]
    await daemons[MINI].close()
    await until(
        [laptop],
        lambda: deployment(laptop, name)["state"] == "waiting" and "missing" in deployment(laptop, name)["reason"],
    )
    assert not nothing_left([laptop, daemons[JETSON]]), "what they have stays loaded for a while"
    (served,) = running(laptop)
    assert served.state == "waiting"
    waiting = asyncio.create_task(answer(laptop, name, [9, 9], 6))  # patient clients are served when it is back
    again = daemons[MINI] = Daemon(settings(folder, "mini-pc"))
    await again.start()
    await until([laptop], lambda: deployment(laptop, name)["state"] == "serving")
    try:
        assert await waiting == await expected(model, [9, 9], 6)
    except UnavailableError:  # a slow machine: its patience was over first, which was said
        pass
    assert await answer(laptop, name, [9, 9], 6) == await expected(model, [9, 9], 6)


async def test_a_device_that_is_paused_is_done_without_and_used_again_when_it_is_resumed(daemons, llama, monkeypatch):
    monkeypatch.setattr(owner_limits, "FAREWELL_S", 0.3)
    name, model = llama
    laptop, mini = daemons[LAPTOP], daemons[MINI]
    told = await mini.set_limits({"paused": True})
    assert told["leaving"] == "paused by its owner" and mini.ledger.promised_bytes  # until others had time to take over
    await until(daemons, lambda: nothing_left([mini]) and deployment(laptop, name)["state"] == "waiting")
    seen = {entry["name"]: entry for entry in laptop.status()["devices"]}
    assert (seen["mini-pc"]["state"], seen["mini-pc"]["leaving"]) == ("online", "paused by its owner")
    assert "mini-pc" in deployment(laptop, name)["reason"]
    assert mini.identity.device not in laptop.home.candidates() and mini.identity.device not in mini.home.candidates()
    await mini.set_limits({"paused": False})
    await until(daemons, lambda: deployment(laptop, name)["state"] == "serving")
    assert mini.ledger.promised_bytes and await answer(laptop, name, [9, 9], 6) == await expected(model, [9, 9], 6)


async def test_a_farewell_is_over_when_others_have_nothing_here_any_more_and_answers_are_done(daemons, llama):
    name, _ = llama
    laptop, mini = daemons[LAPTOP], daemons[MINI]
    (served,) = running(laptop)
    leaving = asyncio.create_task(mini.farewell("going down", BOUND_S))
    await until([laptop], lambda: laptop.network.peers()[mini.identity.device].view.leaving == "going down")
    with pytest.raises(UnavailableError, match="mini-pc is going down"):
        mini.generate(GenerateRequest(served.deployment, (1,), 1, Sampling()))
    stream = laptop.generate(GenerateRequest(served.deployment, (1, 2), 20, Sampling()))
    async with asyncio.timeout(BOUND_S):
        await anext(stream)
        own = asyncio.create_task(laptop.farewell("going down", BOUND_S))
        async for _ in stream:
            assert not own.done()
        await own
        laptop.wake()
        await laptop.farewell("going down", BOUND_S)  # nothing is under way: at once
        laptop.wake()
    assert nothing_left([mini]) == leaving.done()
    await laptop.stop(name)
    async with asyncio.timeout(BOUND_S):
        await leaving
    mini.wake()
    await laptop.run(RunOptions(name, **ROOM), quiet)
    assert mini.ledger.promised_bytes


async def test_what_served_is_served_again_after_a_restart(daemons, llama, folder):
    name, model = llama
    await daemons[LAPTOP].close()
    await until(daemons[1:], lambda: nothing_left(daemons[1:]))
    laptop = daemons[LAPTOP] = Daemon(settings(folder, "laptop"))
    await laptop.start()
    await until(daemons, lambda: (deployment(laptop, name) or {}).get("state") == "serving")
    assert await answer(laptop, name, [4], 6) == await expected(model, [4], 6)
    await laptop.stop(name)
    await until(daemons, lambda: nothing_left(daemons))


def kept(daemon):
    """The cached tensors of a device, largest first."""
    files = [one for one in (daemon.settings.data_dir / "weights").iterdir() if len(one.name) == 64]
    return sorted(files, key=lambda one: -one.stat().st_size)


async def test_of_a_hub_model_each_device_fetches_its_own_and_damage_on_a_disk_is_healed(
    daemons, folder, monkeypatch, caplog
):
    """Each byte crosses the uplink once, no disk holds the whole model, and 64 changed bytes are found and replaced."""
    laptop = daemons[LAPTOP]
    shutil.copytree(MODEL_DIR, folder / "hub" / "maker" / "small", ignore=shutil.ignore_patterns("*.py", "__*"))
    for daemon in daemons:
        for file in kept(daemon):
            file.unlink()
    with hub_server(folder / "hub", folder / "cache", monkeypatch) as hub:
        await laptop.run(RunOptions("maker/small"), quiet)
        total = sum(tensor.nbytes for tensor in read_tensors(MODEL_DIR).values())
        headers = hub_header.FIRST_SAFETENSORS_BYTES
        assert total <= hub.bodies["model.safetensors"] - headers < 1.2 * total  # a slow machine loses connections
        held = [sum(one.stat().st_size for one in kept(daemon)) for daemon in daemons]
        assert sum(held) >= total and max(held) < total and held[LAPTOP], held
        hurt = max((one for one in daemons if one is not laptop), key=lambda one: len(kept(one)))
        model = await asyncio.to_thread(
            transformers.AutoModelForCausalLM.from_pretrained, MODEL_DIR, dtype=torch.float32
        )
        wanted = await expected(model, [1, 50, 60, 70], 12)
        ids = await answer(laptop, "maker/small", [1, 50, 60, 70], 12)
        assert ids and ids == wanted[: len(ids)]
        await laptop.stop("maker/small")
        await until(daemons, lambda: nothing_left(daemons))
        for file in kept(hurt):
            data = bytearray(file.read_bytes())
            data[: min(64, len(data))] = os.urandom(min(64, len(data)))
            file.write_bytes(data)
        hub.bodies.clear()
        await laptop.run(RunOptions("maker/small"), quiet)
        assert "changed on this disk" in caplog.text or "sent other bytes" in caplog.text, "nobody noticed"
        assert await answer(laptop, "maker/small", [1, 50, 60, 70], 12) == ids
        assert hub.bodies.get("model.safetensors", 0) < total, "more came again than was damaged"
        await laptop.stop("maker/small")
        await until(daemons, lambda: nothing_left(daemons))


async def test_a_model_too_large_says_what_is_missing(daemons, folder):
    config = transformers.LlamaConfig(
        hidden_size=512, intermediate_size=2048, num_hidden_layers=6, num_attention_heads=8, vocab_size=64
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "huge")
    laptop = daemons[LAPTOP]
    with pytest.raises(InfeasibleError, match=r"huge needs .* the household lends 51\.0 MB: \d+\.\d MB are missing"):
        await laptop.run(RunOptions(str(folder / "huge")), quiet)
    assert not laptop.status()["deployments"] and nothing_left(daemons)


async def test_bad_wishes_are_one_clear_line(daemons, folder):
    laptop = daemons[LAPTOP]
    with pytest.raises(NotFoundError):
        await laptop.run(RunOptions("/no/such/model"), quiet)
    with pytest.raises(NotFoundError):
        await laptop.stop("builtin")
    with pytest.raises(NotFoundError):
        await laptop.remove("nobody")
    for name in ("laptop", laptop.identity.device, laptop.identity.device[:8]):
        with pytest.raises(BadInputError, match=f"{name} is this device.*peerllm leave"):
            await laptop.remove(name)
    (folder / "broken").mkdir()
    (folder / "broken" / "config.json").write_text("{")
    with pytest.raises(BadInputError) as caught:
        await laptop.run(RunOptions(str(folder / "broken")), quiet)
    assert "\n" not in str(caught.value)
    second = Daemon(settings(folder, "laptop"))
    with pytest.raises(BadInputError, match="already"):
        await second.start()
    await second.close()


async def test_a_port_in_use_is_said_and_everything_is_closed_again(daemons, folder):
    taken = Daemon(replace(settings(folder, "late"), port=daemons[LAPTOP].network.port))
    with pytest.raises(BadInputError, match="port"):
        await taken.start()
    assert taken.host.state == "stopped"
    free = Daemon(settings(folder, "late"))
    await free.start()  # the data directory is not locked any more
    await free.close()
    await free.close()


async def test_two_sources_at_once_never_lend_the_same_memory_twice(daemons, llama):
    """At every telling of every device: no more promised than lent, no more held than promised."""
    name, _ = llama
    laptop, jetson = daemons[LAPTOP], daemons[JETSON]
    worst, held = [], []

    async def watch(daemon):
        async for _ in daemon.changed():
            before = daemon.ledger.promised_bytes
            engine = await daemon.engine()  # a promise may be made or taken back meanwhile
            worst.append(max(before, daemon.ledger.promised_bytes))
            held.append((engine["weight_bytes"] + engine["kv_bytes"], worst[-1]))

    watchers = [asyncio.create_task(watch(daemon)) for daemon in daemons]
    results = await asyncio.gather(
        laptop.run(RunOptions(name, **ROOM), quiet),
        jetson.run(RunOptions("builtin", slots=2, context=256), quiet),
        return_exceptions=True,
    )
    for watcher in watchers:
        watcher.cancel()
    await asyncio.gather(*watchers, return_exceptions=True)
    assert max(worst) <= LENT
    assert all(taken <= promised for taken, promised in held), held
    assert any(taken for taken, _ in held)
    failures = [result for result in results if isinstance(result, BaseException)]
    for failure in failures:
        assert isinstance(failure, PeerLLMError) and str(failure)
    assert len(failures) < 2
    for daemon, model in ((laptop, name), (jetson, "builtin")):
        found = deployment(daemon, model)
        if found is not None and found["coordinator"] == daemon.settings.name:
            await daemon.stop(model)
    await until(daemons, lambda: nothing_left(daemons))
