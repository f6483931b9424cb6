"""Layer times: made-up shards of every kind of state, what of a pass counts, and when timing gives way to work."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from peerllm.engine.backends import Backends
from peerllm.engine.graph.config_values import UnfitError
from peerllm.engine.graph.describe import describe
from peerllm.engine.graph.graph_inspect import block_kinds
from peerllm.engine.measure import layer_times
from peerllm.engine.measure.layer_times import STEPS, net, time_layers
from peerllm.engine.measure.outline import CHUNK, CONTEXT, Mockup, Sizes, firsts
from peerllm.engine.messages import FURTHER_TOKENS, Failed, LayersTimed, TimeLayers, attention
from peerllm.engine.model.assembly import made_up
from peerllm.engine.model.torch_inspect import inspect_model
from peerllm.engine.model.torch_mockup import TorchOutline
from peerllm.engine.model.torch_shard import TorchShard
from peerllm.engine.sampler import SeededSampler
from peerllm.errors import BadInputError, EngineError, ModelError, RefusedError, UnavailableError
from peerllm.transport.frames.token_run import TokenRun
from peerllm.types import WorkingSpace
from tests.engine.architectures import COMMON, FAMILIES
from tests.engine.fakes import DEPLOYMENT, FakeBackend, engine, stage
from tests.engine.tiny import make_llama

PLENTY = 1 << 30
STATES = ("Llama", "GPT-2", "Gemma 2", "Mixtral", "Qwen3-Next", "Bamba", "Falcon-H1", "Nemotron-H", "LFM2-MoE",
          "Llama 4 (text)", "MiniCPM3", "Falcon (ALiBi)")  # fmt: skip


@pytest.fixture(autouse=True)
def brief(monkeypatch: pytest.MonkeyPatch, calm: None) -> None:
    monkeypatch.setattr(layer_times, "RUNS", 2)


def config(name: str) -> str:
    from transformers import AutoConfig

    family = next(family for family in FAMILIES if family.name == name)
    values = {key: value for key, value in COMMON.items() if key not in family.without}
    text: str = AutoConfig.for_model(family.model_type, **{**values, **family.config}).to_json_string()
    return text


def timed(text: str, limit: int = PLENTY, dtype: str = "float32") -> LayersTimed:
    message = TimeLayers(7, text, dtype, limit)
    return time_layers(message, TorchOutline(message), SeededSampler(), lambda: None)


@pytest.fixture
def llama(tmp_path: Path) -> tuple[str, tuple[str, ...]]:
    """A model's configuration text, and the kinds of layer that inspecting its files finds."""
    inspection = inspect_model(make_llama(tmp_path / "model", layers=8, hidden=64))
    return inspection.config, tuple(dict.fromkeys(layer.kind for layer in inspection.profile.layers))


# ---- what is timed ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", STATES)
def test_every_kind_of_layer_is_timed(name: str) -> None:
    """By whatever would compute it. Recurrent ones, which cannot go back to where they were, are among them."""
    text = config(name)
    found = Backends().time_layers(TimeLayers(7, text, "float32", PLENTY), lambda: None)
    try:
        kinds = ["embedding", *block_kinds(describe(json.loads(text))), "head"]
    except UnfitError:
        kinds = list(TorchOutline(TimeLayers(1, text, "float32", PLENTY)).kinds)
    assert not found.skipped and found.request == 7
    kinds = list(dict.fromkeys(kinds))
    blocks = kinds[1:-1]
    assert list(found.layer_ms) == ["pass", *kinds, *(attention(kind) for kind in blocks)]
    counts = {kind: [count for count, _ in points] for kind, points in found.layer_ms.items()}
    assert counts["pass"] == counts["embedding"] == [1] and counts["head"] == [1, 4, 16]
    assert all(counts[kind] == [1, 4, 16] for kind in blocks), "its context holds 64: no chunk"
    assert all(counts[attention(kind)] == [1] for kind in blocks)
    assert all(ms > 0 for points in found.layer_ms.values() for _, ms in points)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_kinds_are_those_that_the_files_have(llama: tuple[str, tuple[str, ...]], dtype: str) -> None:
    text, kinds = llama
    assert tuple(timed(text, dtype=dtype).layer_ms) == ("pass", *kinds, "attention:block")


