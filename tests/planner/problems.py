"""Latency problems as numbers: all kinds of links, memory and repetition, also such as no model would have."""

from __future__ import annotations

from functools import lru_cache
from itertools import product

import numpy as np

from peerllm.planner.arrays import Floats, Ints
from peerllm.planner.latency.assignment_problem import AssignmentProblem

LAYERS = {2: 10, 3: 9, 4: 8}  # fewer than that, by number of devices


@lru_cache(maxsize=4)
def _assignments(layers: int, devices: int) -> Ints:
    return np.array(list(product(range(devices), repeat=layers)))


def least(asked: AssignmentProblem) -> float:
    """The cheapest of all assignments; infinite if there is none."""
    layers, devices = asked.cost.shape
    homes, rows = _assignments(layers, devices), np.arange(layers)
    fits = np.ones(len(homes), dtype=bool)
    for j in range(devices):
        here = homes == j
        used = np.where(here, asked.memory[rows, homes], 0).sum(axis=1)
        fits &= (used <= asked.room[j]) | ~here.any(axis=1)  # with no room at all, not even for what takes none
    homes = homes[fits]
    total = asked.cost[rows, homes].sum(axis=1) + asked.back[homes[:, -1]]
    total += asked.hop[rows[:-1], homes[:, :-1], homes[:, 1:]].sum(axis=1)
    return float(total.min(initial=np.inf))


def random_problem(seed: int) -> AssignmentProblem:
    """Runs of up to three kinds of layers; rooms often exactly full."""
    r = np.random.default_rng([77, seed])
    devices = int(r.choice([2, 3, 3, 4]))
    layers = int(r.integers(4, LAYERS[devices]))
    kinds = np.repeat(r.integers(0, 3, layers), r.choice([1, 1, 2, 3, 5], layers))[:layers]
    kinds[0] = 3
    kinds[-1] = r.choice([kinds[-1], 4])
    cost = _costs(r, devices)[kinds]
    memory = _sizes(r, devices)[kinds]
    links = _links(r, devices)
    heavier = np.where(np.isfinite(links), links, 0.0) * r.choice([0.0, 0.0, 1.0])
    hop = links + r.choice([0.0, 1.0, 3.0], 5)[kinds][:, None, None] * heavier
    if devices > 2 and r.random() < 0.3:  # two that could be swapped
        cost[:, -1], memory[:, -1] = cost[:, -2], memory[:, -2]
        hop[:, :-2, -1], hop[:, -1, :-2] = hop[:, :-2, -2], hop[:, -2, :-2]
        hop[:, -1, -2] = hop[:, -2, -1]
    cost[:2, 1:] = np.inf
    cost[:2, 0] = np.where(np.isfinite(cost[:2, 0]), cost[:2, 0], 1.0)
    back = hop[-1][:, 0].copy() if r.random() < 0.9 else np.where(r.random(devices) < 0.5, np.inf, 1.0)
    return AssignmentProblem(cost, hop, back, memory, _rooms(r, memory))


def _costs(r: np.random.Generator, devices: int) -> Floats:
    """[kinds, devices]"""
    costs = [r.integers(0, 4, (5, devices)).astype(float), r.uniform(0, 5, (5, devices)), np.zeros((5, devices))]
    found = costs[r.choice([0, 0, 1, 1, 1, 2])]
    if r.random() < 0.3:  # not everybody takes everything
        found[:3] = np.where(r.random((3, devices)) < 0.2, np.inf, found[:3])
    if r.random() < 0.1:  # far from anything like it
        found[1] *= 1e9
    return found


def _sizes(r: np.random.Generator, devices: int) -> Ints:
    """[kinds, devices]"""
    most = int(r.choice([1, 2, 6, 10**12]))
    alike = np.tile(r.integers(0, most + 1, (5, 1)), devices)
    return alike if r.random() < 0.8 else r.integers(0, 4, (5, devices))


def _links(r: np.random.Generator, devices: int) -> Floats:
    """[from, to]"""
    shape = (devices, devices)
    kind = r.choice(["any", "missing", "hub", "star", "ties", "none"])
    links = r.uniform(0, 10, shape)
    if kind == "missing":
        links[r.random(shape) < 0.4] = np.inf
    elif kind in ("hub", "star"):
        hub = int(r.integers(0, devices)) if r.random() < 0.5 else 0
        links = np.full(shape, np.inf) if kind == "star" else r.uniform(20, 30, shape)
        links[hub], links[:, hub] = r.uniform(0.1, 2, devices), r.uniform(0.1, 2, devices)
    elif kind == "ties":
        links = r.integers(0, 3, shape).astype(float)
    elif kind == "none":
        links = np.zeros(shape)
    np.fill_diagonal(links, 0.0)
    return links


def _rooms(r: np.random.Generator, memory: Ints) -> Ints:
    layers, devices = memory.shape
    if r.random() < 0.3:
        room = (memory.sum(axis=0) * r.uniform(0.2, 1.1, devices)).astype(np.int64)
        return np.where(r.random(devices) < 0.1, -1, room)
    homes = r.integers(0, devices, layers)
    homes[:2] = 0
    if r.random() < 0.5:
        homes[2:] = np.sort(homes[2:])
    room = np.array([memory[homes == j, j].sum() for j in range(devices)])
    return room + r.choice([0, 0, 1]) * r.integers(0, 3, devices)
