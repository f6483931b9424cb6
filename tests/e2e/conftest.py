"""The demo's household for every test that only talks to it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

import pytest

from peerllm.builtin import MODEL_DIR
from peerllm.cli.demo.demo import NAMES, SLOTS
from peerllm.cli.demo.demo_memory import limits, sizes_of
from tests.daemon.weights.hub_server import HubServer
from tests.e2e.clients import scripted_model
from tests.household import Device, household

CONTEXT = 1024


@pytest.fixture(scope="package")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Device]]:
    """Three devices, each lending too little for the built-in model, which they serve together.

    Their hub has the scripted model as home/parrot.
    """
    names, folder = NAMES[:3], tmp_path_factory.mktemp("demo")
    sizes = limits(sizes_of(MODEL_DIR, SLOTS, CONTEXT), len(names))
    memory = {name: str(size) for name, size in zip(names, sizes, strict=True)}
    scripted_model.make(folder / "hub" / "home" / "parrot")
    with closing(HubServer(folder / "hub")) as hub, pytest.MonkeyPatch.context() as patch:
        there = {"HF_ENDPOINT": hub.url, "HF_HOME": str(folder / "hf"), "HF_TOKEN": "", "NO_PROXY": "127.0.0.1"}
        for name, value in there.items():
            patch.setenv(name, value)
        with household(folder, names, memory=memory) as started:
            started[0].cli("run", "builtin", "--slots", str(SLOTS), "--context", str(CONTEXT))
            yield started