@pytest.mark.parametrize("name", ["Llama", "Qwen3-Next"])
def test_steps_begin_a_sequence_or_stand_behind_two_chunks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of layers that cannot go back to where they were, too."""
    seen: list[tuple[int, list[TokenRun]]] = []
    forward = TorchShard.forward

    def watched(shard: TorchShard, inputs: torch.Tensor, runs: list[TokenRun]) -> torch.Tensor:
        seen.append((shard.first_layer, list(runs)))
        return forward(shard, inputs, runs)

    monkeypatch.setattr(TorchShard, "forward", watched)
    found = timed(json.dumps(json.loads(config(name)) | {"max_position_embeddings": 512}))
    assert not found.skipped
    head = max(first for first, _ in seen)
    blocks = [row for first, row in seen if 0 < first < head]
    steps = [row for row in blocks if row[0].slot != 16]
    assert {len(row) for row in steps} == {1, 4, 16}
    assert all(len({each.slot for each in row}) == len(row) for row in steps)
    assert all(each.length == 1 and each.position < 64 for row in steps for each in row)
    prompts = [(row[0].position, row[0].length) for row in blocks if row[0].slot == 16]
    once = [(0, CHUNK), (CHUNK, CHUNK), *((2 * CHUNK + number, 1) for number in range(STEPS))]
    assert prompts == once * (len(prompts) // len(once))
    heads = [row for first, row in seen if first == head]
    assert any(each.sample for row in heads for each in row)
    assert all(each.length == 1 for row in heads for each in row)
    counts = {kind: [count for count, _ in points] for kind, points in found.layer_ms.items()}
    assert counts["embedding"] == [1, CHUNK] and counts["head"] == [1, 4, 16]
    (block, *_) = (kind for kind in counts if kind.startswith("block"))
    assert counts[block] == [1, 4, 16, CHUNK] and counts[attention(block)] == [1, CHUNK]


def test_the_fewest_tokens_and_the_most_are_timed_whatever_time_is_left(
    llama: tuple[str, tuple[str, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between them the planner draws a line; one point alone would say that a prompt costs no more than a token."""
    monkeypatch.setattr(layer_times, "LIMIT_S", 0.0)
    found = timed(llama[0])
    counts = {kind: [count for count, _ in points] for kind, points in found.layer_ms.items()}
    assert counts == {
        "pass": [1], "embedding": [1, 128], "block": [1, 128], "head": [1, 16], "attention:block": [1, 128],
    }  # fmt: skip


def test_made_up_numbers_are_like_a_models() -> None:
    matrix, norm = made_up((700, 512), torch.float16), made_up((512,), torch.float32)
    assert 0.01 < float(matrix.float().std()) < 0.05 and abs(float(matrix.float().mean())) < 0.01
    assert float(norm.min()) > 0.9 and float(norm.max()) < 1.1
    assert len({tuple(row.tolist()) for row in matrix}) == 700, "experts that are alike would all be asked at once"
    assert made_up((3,), torch.int64).tolist() == [0, 0, 0]


# ---- memory ----------------------------------------------------------------------------------------------------------


def test_what_it_takes_is_within_the_limit_and_said_before(llama: tuple[str, tuple[str, ...]]) -> None:
    least = TorchOutline(TimeLayers(1, llama[0], "float32", 0))
    with pytest.raises(RefusedError, match=r"block: one layer takes \d+ bytes to time, 0 are free"):
        least.plan("block")
    seen, smallest = set(), least.nbytes(Mockup("block", 1, 1, CONTEXT))
    for limit in (smallest - 1, smallest, *range(smallest, smallest + 12_000_000, 400_000)):
        model = TorchOutline(TimeLayers(1, llama[0], "float32", limit))
        try:
            chosen = model.plan("block")
        except RefusedError:
            assert limit < smallest
            continue
        assert model.nbytes(chosen) <= limit
        shard = model.build(chosen)
        assert shard.weight_bytes + shard.kv_bytes < model.nbytes(chosen)
        shard.close()
        seen.add(chosen.sequences)
    assert seen == {1, 4, 16}


