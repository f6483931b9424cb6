"""From a checkpoint's tensor names to the model's, by transformers' own table of renamings and fusions."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from peerllm.engine.messages import TensorAt
from peerllm.engine.model.division import Division
from peerllm.errors import ModelError


@dataclass(slots=True)
class TensorRecipe:
    """How one or more tensors of the model (`targets`) are made of tensors of the checkpoint, in order."""

    targets: tuple[str, ...]
    converter: Any = None  # a WeightConverter of transformers; None: the tensor is taken unchanged
    sources: list[tuple[str, TensorAt]] = field(default_factory=list)  # (the converter's pattern, tensor)


def recipes(division: Division, tensors: Iterable[TensorAt]) -> list[TensorRecipe]:
    """A recipe for every tensor of the model that the checkpoint has; other tensors of the checkpoint are ignored."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    mapping = get_model_conversion_mapping(division.model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    of_pattern = {pattern: entry for entry in converters for pattern in entry.source_patterns}
    prefix, sizes = division.model.base_model_prefix, division.sizes
    made: dict[str, TensorRecipe] = {}
    for tensor in sorted({t.name: t for t in tensors}.values(), key=lambda t: dot_natural_key(t.name)):
        name, pattern = rename_source_key(tensor.name, renamings, converters, prefix, sizes)
        if name not in sizes and tensor.name in sizes:
            name, pattern = rename_source_key(tensor.name, [], [], prefix, sizes)
        if name not in sizes:
            continue
        if pattern is None:
            made[name] = TensorRecipe((name,), None, [(tensor.name, tensor)])
            continue
        if name not in made:
            converter = copy.deepcopy(of_pattern[pattern])
            first = converter.target_patterns[0]
            targets = tuple(name.replace(first, other) for other in converter.target_patterns)
            made[name] = TensorRecipe(targets, converter)
        made[name].sources.append((pattern, tensor))
    return list(made.values())


def check(division: Division, found: list[TensorRecipe], needed: Iterable[str]) -> None:
    """ModelError if a recipe's shapes do not fit, or names the first of `needed` that no recipe makes."""
    sizes = division.sizes
    for recipe in found:
        want = [tuple(sizes[name].shape) for name in recipe.targets if name in sizes]
        if recipe.converter is None:
            source = recipe.sources[0][1]
            if source.shape != want[0]:
                raise ModelError(
                    f"tensor {source.name} has shape {list(source.shape)}; the model needs {list(want[0])}"
                )
        elif sum(math.prod(t.shape) for _, t in recipe.sources) != sum(map(math.prod, want)):
            raise ModelError(
                f"the tensors for {recipe.targets[0]} do not add up to its size; some are missing or misshapen"
            )
    made = {name for recipe in found for name in recipe.targets}
    optional = [
        re.compile(pattern) for pattern in getattr(division.model, "_keys_to_ignore_on_load_missing", None) or ()
    ]
    for name in needed:
        if not division.names_of(name) & made and not any(pattern.search(name) for pattern in optional):
            raise ModelError(f"tensor {name} is missing from the model's files")
