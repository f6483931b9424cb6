"""Dry passes while a device waits: no token differs for them, and they end when something comes."""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from tempfile import mkdtemp

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from peerllm.engine import attention, packing, states, warmth
from peerllm.engine.base import Segment
from peerllm.engine.inspect import Inspection, inspect_model
from peerllm.engine.kernels import fused
from peerllm.engine.kernels.dry import ENOUGH, MOST_NUMBERS, Ended, dry, passing
from peerllm.engine.kernels.forms import choose
from peerllm.engine.shard import TorchShard, load_shard
from tests.engine.architectures import FAMILIES, FULL, VOCABULARY, quiet, save, stage, tiny_model
from tests.engine.engines import Deployed, Device, devices, inspect, redeploy

SLOTS, CONTEXT = 3, 40
# Full attention, windows, soft caps, other matrices; fused blocks, matrices one by one.
FUSED, SINGLE = ("int4", "bfloat16"), ("", "bfloat16")
SHARE = [(name, "int8", "float32") for name in ("Llama", "Ministral", "Gemma 2", "StableLM", "Qwen3")]
SHARE += [(name, *how) for name in ("Ministral", "Gemma 2") for how in (FUSED, SINGLE)]
EXAMPLES = 40 if FULL else 6


@lru_cache
def inspected(name: str, quantize: str, dtype: str = "float32") -> Inspection:
    quiet()
    torch.set_num_threads(1)
    family = next(family for family in FAMILIES if family.name == name)
    directory = Path(mkdtemp())
    wide = replace(family, config={**family.config, "intermediate_size": 64})
    save(tiny_model(wide, 1.0, 0), directory)
    return inspect_model(directory, dtype, quantize)


def chain(name: str, quantize: str, dtype: str = "float32", firsts: tuple[int, ...] = (0, 3)) -> list[TorchShard]:
    found = inspected(name, quantize, dtype)
    ends = [*firsts[1:], len(found.profile.layers)]
    specs = [stage(found, a, b - 1, SLOTS, CONTEXT) for a, b in zip(firsts, ends, strict=True)]
    return [load_shard(replace(spec, quantize=quantize)) for spec in specs]


def never() -> bool:
    return False


def rehearse(shards: list[TorchShard], segments: list[Segment], stop=never) -> list[bool]:
    ids = torch.zeros(len(segments), dtype=torch.int64)
    hidden = torch.full((len(segments), shards[0].hidden_size), 1e30)
    return [shard.rehearse(hidden if shard.first_layer else ids, segments, stop) for shard in shards]


batches = st.lists(
    st.lists(
        st.tuples(st.integers(0, SLOTS - 1), st.sampled_from([1, 1, 1, 2, 7]), st.sampled_from([0, 0, 0, 1, 2, 99])),
        min_size=1, max_size=SLOTS, unique_by=lambda piece: piece[0],
    ),
    min_size=1, max_size=8,
)  # fmt: skip


@lru_cache(maxsize=1)
def twice(*how: str) -> tuple[list[TorchShard], list[TorchShard]]:
    return chain(*how), chain(*how)


@pytest.mark.parametrize(("name", "quantize", "dtype"), SHARE)
@settings(max_examples=EXAMPLES, deadline=None)
@given(batches=batches, seed=st.integers(0, 2**20))
@example(batches=[[(0, 7, 0), (1, 1, 0)], *[[(0, 1, 0), (1, 1, 0)]] * 5], seed=1)
def test_no_number_differs_for_rehearsals(name, quantize, dtype, batches, seed):
    could = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(states, "ROLLBACK_TOKENS", 3)  # so that windows slide
        plain, warmed = twice(name, quantize, dtype)
        for shard, slot in itertools.product((*plain, *warmed), range(SLOTS)):
            shard.release(slot)
        generator = torch.Generator().manual_seed(seed)
        held = [0] * SLOTS
        for batch in batches:
            segments = []
            for slot, count, back in batch:
                held[slot] = max(held[slot] - back, 0) if held[slot] + count <= CONTEXT else 0
                segments.append(Segment(slot, held[slot], count, True))
                held[slot] += count
            row = torch.randint(0, VOCABULARY, (sum(one.length for one in segments),), generator=generator)
            rows = [row, row]
            for one, other in zip(plain, warmed, strict=True):
                rows = [one.forward(rows[0], segments), other.forward(rows[1], segments)]
                assert torch.equal(*rows)
            coming = [Segment(one.slot, one.position + one.length, 1, True) for one in segments]
            for _ in range(2):
                could += rehearse(warmed, coming)
    assert any(could) or seed != 1


@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_a_rehearsal_multiplies_nothing(quantize, monkeypatch):
    shards = chain("Llama", quantize)
    for shard in shards:
        row = torch.tensor([3, 5]) if shard.first_layer == 0 else torch.randn(2, shard.hidden_size)
        shard.forward(row, [Segment(0, 0, 2, True)])

    def no(*_):
        raise AssertionError("a product")

    monkeypatch.setattr("peerllm.engine.kernels.graphs.Bound.run", no)
    monkeypatch.setattr(torch.nn.functional, "linear", no)
    assert rehearse(shards, [Segment(0, 2, 1, True)]) == [True, True]