def test_experts_that_stay_as_they_are_count_once() -> None:
    """Only what is packed is there twice while it is packed."""
    text = json.dumps(json.loads(config("Mixtral")) | {"hidden_size": 512, "intermediate_size": 2048})
    plain, rounded = (TorchOutline(TimeLayers(1, text, "bfloat16", PLENTY, quantize=how)) for how in ("", "int4"))
    block = Mockup("block", 1, 1, CONTEXT)
    assert rounded.nbytes(block) < 1.2 * plain.nbytes(block)


def test_a_layer_without_room_is_left_out_and_the_rest_is_timed(llama: tuple[str, tuple[str, ...]]) -> None:
    model = TorchOutline(TimeLayers(1, llama[0], "float32", PLENTY))
    needs = {kind: model.nbytes(Mockup(kind, model.firsts[kind], 1, CONTEXT)) for kind in model.kinds}
    found = timed(llama[0], limit=max(needs.values()) - 1)
    (largest,) = [kind for kind, nbytes in needs.items() if nbytes == max(needs.values())]
    assert set(found.skipped) == {largest} and str(needs[largest]) in found.skipped[largest]
    assert set(found.layer_ms) == {"pass", *model.kinds} - {largest}
    assert set(timed(llama[0], limit=0).skipped) == set(model.kinds)


def test_the_first_layer_of_a_kind_is_timed() -> None:
    assert firsts(["b", "a", "a", "b"]) == {"embedding": 0, "b": 1, "a": 2, "head": 5}
    found = TorchOutline(TimeLayers(1, config("Gemma 2"), "float32", PLENTY))
    assert [found.plan(kind).layer for kind in found.kinds] == [0, 1, 2, 5]


@pytest.mark.parametrize(("text", "dtype", "kind"), [("{}", "float32", ModelError), ("{}", "int8", BadInputError)])
def test_what_cannot_be_timed_is_refused(text: str, dtype: str, kind: type[Exception]) -> None:
    with pytest.raises(kind):
        timed(text, dtype=dtype)


# ---- what of the runs counts -----------------------------------------------------------------------------------------


def test_a_pass_is_told_apart_from_its_layers() -> None:
    passes = {"embedding": {1: 0.5, 2: 0.75}, "block": {1: 1.0, 2: 1.5}, "head": {1: 0.25}}
    found = net(passes, {"block": {1: 0.125, 2: -1.0}})
    assert found == {
        "pass": ((1, 0.5),),
        "embedding": ((1, layer_times.LEAST_MS), (2, 0.25)),
        "block": ((1, 0.5), (2, 1.0)),
        "head": ((1, layer_times.LEAST_MS),),
        "attention:block": ((1, 0.125), (2, layer_times.LEAST_MS)),
    }
    assert net({"block": {1: 2.0}}, {}) == {"block": ((1, 2.0),)}, "without an embedding none is known"


class Pretended(Sizes):
    """A model whose passes take a millisecond of a clock of their own, one more for each row, and one more for each
    hundred tokens before them."""

    hidden_size = 8

    def __init__(self, rewinds: bool = True, context: int = CONTEXT, limit: int = PLENTY) -> None:
        self.fullest = 0
        self.now, self.rewinds, self.held = 0.0, rewinds, dict.fromkeys(range(17), 0)
        layers = dict.fromkeys(range(8), 1000)
        space = WorkingSpace(0, 0, 0, 0, 0, 0)
        super().__init__(firsts(["block"] * 6), 7, 16, context, limit, space, layers, layers)

    def build(self, mockup: Mockup) -> Any:
        self.is_head = mockup.layer == self.head
        return self

    def forward(self, inputs: np.ndarray, runs: list[TokenRun]) -> np.ndarray:
        assert inputs.dtype in (np.int64, np.float32) and len(inputs) == sum(each.length for each in runs)
        assert all(each.position + each.length <= self.context for each in runs)
        for each in runs:
            if not self.rewinds and each.position not in (0, self.held[each.slot]):
                raise EngineError("it only goes on")
            self.held[each.slot] = each.position + each.length
            self.fullest = max(self.fullest, self.held[each.slot])
        before = runs[0].position // 100 if not self.is_head and len(runs) == 1 else 0
        self.now += (1 + len(inputs) + before) / 1e3
        return np.zeros((len(runs) if self.is_head else len(inputs), self.hidden_size), np.float32)

    def close(self) -> None:
        self.held = dict.fromkeys(self.held, 0)

    def timed(self, monkeypatch: pytest.MonkeyPatch) -> LayersTimed:
        monkeypatch.setattr(layer_times, "time", SimpleNamespace(perf_counter=lambda: self.now))
        message = TimeLayers(7, "", "", 0)
        return time_layers(message, self, lambda logits, draws: [0] * len(draws), lambda: None, lambda: self.now)


