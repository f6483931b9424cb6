"""Computing on an accelerator: every family on one that is pretended, where a tensor in the wrong place is an error.

No GPU was there to run this on: what is shown is that all that must lie on the device lies there and nothing else is
handed to it, that what leaves a shard is in the machine's memory, and that the numbers are the processor's.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

from peerllm.cli.parser import build_parser
from peerllm.daemon.engine_link.machine import lent_of
from peerllm.engine.kernels import products
from peerllm.engine.kernels.accelerator import PROCESSORS, ComputePlace, find
from peerllm.engine.messages import Inspected, Measure, TimeLayers
from peerllm.engine.model.torch_backend import TorchBackend
from peerllm.engine.model.torch_inspect import inspect_model
from peerllm.engine.model.torch_shard import TorchShard, load_shard
from peerllm.engine.weights.rounding import rounded
from peerllm.errors import BadInputError
from tests.engine.architectures import FAMILIES, Family, quiet, save, stage, tiny_model
from tests.engine.pretend import CPU, DEVICE, Pretend, a_pass, accelerator
from tests.engine.runs import in_slot
from tests.sizes import FULL

SLOTS, CONTEXT, CUT = 2, 32, 3
PROMPTS = [3, 1, 4, 1, 5, 9, 2], [6, 5, 3, 5]
NEXT = [8, 9], [7, 9], [3, 2]


def made(family: Family, directory: Path) -> Inspected:
    quiet()
    torch.set_num_threads(1)
    save(tiny_model(family, 1.0, 0), directory)
    return inspect_model(directory)


def chain(inspection: Inspected, device: torch.device) -> list[TorchShard]:
    last = len(inspection.profile.layers) - 1
    cuts = (0, CUT - 1), (CUT, last)
    return [load_shard(stage(inspection, a, b, SLOTS, CONTEXT), device=device) for a, b in cuts]


def answers(shards: list[TorchShard]) -> list[torch.Tensor]:
    """Logits of two sequences: prompts in one batch, then step by step together."""
    found, at = [], [0, 0]
    for ids in (PROMPTS, *([[one] for one in pair] for pair in NEXT)):
        row = np.array([one for some in ids for one in some])
        runs = [in_slot(slot, at[slot], len(some), True) for slot, some in enumerate(ids)]
        for shard in shards:
            with a_pass():
                row = shard.forward(row, runs)
            assert type(row) is np.ndarray
        found.append(torch.from_numpy(row))
        at = [place + len(some) for place, some in zip(at, ids, strict=True)]
    return found


def close(ours: list[torch.Tensor], theirs: list[torch.Tensor], tolerance: float = 1e-4) -> None:
    for one, other in zip(ours, theirs, strict=True):
        assert float((one - other).abs().max()) <= tolerance * float(other.abs().max())


# It indexes with a list of numbers, of which torch makes a tensor where it takes the pretended device to be.
CANNOT_PRETEND = {"Falcon"}
PER_LAYER = "embed_tokens_per_layer"


SHARE = 14  # of the families by default one in so many; all of them with PEERLLM_FULL=1
CHOSEN = [one for one in FAMILIES if one.name not in CANNOT_PRETEND][:: 1 if FULL else SHARE]


@pytest.mark.parametrize("family", CHOSEN, ids=lambda family: family.name)
def test_every_family_computes_there_what_it_computes_here(family: Family, tmp_path: Path) -> None:
    inspection = made(family, tmp_path)
    expected = answers(chain(inspection, CPU))
    with accelerator() as device:
        shards = chain(inspection, device)
        for shard in shards:
            tensors = [*shard._model.named_parameters(), *shard._model.named_buffers()]
            there = [tensor for name, tensor in tensors if PER_LAYER not in name]  # which stays in its file
            assert all(tensor.device == DEVICE for tensor in there if not tensor.is_meta)
        close(answers(shards), expected)


def by_type(name: str) -> Family:
    return next(family for family in FAMILIES if family.model_type == name)


FORMS = list(itertools.product(
    ["llama", "gemma2", "gpt2", "mixtral", "qwen2"], [("bfloat16", ""), ("float32", "int8"), ("bfloat16", "int4")]
))  # fmt: skip


@pytest.mark.parametrize(
    ("name", "dtype", "quantize"),
    [
        pytest.param(name, *form, marks=() if number % 4 == 0 else pytest.mark.slow)  # each form and most names are met
        for number, (name, form) in enumerate(FORMS)
    ],
)
def test_embeddings_stay_in_their_files_and_matrices_go_rounded(
    name: str, dtype: str, quantize: str, tmp_path: Path
) -> None:
    made(by_type(name), tmp_path)
    inspection = inspect_model(tmp_path, dtype, quantize)
    expected = answers(chain(inspection, CPU))
    with accelerator() as device:
        close(answers(chain(inspection, device)), expected, 0.2 if quantize else 0.05)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_was_rounded_is_multiplied_with_as_it_was_rounded(bits: int, dtype: torch.dtype, monkeypatch) -> None:
    monkeypatch.setattr(products, "ROWS_BYTES", 7 * 256 * dtype.itemsize)  # seven rows at once, the last times fewer
    weights, inputs = torch.randn(40, 256), torch.randn(3, 256).to(dtype)
    codes, scales = rounded(weights.numpy(), bits, 128)
    here = products.Unfolded(codes, scales, bits, CPU)
    whole = here._rows(here._codes, here._scales, torch.float32)
    assert float((whole - weights).abs().max()) <= float(weights.abs().max()) / (1 << (bits - 1))
    with accelerator() as device:
        out = products.Unfolded(codes, scales, bits, device)(inputs.to(device))
        assert (type(out), out.dtype) == (Pretend, dtype)
        there = out.to(CPU).float()
    close([there], [inputs.float() @ whole.t()], 0.02 if dtype is torch.bfloat16 else 1e-5)


def test_a_tensor_in_the_wrong_place_would_be_seen() -> None:
    with accelerator() as device, pytest.raises(RuntimeError, match="of the processor and of"):
        torch.ones(3, device=device) + torch.ones(3)


def test_it_is_measured_there(tmp_path: Path, monkeypatch) -> None:
    waited = []
    monkeypatch.setattr(ComputePlace, "wait", lambda self: waited.append(self.name))
    inspection = made(by_type("llama"), tmp_path)
    with accelerator() as device:
        place = ComputePlace(device, "pretended")
        backend = TorchBackend()
        monkeypatch.setattr(backend, "_place", place)
        assert backend.measure(Measure(1)).gbytes_per_s["float32"] > 0
        timed = backend.time_layers(TimeLayers(1, inspection.config, "float32", 1 << 30), lambda: None)
    assert {"embedding", "block", "head"} <= timed.layer_ms.keys()
    assert set(waited) == {"pretended"}


def test_places_are_found_or_named() -> None:
    assert find("cpu") is PROCESSORS
    for wish in ("gpu", "cuda:", "cuda:x", "CPU", ""):
        with pytest.raises(BadInputError, match="takes cpu, cuda, cuda:N or mps"):
            find(wish)
        with pytest.raises(SystemExit) as ended:
            build_parser().parse_args(["up", "--compute", wish])
        assert ended.value.code == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_a_place_that_is_not_here_is_one_clear_line() -> None:
    with pytest.raises(BadInputError, match=r"--compute cuda:0: .*leave it out"):
        find("cuda")


def test_what_is_lent_of_an_accelerators_own_memory() -> None:
    gib = 1 << 30
    assert lent_of(None, 8 * gib, 7 * gib) == 7 * gib - int(0.8 * gib)
    assert lent_of(None, gib, 100) == 0
    assert lent_of(3 * gib, 8 * gib, 7 * gib) == 3 * gib
    assert lent_of(30 * gib, 8 * gib, 7 * gib) == 7 * gib - gib // 2  # no more than is free
    assert lent_of(1, 8 * gib, 100) == 0