def test_it_ends_when_something_comes_and_when_it_is_enough():
    asked = []
    for after in (0, 1, 2):
        (shard,) = chain("Llama", "int8", firsts=(0,))
        shard.forward(torch.tensor([3, 5]), [Segment(0, 0, 2, True)])
        asked.clear()

        def stop(after=after):
            asked.append(1)
            return len(asked) > after

        assert rehearse([shard], [Segment(0, 2, 1, True)], stop) == [True]
        assert len(asked) == after + 1, "nothing was gone through after that"
    with passing(never):
        for _ in range(ENOUGH):
            assert dry()
        with pytest.raises(Ended):
            dry()
    assert not dry(), "over"


def test_little_of_a_long_context_is_read():
    (shard,) = chain("Llama", "int8", firsts=(0,))
    shard.forward(torch.arange(CONTEXT - 1), [Segment(0, 0, CONTEXT - 1, True)])
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        attend = fused.attend

        def watched(module, query, key, *rest, **more):
            seen.extend(view.high - view.low for view, *_ in attention._thread.row.views(key, rest[0]))
            attention._thread.row._at = module._number, key, rest[0]
            return attend(module, query, key, *rest, **more)

        patch.setattr(fused, "attend", watched)
        rehearse([shard], [Segment(0, CONTEXT - 1, 1, True)])
        assert seen and max(seen) == packing.DRY_TOKENS + 1 < CONTEXT
        shard.forward(torch.tensor([3]), [Segment(0, CONTEXT - 1, 1, True)])
        assert seen[-1] == CONTEXT


def test_a_head_of_many_sequences_is_left_out():
    with passing(never):
        with pytest.raises(Ended):
            dry(numbers=MOST_NUMBERS + 1)
        assert dry(numbers=MOST_NUMBERS)


def test_where_it_cannot_be(monkeypatch):
    (shard,) = chain("Llama", "int8", firsts=(0,))
    shard.forward(torch.arange(4), [Segment(0, 0, 4, True)])
    assert rehearse([shard], [Segment(0, 4, 1, True)]) == [True]
    for position in (3, 5, CONTEXT):  # what is held would be written over; a gap; no room
        assert rehearse([shard], [Segment(0, position, 1, True)]) == [False]
    shard.close()
    assert rehearse([shard], [Segment(0, 4, 1, True)]) == [False]
    for name, quantize in (("Llama", ""), ("Mixtral", "int8")):  # matrices that are not packed
        (shard,) = chain(name, quantize, firsts=(0,))
        shard.forward(torch.arange(4), [Segment(0, 0, 4, True)])
        assert rehearse([shard], [Segment(0, 4, 1, True)]) == [False]
    monkeypatch.setattr(states, "ROLLBACK_TOKENS", 0)
    (shard,) = chain("Ministral", "int8", firsts=(0,))
    could = []
    slid = 0
    for position in range(24):
        could += rehearse([shard], [Segment(0, position, 1, True)])
        with monkeypatch.context() as patch:
            move = packing.Group.make_room

            def moved(self, slot, position, count, move=move):
                nonlocal slid
                before = self.held[slot]
                move(self, slot, position, count)
                slid += self.held[slot] != before

            patch.setattr(packing.Group, "make_room", moved)
            shard.forward(torch.tensor([position]), [Segment(0, position, 1, True)])
    assert slid and False in could and True in could, "a room that has to slide is left alone"


@pytest.mark.skipif(choose(torch.float32, "int8") is None, reason="nothing is packed here")
@pytest.mark.parametrize("keep_warm", ["always", "never"])
async def test_engines_rehearse_if_they_may_and_say_the_same(keep_warm, tmp_path, monkeypatch):
    """Two engines, each in threads of this process: tokens as one engine alone says them."""
    monkeypatch.setattr(Device, "keep_warm", keep_warm)
    monkeypatch.setattr(warmth, "LEAST_S", 0.0)  # how long so small a model waits is the machine's affair
    seen = []
    rehearsal = TorchShard.rehearse

    def watched(self, inputs, segments, stop):
        seen.append(rehearsal(self, inputs, segments, stop))
        return seen[-1]

    found = inspected("Qwen3", "int8")
    model = tmp_path / "model"
    family = next(family for family in FAMILIES if family.name == "Qwen3")
    save(tiny_model(replace(family, config={**family.config, "intermediate_size": 64}), 1.0, 0), model)
    last = len(found.profile.layers) - 1
    async with devices(2, tmp_path, in_process=True) as made:
        said = []
        monkeypatch.setattr(TorchShard, "rehearse", watched)
        for cut in (((0, 0, last),), ((0, 0, 2), (1, 3, last)), ((0, 0, 1), (1, 2, 4), (0, 5, last))):
            deployed = Deployed(made, await inspect(made[0], model, quantize="int8"))
            await redeploy(deployed, cut)
            seen.clear()
            some = [deployed.submit([3, 5, 7 + number], 30) for number in range(2)]
            said.append([(await deployed.finished(one))[0] for one in some])
            if len(cut) > 1:
                assert any(seen) == (keep_warm == "always")
            await deployed.unload()
    assert said[0] == said[1] == said[2]