@pytest.mark.parametrize("rewinds", [True, False])
def test_what_passes_take_is_told_by_layer(monkeypatch: pytest.MonkeyPatch, rewinds: bool) -> None:
    found = Pretended(rewinds).timed(monkeypatch).layer_ms
    assert found["pass"] == ((1, pytest.approx(2.0)),)
    assert dict(found["block"]) == pytest.approx({1: 1e-4, 4: 3.0, 16: 15.0, 128: 127.0}, abs=1e-4)
    further = {1: 2.0 * FURTHER_TOKENS / 256, 128: 1.0 * FURTHER_TOKENS / 128}
    assert dict(found["attention:block"]) == pytest.approx(further, abs=1e-3)
    assert dict(found["head"]) == pytest.approx({1: 1e-4, 4: 3.0, 16: 15.0}, abs=1e-4)


@pytest.mark.parametrize(
    ("context", "counts", "further"),
    [
        (CHUNK - 1, [1, 4, 16], [1]),
        (CHUNK, [1, 4, 16, CHUNK], [1]),
        (2 * CHUNK + STEPS - 1, [1, 4, 16, CHUNK], [1]),
        (2 * CHUNK + STEPS, [1, 4, 16, CHUNK], [1, CHUNK]),
    ],
)
def test_a_short_context_has_no_room_for_all(
    monkeypatch: pytest.MonkeyPatch, context: int, counts: list[int], further: list[int]
) -> None:
    found = Pretended(context=context).timed(monkeypatch).layer_ms
    assert [n for n, _ in found["block"]] == counts and [n for n, _ in found["attention:block"]] == further


def test_a_sequence_whose_room_is_full_begins_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer_times, "RUNS", 60)
    monkeypatch.setattr(layer_times, "RUNS_S", 1e9)
    model = Pretended(rewinds=False, context=100)  # the first sequence takes part in three steps a turn
    assert not model.timed(monkeypatch).skipped and model.fullest == 100


def test_passes_that_are_disturbed_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    model, forward, passes = Pretended(), Pretended.forward, [0]

    def disturbed(shard: Pretended, inputs: np.ndarray, runs: list[TokenRun]) -> np.ndarray:
        if len(inputs) == 1 and inputs.dtype == np.int64:
            passes[0] += 1
            shard.now += 0.5 * (passes[0] % 2)
        return forward(shard, inputs, runs)

    monkeypatch.setattr(layer_times, "RUNS", 8)
    monkeypatch.setattr(layer_times, "RUNS_S", 1e9)
    monkeypatch.setattr(Pretended, "forward", disturbed)
    assert model.timed(monkeypatch).layer_ms["pass"] == ((1, pytest.approx(2.0)),)


class Others:
    """What stands for a stage's other layers: its size, and how often it was read."""

    def __init__(self) -> None:
        self.numbers, self.reads = 0, 0

    def __call__(self, numbers: int) -> Others:
        self.numbers = numbers
        return self

    def max(self) -> None:
        self.reads += 1


@pytest.mark.parametrize(("spare", "nbytes"), [(PLENTY, 8000), (4000, 4000), (0, 1000)])
def test_steps_find_in_the_caches_what_other_layers_leave(
    monkeypatch: pytest.MonkeyPatch, spare: int, nbytes: int
) -> None:
    """As much as the model has, as caches hold, and as there is room for; but as much as measuring takes."""
    model, others, steps = Pretended(context=2 * CHUNK), Others(), [0]  # no room for steps behind a prompt
    model.limit_bytes = spare + max(model.nbytes(model.plan(kind)) for kind in model.kinds)
    step = layer_times.Work._step

    def counted(work: layer_times.Work, count: int) -> float:
        steps[0] += 1
        return step(work, count)

    monkeypatch.setattr(layer_times.np, "ones", others)
    monkeypatch.setattr(layer_times, "WEIGHT_BYTES", 1000)
    monkeypatch.setattr(layer_times.Work, "_step", counted)
    model.timed(monkeypatch)
    assert others.numbers == nbytes // 8 + 1
    assert others.reads == steps[0] > 0


