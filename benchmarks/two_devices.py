"""Two devices of one core each against one device of one core, over 1 Gbit/s with TLS: what dividing costs and gives.

Devices are network namespaces on a bridge, each limited to 1 Gbit/s, each pinned to a core. A single one is measured on
either core, for they are not equally fast: what other machines on the host do differs.
The model has Llama-3.2-1B's shape and random weights, planned for eight sequences. `peerllm bench` measures,
arrangements in turn, medians over the rounds. For prompts the devices' memory has room for half of the blocks each.
Needs root (namespaces).
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.models import LLAMA_3_2_1B, write_llama
from peerllm.engine.inspect import inspect_model
from peerllm.planner.cost import layer_bytes
from peerllm.planner.memory import working_bytes
from peerllm.types import Workload
from tests.household import Device
from tests.lab.netns import Lab, require_lab
from tests.traces import passes

MBPS = 1000
API = "127.0.0.1:8642"  # each in its own namespace
SLOTS, CONTEXT, LONG = 8, 256, 1024
PROMPT, OUTPUT = 32, 64


@contextmanager
def pinned(
    root: Path, cores: Mapping[str, int], memory: Mapping[str, str], mbps: int = MBPS
) -> Iterator[list[Device]]:
    """Devices by name and core; the second is in the first one's household."""
    require_lab()
    with Lab(len(cores)) as lab:
        for host in range(len(cores)):
            lab.limit(host, mbps)
        made = [
            Device(root / name, name, memory=memory.get(name, "8GB"), port=8643, api=API,
                   prefix=lab.argv(host, [], at))
            for host, (name, at) in enumerate(cores.items())
        ]
        try:
            for device in made:
                device.start()
            for device in made:
                device.wait_ready()
            made[1].cli("join", made[0].cli("invite").stdout.split()[-1])
            yield made
        finally:
            for device in made:
                device.stop()


class Household:
    """One or two devices that serve the model in several ways, one after the other."""

    def __init__(self, source: Device, model: Path) -> None:
        self._source, self._model = source, str(model)

    def serve(self, *options: str, slots: int, context: int) -> list[dict[str, Any]]:
        """The stages of the plan."""
        self._source.cli("run", self._model, "--slots", str(slots), "--context", str(context), *options)
        (one,) = self._source.status()["deployments"]
        stages: list[dict[str, Any]] = one["plan"]["stages"]
        return stages

    def stop(self) -> None:
        self._source.cli("stop", self._model)

    def bench(self, sequences: int, prompt: int, output: int, *options: str) -> dict[str, Any]:
        """What `peerllm bench` says: "predicted" and "measured"."""
        asked = ("--sequences", str(sequences), "--prompt-tokens", str(prompt), "--output-tokens", str(output))
        run: dict[str, Any] = json.loads(self._source.cli("bench", "--json", *asked, *options).stdout)["runs"][0]
        return run


def hops_ms(trace: dict[str, Any], devices: Sequence[str]) -> list[float]:
    """From the end of a step's pass to the start of its pass on the next device, on the one clock that they share."""
    offsets = {name: one["offset_us"] for name, one in trace["otherData"]["devices"].items()}
    seen: dict[tuple[int, int], list[tuple[float, float, str]]] = defaultdict(list)
    for name in devices:
        for one in passes(trace, name):
            if one["name"].endswith("step"):
                start = one["ts"] + offsets[name]
                for key in zip(one["args"]["sequences"], one["args"]["positions"], strict=True):
                    seen[key].append((start, start + one["dur"], name))
    found = []
    for laps in seen.values():
        laps.sort()
        found += [(b[0] - a[1]) / 1000 for a, b in pairwise(laps) if a[2] != b[2]]
    return found


