"""What a deployment asks for, and how it gives way; the profiles and the working space behind it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from peerllm.daemon.decide.demand import EXPECTED_PROMPT, draw_up, sizes
from peerllm.daemon.decide.device_profiles import BATCHES, Candidate, MeasuredLayers, device_profile, link_profiles
from peerllm.daemon.facade import RunOptions
from peerllm.errors import BadInputError, InfeasibleError
from peerllm.planner.cost.byte_sizes import human_bytes
from peerllm.planner.cost.working_space import MAX_CHUNK, MIN_CHUNK, chunk_tokens, working_bytes
from peerllm.planner.transfers.prompt_chunks import Pipeline
from peerllm.types import WorkingSpace, Workload, chunk_of
from tests.daemon.house import BLOCK, WORKING, hello, inspected

A, B, C = "a" * 64, "b" * 64, "c" * 64


def household(*lent, **changes):
    return {
        letter * 64: Candidate(letter * 64, replace(hello(letter, nbytes), **changes), nbytes, 2.0 * i, 100.0 * (i + 1))
        for i, (letter, nbytes) in enumerate(zip("abc", lent, strict=False))
    }


def test_context_gives_way_before_slots_and_what_was_asked_for_stays():
    assert list(sizes(RunOptions("m"), 8192)) == [(4, 2048), (4, 1024), (4, 512), (2, 512), (1, 512)]
    assert list(sizes(RunOptions("m"), 600)) == [(4, 600), (4, 512), (2, 512), (1, 512)]
    assert list(sizes(RunOptions("m"), 100)) == [(4, 100), (2, 100), (1, 100)]
    assert list(sizes(RunOptions("m", context=4096), 8192)) == [(4, 4096), (2, 4096), (1, 4096)]
    assert list(sizes(RunOptions("m", context=4096, slots=3), 8192)) == [(3, 4096)]
    assert list(sizes(RunOptions("m", slots=1), 2048)) == [(1, 2048), (1, 1024), (1, 512)]


@pytest.mark.parametrize(
    "options",
    [RunOptions("m", slots=0), RunOptions("m", slots=10**6), RunOptions("m", context=0), RunOptions("m", schedule="x")],
)
def test_impossible_wishes_are_refused(options):
    with pytest.raises(BadInputError):
        draw_up(options, inspected("m", 4), household(9 * BLOCK), A)


def test_promises_hold_weights_kv_and_working_space():
    model = inspected("m", 8)
    made = draw_up(RunOptions("m"), model, household(*[3 * BLOCK + 100_000] * 3), A)
    work = working_bytes(model.working, made.workload.context, made.workload.sequences)
    assert set(made.promises) == {A, B, C}
    assert sum(made.promises.values()) == sum(made.stage_memory_bytes) + 3 * work
    assert all(nbytes <= 3 * BLOCK + 100_000 for nbytes in made.promises.values())
    assert 1 <= made.micro_batch <= made.workload.sequences
    assert made.micro_batches == 3 and made.micro_batch == 2  # four slots over three devices


def prompting(each=1.0, extra=2.0, mbps=1000.0, slots=4, **options):
    """For two devices, each with room for half of the model; a block takes `extra` ms and `each` more a token."""
    model = inspected("m", 8, 2048)
    chunk = min(2048, options.get("prompt_chunk", MAX_CHUNK))
    room = 4 * BLOCK + 100_000 + working_bytes(model.working, 2048, slots, chunk)
    layer_ms = {"embedding": ((1, 0.01),), "block": ((1, extra + each), (128, extra + 128 * each)), "head": ((1, 0.5),)}
    candidates = {
        device: replace(one, timing=MeasuredLayers(layer_ms), rtt_ms=0.4, mbps=mbps)
        for device, one in household(room, room).items()
    }
    return draw_up(RunOptions("m", context=2048, slots=slots, **options), model, candidates, A)


def test_prompts_are_cut_by_the_cost_model_within_what_is_promised():
    made = prompting(slots=1)
    assert made.chunk == MAX_CHUNK and {chunk for _, chunk in made.cuts} <= {16, 32, 64, 128}
    pipeline = Pipeline(made.scenario.model, made.scenario.devices, made.scenario.links, made.plan.stages)
    first = pipeline.first_token_ms(EXPECTED_PROMPT, chunk_of(made.cuts, EXPECTED_PROMPT))
    assert made.plan.predicted.time_to_first_token_ms == first < pipeline.first_token_ms(EXPECTED_PROMPT, MAX_CHUNK)
    assert pipeline.first_token_ms(1024, chunk_of(made.cuts, 1024)) < 0.6 * pipeline.first_token_ms(1024, 1024)
    work = working_bytes(WORKING, 2048, 1, made.chunk)
    assert sum(made.promises.values()) == sum(made.stage_memory_bytes) + 2 * work


def test_where_others_share_the_stages_chunks_are_not_longer_than_they_may_wait():
    assert prompting(each=2.0, slots=1).chunk == 128
    shared = prompting(each=2.0, slots=2)
    assert shared.chunk == 32 and max(chunk for _, chunk in shared.cuts) == 32  # 4 blocks: 64 take 520 ms


@pytest.mark.parametrize("schedule", ["no-bubble", "sequential"])
def test_what_is_asked_for_is_how_prompts_are_cut(schedule):
    made = prompting(each=5.0, prompt_chunk=300, schedule=schedule)
    assert made.chunk == 300 and made.cuts == ((1, 300),)
    assert prompting(prompt_chunk=4096).chunk == 2048, "no more than there is context"


def test_chunks_that_take_turns_are_as_large_as_may_be():
    made = prompting(slots=1, schedule="sequential")
    assert made.cuts == ((1, MAX_CHUNK),) != prompting(slots=1).cuts


def test_what_is_promised_elsewhere_is_said():
    candidates = household(5 * BLOCK, 5 * BLOCK)
    candidates[B] = replace(candidates[B], free_bytes=BLOCK)
    with pytest.raises(
        InfeasibleError, match=r"m needs .* are missing; 4\.00 MB of what .* promised to other models"
    ) as caught:
        draw_up(RunOptions("m"), inspected("m", 8), candidates, A)
    assert 2 * BLOCK < caught.value.missing_bytes < 3 * BLOCK


def test_devices_that_cannot_compute_it_are_not_asked():
    candidates = household(3 * BLOCK, 9 * BLOCK, 9 * BLOCK)
    candidates[B] = replace(candidates[B], hello=replace(candidates[B].hello, dtypes=("bfloat16",)))
    assert B not in draw_up(RunOptions("m"), inspected("m", 8), candidates, A).promises
    with pytest.raises(BadInputError, match="cannot compute"):
        draw_up(RunOptions("m"), inspected("m", 8), household(9 * BLOCK, architectures=("gpt2",)), A)


def test_private_keeps_the_head_at_home():
    model = inspected("m", 8)
    candidates = household(4 * BLOCK, 9 * BLOCK)
    stages = draw_up(RunOptions("m", private=True), model, candidates, A).plan.stages
    assert stages[0].device == stages[-1].device == A and len(stages) > 1


def test_profiles_follow_what_was_measured():
    model = inspected("m", 1).profile
    candidate = household(9)[A]
    slow = replace(candidate, hello=replace(candidate.hello, gbytes_per_s={"float32": 1.0}, gflops={"float32": 5.0}))
    profiles = [device_profile(c, model, Workload(), "float32") for c in (candidate, slow)]
    fast_ms, slow_ms = (dict(one.layer_ms["block"]) for one in profiles)
    assert slow_ms[1] - 0.02 == pytest.approx(1.0) and fast_ms[1] - 0.02 == pytest.approx(0.1)
    assert slow_ms[256] - 0.02 == pytest.approx(2 * 250_000 * 256 / 5e6)
    assert list(slow_ms) == list(BATCHES)
    silent = replace(candidate, hello=replace(candidate.hello, gbytes_per_s={}, gflops={}))
    assert dict(device_profile(silent, model, Workload(), "float32").layer_ms["block"])[1] > fast_ms[1]


def test_links_between_others_are_as_slow_as_the_slower_way_to_them():
    links = link_profiles(household(1, 1, 1), A)
    assert len(links) == 6
    assert links[A, B].latency_ms == pytest.approx(1.0 + 0.3) and links[A, B].mbps == 200
    assert links[B, C].latency_ms == pytest.approx(2.0 + 0.3) and links[B, C].mbps == 200


def test_chunks_stay_within_their_bounds():
    space = WorkingSpace(token=400_000, pair=160, position=4096, sequence=10**6, once=10**7, loading=0)
    for context in (1, 64, 2048, 1 << 20):
        assert min(MIN_CHUNK, context) <= chunk_tokens(space, context) <= MAX_CHUNK
        assert working_bytes(space, context, 4) < working_bytes(space, context, 64)


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1000, "1.00 kB"),
        (45_000_000, "45.0 MB"),
        (999_999, "1.00 MB"),
        (16e9, "16.0 GB"),
    ],
)
def test_human_bytes(nbytes, text):
    assert human_bytes(nbytes) == text


@pytest.mark.parametrize(("context", "prompt"), [(64, 32), (2048, 128), (4096, 256)])
def test_a_plan_expects_longer_prompts_where_the_context_is_long(context, prompt):
    blueprint = draw_up(RunOptions("m", context=context), inspected("m", 2, max_context=4096), household(9 * BLOCK), A)
    assert blueprint.workload.prompt_tokens == prompt


def test_a_prompt_takes_longer_where_devices_share_processors():
    model = inspected("m", 6, max_context=2048)
    candidates = household(3 * BLOCK, 3 * BLOCK, 3 * BLOCK)
    for device, one in candidates.items():
        candidates[device] = replace(one, hello=replace(one.hello, machine="x", processors=3))
    cut, whole = RunOptions("m", prompt_chunk=16), RunOptions("m", prompt_chunk=128)
    many = RunOptions("m", prompt_chunk=16, objective="throughput")
    free, free_whole, free_many = (draw_up(options, model, candidates, A) for options in (cut, whole, many))
    for device, one in candidates.items():
        candidates[device] = replace(one, hello=replace(one.hello, processors=2))
    shared, shared_whole, shared_many = (draw_up(options, model, candidates, A) for options in (cut, whole, many))
    assert free_many.plan == shared_many.plan, "its layers' times are those of devices that all compute"
    assert free_whole.plan == shared_whole.plan, "a prompt in one piece keeps one device busy at a time"
    first, longer = (one.plan.predicted.time_to_first_token_ms for one in (free, shared))
    assert free.plan.stages == shared.plan.stages and first < longer < 1.5 * first
    assert free.plan.predicted.step_ms == shared.plan.predicted.step_ms, "one device computes at a time"