def test_timing_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer_times, "RUNS", 10**9)
    monkeypatch.setattr(layer_times, "RUNS_S", 1e9)
    model = Pretended()
    found = model.timed(monkeypatch)
    assert model.now < layer_times.LIMIT_S + 1.0
    assert all(points[0][0] == 1 for points in found.layer_ms.values())


# ---- giving way ------------------------------------------------------------------------------------------------------


def test_it_ends_between_passes_and_frees_the_layer(
    llama: tuple[str, tuple[str, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    left, closed = [40], []
    close = TorchShard.close
    monkeypatch.setattr(TorchShard, "close", lambda shard: (closed.append(shard), close(shard)))

    def check() -> None:
        left[0] -= 1
        if left[0] < 0:
            raise UnavailableError("an answer is being written here")

    message = TimeLayers(1, llama[0], "float32", PLENTY)
    with pytest.raises(UnavailableError):
        time_layers(message, TorchOutline(message), SeededSampler(), check)
    assert left == [-1] and closed and closed[-1]._model is None


class Passes:
    """A timing under way: `begun`, then one check whenever `go` is set, until it ends."""

    def __init__(self, backend: FakeBackend) -> None:
        self.begun, self.go = threading.Event(), threading.Event()
        backend.between_passes = self.work

    def work(self, check: Callable[[], None]) -> None:
        check()
        self.begun.set()
        assert self.go.wait(20)
        check()


async def test_an_answer_ends_the_timing(tmp_path: Path) -> None:
    backend = FakeBackend()
    passes = Passes(backend)
    async with engine(tmp_path, backend) as line:
        await line.ask(stage(line.request()))
        request = line.request()
        line.channel.send(TimeLayers(request, "{}", "float32", 1))
        assert await _soon(passes.begun)
        line.submit(1, [1, 2], 2)
        await line.finished(1)
        passes.go.set()
        answer = await line.until(lambda m: getattr(m, "request", None) == request)
        assert isinstance(answer, Failed) and answer.kind == "UnavailableError" and "answer" in answer.reason
        passes.go.set()
        again = await line.ask(TimeLayers(line.request(), "{}", "float32", 1))
        assert isinstance(again, LayersTimed), "quiet again"


async def test_a_closing_engine_does_not_wait_for_it(tmp_path: Path) -> None:
    backend = FakeBackend()
    begun, ended = threading.Event(), []

    def passes(check: Callable[[], None]) -> None:
        try:
            for _ in range(2000):
                check()
                begun.set()
                threading.Event().wait(0.01)
        except UnavailableError as error:
            ended.append(error)
            raise

    backend.between_passes = passes
    async with engine(tmp_path, backend) as line:
        line.channel.send(TimeLayers(line.request(), "{}", "float32", 1))
        assert await _soon(begun)
    assert "stopping" in str(ended[0])


async def test_nothing_is_timed_while_a_model_is_loaded(tmp_path: Path) -> None:
    backend = FakeBackend()
    loading, gate = threading.Event(), threading.Event()

    def before_load(spec: object, progress: object) -> None:
        loading.set()
        assert gate.wait(20)

    backend.before_load = before_load
    async with engine(tmp_path, backend) as line:
        load = stage(line.request())
        line.channel.send(load)
        assert await _soon(loading)
        answer = await line.ask(TimeLayers(line.request(), "{}", "float32", 1))
        assert isinstance(answer, Failed) and answer.kind == "UnavailableError" and "loaded" in answer.reason
        gate.set()
        await line.until(lambda m: getattr(m, "request", None) == load.request)
        assert load.deployment == DEPLOYMENT
        assert isinstance(await line.ask(TimeLayers(line.request(), "{}", "float32", 1)), LayersTimed)


async def _soon(event: threading.Event) -> bool:
    return await asyncio.to_thread(event.wait, 20)
