"""The throughput plan against brute force: the same optimum, every limit kept, no claim that does not hold."""

from __future__ import annotations

import math

import pytest

from peerllm.errors import InfeasibleError
from peerllm.planner.throughput.throughput_plan import plan_throughput
from peerllm.types import Plan
from tests.planner.brute import (
    assignments,
    divides,
    divisions,
    fits,
    homes_of,
    most_tokens_per_second,
    pass_ms,
    prompt_of,
    rate,
    rates,
    roomy,
)
from tests.planner.instances import EVERY_BLOCK, FULL, Instance, instance, on_air, seeds, shape


def check_plan(i: Instance, plan: Plan) -> None:
    """The plan keeps every limit and is worth what it says."""
    homes, did = homes_of(plan), plan.predicted
    assert homes[:2] == (i.source, i.source) and (not i.head_on_source or homes[-1] == i.source)
    assert divides(homes) and fits(i.model, i.devices, homes, i.workload, i.working)
    b, m = did.micro_batch, did.micro_batches
    assert min(b, m) >= 1 and b * m <= i.workload.sequences
    assert did.tokens_per_second == pytest.approx(1000 * rate(i.model, i.devices, i.links, homes, b, m, i.media))
    step = pass_ms(i.model, i.devices, i.links, homes, [b], [b])
    first = pass_ms(i.model, i.devices, i.links, homes, prompt_of(i.workload), [1])
    assert did.step_ms == pytest.approx(step) and did.time_to_first_token_ms == pytest.approx(first)
    assert did.request_ms == pytest.approx(first + (i.workload.output_tokens - 1) * step)


def check(i: Instance) -> Plan | None:
    """The plan, or None where there is none; unless links share media it is proven."""
    ends = {"head_on_source": i.head_on_source, "media": i.media}
    expected = most_tokens_per_second(*i.asked, working=i.working, **ends)
    try:
        plan = plan_throughput(*i.asked, working_bytes=i.working, **ends)
    except InfeasibleError:
        assert expected == 0, "a feasible instance was called infeasible"
        return None
    check_plan(i, plan)
    did = plan.predicted.tokens_per_second
    assert 0 < did <= expected * (1 + 1e-9) <= plan.bound * (1 + 2e-9)
    if plan.optimal or not i.media:
        assert plan.optimal and plan.bound == did == pytest.approx(expected, rel=1e-9)
    return plan


@pytest.mark.parametrize("block", EVERY_BLOCK)
def test_agrees_with_brute_force(block):
    plans = [check(instance(seed, *shape(seed))) for seed in seeds(block)]
    assert len(plans) * 0.4 < sum(plan is not None for plan in plans) < len(plans) * 0.9  # not all trivial or hopeless


def test_shared_media_are_not_forgotten():
    """Where optimality is claimed it holds, and where not the bound does; and media do change the answer."""
    plans = [(seed, check(on_air(seed, *shape(seed)))) for seed in range(400 if FULL else 150)]
    found = [(seed, plan) for seed, plan in plans if plan is not None]
    assert any(plan.optimal for _, plan in found)
    slower = 0
    for seed, plan in found:
        i = on_air(seed, *shape(seed))
        free = most_tokens_per_second(*i.asked, working=i.working, head_on_source=i.head_on_source)
        slower += plan.predicted.tokens_per_second < free * (1 - 1e-9)
    assert slower > 5


@pytest.mark.parametrize("seed", range(12))
def test_brute_force_agrees_with_its_own_plain_form(seed):
    """What is computed for all assignments at once is what the plain functions say of each."""
    i = on_air(seed, 4 + seed % 2, 3)
    order = (i.source, *sorted(set(i.devices) - {i.source}))
    every = assignments(len(i.model.layers), 3)
    named = [tuple(order[j] for j in homes) for homes in every]
    good = roomy(i.model, i.devices, order, i.workload, i.working, every)
    assert good.tolist() == [fits(i.model, i.devices, homes, i.workload, i.working) for homes in named]
    assert len(divisions(len(i.model.layers), 3)) == sum(divides(homes) for homes in named)
    b, m = 1 + seed % 3, 1 + seed % 2
    at_once = rates(i.model, i.devices, i.links, order, every, b, m, i.media)
    for value, homes in zip(at_once, named, strict=True):
        if divides(homes):
            plain = rate(i.model, i.devices, i.links, homes, b, m, i.media)
            assert (math.isinf(value) and math.isinf(plain)) or value == pytest.approx(plain)
