"""The latency objective as a mixed-integer program for HiGHS: an answer found by other means than the planner's.

A device is entered and left: a visit (device, first layer, last layer) is a binary of its own, no longer than the
device's memory lets it be; visits are joined by hops, which are a flow. One knapsack per device bounds its visits'
memory. This says the same as one binary per layer and device, but its linear relaxation is much tighter.
"""

from __future__ import annotations

from collections import defaultdict
from math import inf, isfinite

import highspy

from peerllm.planner.cost.layer_costs import hop_ms
from tests.planner.brute import prompt_of, room_of, time_of

SAME = 1e-9  # relative gap at which HiGHS may stop
TIME_LIMIT = 240.0  # seconds; a whole order more than any instance here takes


def least_request_ms(model, devices, links, source, workload):
    """(the optimum, what HiGHS says of it); no layer may be tied to another."""
    assert all(layer.tied_to is None for layer in model.layers)
    count, steps, prompt = len(model.layers), workload.output_tokens - 1, prompt_of(workload)
    memory = [layer.memory_bytes + room_of(layer, workload) for layer in model.layers]

    def stay(name, i):
        batches = [1] if i == count - 1 else prompt
        times = [time_of(devices[name], model.layers[i], n) for n in batches]
        return sum(times) + steps * time_of(devices[name], model.layers[i], 1)

    def hop(a, z, i):
        each = model.layers[i].output_bytes_per_token
        times = [hop_ms(links, a, z, n * each) for n in ([1] if i >= count - 2 else prompt)]
        return sum(times) + steps * hop_ms(links, a, z, each)

    program = highspy.Highs()
    program.silent()
    for option, value in (("mip_rel_gap", SAME), ("mip_abs_gap", 0.0), ("time_limit", TIME_LIMIT), ("threads", 1)):
        program.setOptionValue(option, value)
    entering, leaving, held = defaultdict(list), defaultdict(list), defaultdict(list)
    room = {name: fillable(device.memory_bytes, memory) for name, device in devices.items()}
    for name in devices:
        for first in range(count):
            if first == 1 or (first == 0 and name != source):
                continue
            used, cost = 0, 0.0
            for last in range(first, count):
                used, cost = used + memory[last], cost + stay(name, last)
                if used > room[name]:
                    break
                if last:  # layers 0 and 1 stay together on the source
                    back = hop(name, source, last) if last == count - 1 else 0.0
                    if isfinite(cost + back):
                        visit = program.addBinary(obj=cost + back)
                        entering[name, first].append(visit)
                        leaving[name, last].append(visit)
                        held[name].append(used * visit)
    arriving, going = defaultdict(list), defaultdict(list)
    for a, last in list(leaving):
        for z in devices:
            if a != z and last < count - 1 and (z, last + 1) in entering and isfinite(hop(a, z, last)):
                way = program.addVariable(lb=0, ub=1, obj=hop(a, z, last))
                going[a, last].append(way)
                arriving[z, last + 1].append(way)
    for name in devices:
        for i in range(count):
            entries = 1 if (name, i) == (source, 0) else sum(arriving[name, i])
            _equal(program, sum(entering[name, i]), entries)
            if i < count - 1:
                _equal(program, sum(leaving[name, i]), sum(going[name, i]))
        if held[name]:
            program.addConstr(sum(held[name]) <= room[name])
    _equal(program, sum(sum(leaving[name, count - 1]) for name in devices), 1)
    program.minimize()
    status = program.getModelStatus()
    value = program.getInfo().objective_function_value if status == highspy.HighsModelStatus.kOptimal else inf
    return value, program.modelStatusToString(status)


def fillable(room, sizes):
    """The most bytes of `room` that some of the layers fill: the same limit, without what only loosens it."""
    sums = {0}
    for size in sizes:
        sums |= {each + size for each in sums if each + size <= room}
    return max(sums)


def _equal(program, left, right):
    if not isinstance(left - right, (int, float)):
        program.addConstr(left - right == 0)
    elif left != right:  # no variable can make them equal
        never = program.addVariable(lb=0, ub=0)
        program.addConstr(never + 0 == 1)