def decoding(root: Path, model: Path, kind: str, rounds: int) -> dict[str, list[float]]:
    """Tokens/s and ms of one device and of two, one sequence and eight, no-bubble and bubble."""
    seen: dict[str, list[float]] = defaultdict(list)
    planned = ["--quantize", kind or "none", "--objective", "throughput"]
    cores = {"left": 0, "right": 1, "first": 0, "second": 1}
    with pinned(root / "decoding", cores, {}) as (left, _, first, second):
        alone, both = (Household(first, model), Household(second, model)), Household(left, model)
        for single in alone:
            single.serve(*planned, slots=SLOTS, context=CONTEXT)
        stages = both.serve(*planned, slots=SLOTS, context=CONTEXT)
        assert len({stage["device"] for stage in stages}) == 2, stages
        for _ in range(rounds):
            for who, house in (("one, core 0", alone[0]), ("one, core 1", alone[1]), ("two", both)):
                seen[f"{who} step_ms"].append(house.bench(1, PROMPT, OUTPUT)["measured"]["step_ms"])
                eight = house.bench(SLOTS, PROMPT, OUTPUT)
                seen[f"{who} eight"].append(eight["measured"]["steady_tokens_per_second"])
                seen[f"{who} eight bound"].append(eight["predicted"]["formula_tokens_per_second"])
                seen[f"{who} eight bound profiled"].append(eight["profiled"]["formula_tokens_per_second"])
            apart = both.bench(SLOTS, PROMPT, OUTPUT, "--apart")
            seen["two eight apart"].append(apart["measured"]["steady_tokens_per_second"])
        file = root / "trace.json"
        both.bench(1, PROMPT, OUTPUT, "--trace", str(file))
        seen["two hop_ms"] = hops_ms(json.loads(file.read_text()), ("left", "right"))
        for house in (both, *alone):
            house.stop()
        both.serve(*planned, "--schedule", "bubble", slots=SLOTS, context=CONTEXT)
        for _ in range(rounds):
            bubble = both.bench(SLOTS, PROMPT, OUTPUT)
            seen["two eight bubble"].append(bubble["measured"]["steady_tokens_per_second"])
            seen["two eight bubble bound"].append(bubble["predicted"]["formula_tokens_per_second"])
    return seen


def prompts(root: Path, model: Path, rounds: int) -> dict[str, list[float]]:
    """Milliseconds to the first token of a long prompt in bfloat16, in chunks and at once, half of the blocks each."""
    seen: dict[str, list[float]] = defaultdict(list)
    arrangements: dict[str, int | None] = {"chunked": None, "unchunked": LONG}
    for turn, (name, chunk) in itertools.product(range(rounds), arrangements.items()):
        memory = halves(model, chunk)
        with pinned(root / f"{name}-{turn}", {"left": 0, "right": 1}, memory) as (left, _):
            both = Household(left, model)
            asked = ["--prompt-chunk", str(chunk)] if chunk else []
            stages = both.serve(*asked, "--objective", "throughput", slots=1, context=LONG + 64)
            assert [stage["last_layer"] for stage in stages] == [LLAMA_3_2_1B["num_hidden_layers"] // 2, 17], stages
            took = both.bench(1, LONG, 2)
            seen[f"two prompt {name} first_ms"].append(took["measured"]["time_to_first_token_ms"])
            seen[f"two prompt {name} first_ms predicted"].append(took["predicted"]["time_to_first_token_ms"])
    return seen


def halves(model: Path, chunk: int | None) -> dict[str, str]:
    """Memory for half of the blocks in bfloat16 and a bit, with their KV, and for the head on the right.

    The embedding on the left is read from its file and takes none.
    """
    inspection = inspect_model(model, "bfloat16")
    work = Workload(sequences=1, context=LONG + 64)
    blocks = [layer_bytes(inspection.profile, number, work) for number in range(1, len(inspection.profile.layers) - 1)]
    room = int(sum(blocks) * (0.5 + 0.2 / len(blocks))) + working_bytes(inspection.working, LONG + 64, 1, chunk)
    return {"left": str(room), "right": str(room + layer_bytes(inspection.profile, len(blocks) + 1, work))}


def measure(rounds: int, kinds: Sequence[str]) -> dict[str, Any]:
    """Medians, by kind of weights ("" is bfloat16)."""
    with tempfile.TemporaryDirectory(prefix="peerllm-bench-") as directory:
        root = Path(directory)
        model = write_llama(root / "model", LLAMA_3_2_1B)
        found = {}
        for kind in kinds:
            by_name = decoding(root / (kind or "bfloat16"), model, kind, rounds)
            found[kind or "bfloat16"] = {name: median(values) for name, values in by_name.items()}
        if "" in kinds:
            found["bfloat16"] |= {name: median(values) for name, values in prompts(root, model, rounds).items()}
    return found


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--kinds", nargs="*", default=["", "int4"], metavar="int4")
    args = parser.parse_args(argv)
    print(json.dumps(measure(args.rounds, args.kinds), indent=1))


if __name__ == "__main__":
    main()
