"""What several modules share: the tiny models, each made once per run, and a torch that keeps to one thread."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from functools import cache

import pytest
import torch

from tests.engine.architectures import FAMILIES, Example, example, quiet


@pytest.fixture(scope="module")
def calm() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    quiet()
    gc.freeze()  # loading and timing collect garbage, of which what is here already is none
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def examples(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Example]:
    """The example of the family of a name."""
    families = {family.name: family for family in FAMILIES}
    return cache(lambda name: example(families[name], tmp_path_factory.mktemp("model")))
