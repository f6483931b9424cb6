"""Runs of equal layers, in which a second visit to a device needs no room: it is a relay.

In a run all layers have equal costs, bytes and hops, so it does not matter which of a device's visits holds how many of
its layers, as long as each holds at least one. So the first visit may hold all of them and the later ones, the relays,
none; what the device has left then matters only after the run. Such a route is real if each relay can be given one
layer of its device and the first visit keeps one. (Models with a single run have a faster search: `equal_blocks`.)
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from peerllm.planner.arrays import Flags, Floats, Ints
from peerllm.planner.latency.assignment_problem import AssignmentProblem

FEWEST = 3  # layers of a run in which a device can be visited twice with another in between


@dataclass(frozen=True, slots=True)
class LayerRuns:
    """What run each layer belongs to, and hops within and out of runs."""

    first: Ints  # [layers]: first layer of the layer's run
    last: Ints  # [layers]: last layer of the layer's run
    relay: Flags  # [layers, devices]: whether some hop in the run, or out of it, is shorter over the device
    hop: Floats  # [layers, from, to]: after a layer, over any relays; infinite to the same device
    priced: Ints  # [layers]: number of the run among those of at least FEWEST layers, or -1


def layer_runs(problem: AssignmentProblem, *, no_relays: bool = False) -> LayerRuns:
    """The longest runs; `no_relays` makes every layer a run of its own."""
    layers, devices = problem.cost.shape
    first = np.arange(layers)
    for i in range(1, layers - 1):  # the head is a run of its own
        if not no_relays and _continues(problem, int(first[i - 1]), i):
            first[i] = first[i - 1]
    last = np.append(np.flatnonzero(np.diff(first)), layers - 1)[np.unique(first, return_inverse=True)[1]]
    relay, priced = np.zeros((layers, devices), dtype=bool), np.full(layers, -1)
    hop = _elsewhere(problem.hop)
    for number, start in enumerate(np.unique(first[last - first + 1 >= FEWEST])):
        end = int(last[start])
        priced[start : end + 1] = number
        can_relay = np.isfinite(problem.cost[end]) & (problem.room >= 2 * problem.memory[end])
        within, out, useful_relay = _relayed(problem.hop[start], problem.hop[end], can_relay)
        hop[start:end], hop[end], relay[start : end + 1] = within, out, useful_relay
    return LayerRuns(first, last, relay, hop, priced)


def _continues(problem: AssignmentProblem, first: int, i: int) -> bool:
    """Whether layer i is equal to the one before, in the run that begins with `first`.

    The first layer of a run may be one that must lie on the source: no layer of another device ever comes before it.
    """
    cost, here = problem.cost[i - 1], problem.cost[i]
    if first == i - 1:
        same = (cost == here).all() or (cost[0] == here[0] and np.isinf(cost[1:]).all())
    else:
        same = (cost == here).all() and (problem.hop[i - 1] == problem.hop[first]).all()
    return bool(same and (problem.memory[i - 1] == problem.memory[i]).all())


def _relayed(inner: Floats, onward: Floats, can_relay: Flags) -> tuple[Floats, Floats, Flags]:
    """(hops within a run, hops out of it, useful relays). Out of a run, a relay may be the target as well."""
    direct, leaving = _elsewhere(inner), _elsewhere(onward)
    short, useful_relay = direct, np.zeros(len(inner), dtype=bool)
    for k in np.flatnonzero(can_relay):
        within, out = _elsewhere(direct[:, k, None] + direct[k]), _elsewhere(direct[:, k, None] + onward[k])
        useful_relay[k] = (within < direct).any() or (out < leaving).any()
        short = np.minimum(short, _elsewhere(short[:, k, None] + short[k]))
    for k in np.flatnonzero(useful_relay):
        leaving = np.minimum(leaving, _elsewhere(short[:, k, None] + onward[k]))
    return short, leaving, useful_relay


def _elsewhere(hop: Floats) -> Floats:
    """The hops, with staying on the same device made infinite."""
    return hop + np.where(np.eye(hop.shape[-1], dtype=bool), np.inf, 0.0)
