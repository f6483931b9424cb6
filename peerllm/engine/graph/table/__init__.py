"""The families that the graph engine computes: a line or two each, verified by tests/engine/graph/test_families.py.

A line says how a family differs from Llama: names of tensors, values that config.json may omit, norms, rotation. A
model that no line can describe is left to the torch path.
"""

from __future__ import annotations

from collections.abc import Mapping

from peerllm.engine.graph.table.dense import DENSE_FAMILIES
from peerllm.engine.graph.table.family import Family
from peerllm.engine.graph.table.gemma import GEMMA_FAMILIES
from peerllm.engine.graph.table.latent import LATENT_FAMILIES
from peerllm.engine.graph.table.mixtures import MIXTURES_FAMILIES
from peerllm.engine.graph.table.older import OLDER_FAMILIES
from peerllm.engine.graph.table.recurrent import RECURRENT_FAMILIES

FAMILIES: Mapping[str, Family] = {
    **DENSE_FAMILIES, **OLDER_FAMILIES, **GEMMA_FAMILIES, **MIXTURES_FAMILIES, **RECURRENT_FAMILIES, **LATENT_FAMILIES,
}  # fmt: skip
