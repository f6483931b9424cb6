"""Two devices of one core each against one device of one core, over 1 Gbit/s with TLS: what dividing costs and gives.

Devices are network namespaces on a bridge, each limited to 1 Gbit/s, each pinned to a core. A single one is measured on
either core, for they are not equally fast: what other machines on the host do differs.
The model has Llama-3.2-1B's shape and random weights, planned for eight sequences. `peerllm bench` measures,
arrangements in turn, medians over the rounds. With --llama (or LLAMA_BIN), a folder of llama.cpp's programs, eight
sequences of the same numbers in Q4_0 go through it on one device and, by its RPC, on the same two, as many blocks on
each. Needs root (namespaces).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.models import LLAMA_3_2_1B, write_llama
from tests.household import Device
from tests.lab.netns import Lab, require_lab
from tests.traces import passes

MBPS = 1000
API = "127.0.0.1:8642"  # each in its own namespace
SLOTS, CONTEXT, LONG = 8, 256, 1024
PROMPT, OUTPUT = 32, 32
RPC_PORT = 50052


@contextmanager
def pinned(root: Path, cores: Mapping[str, int], mbps: int = MBPS) -> Iterator[list[Device]]:
    """Devices by name and core; the second is in the first one's household."""
    require_lab()
    with Lab(len(cores)) as lab:
        for host in range(len(cores)):
            lab.limit(host, mbps)
        made = [
            Device(root / name, name, memory="8GB", port=8643, api=API, prefix=lab.argv(host, [], at))
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


def measure(root: Path, model: Path, kind: str, rounds: int) -> dict[str, list[float]]:
    """Tokens/s and ms of one device and of two: a sequence, eight, and the first token of a long prompt."""
    seen: dict[str, list[float]] = defaultdict(list)
    planned = ["--quantize", kind, "--objective", "throughput"]
    cores = {"left": 0, "right": 1, "first": 0, "second": 1}
    with pinned(root / kind, cores) as (left, _, first, second):
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
        file = root / "trace.json"
        both.bench(1, PROMPT, OUTPUT, "--trace", str(file))
        seen["two hop_ms"] = hops_ms(json.loads(file.read_text()), ("left", "right"))
        for name, asked in (("in chunks", []), ("whole", ["--prompt-chunk", str(LONG)])):
            both.stop()
            both.serve(*planned, *asked, slots=SLOTS, context=LONG + 64)
            took = both.bench(1, LONG, 2)
            seen[f"two, prompt {name}, first_ms"].append(took["measured"]["time_to_first_token_ms"])
            seen[f"two, prompt {name}, first_ms predicted"].append(took["predicted"]["time_to_first_token_ms"])
    return seen


def llama(root: Path, model: Path, programs: Path, rounds: int) -> dict[str, list[float]]:
    """llama.cpp's eight sequences at once in Q4_0, tokens/s, on one device of a core and over its RPC on two."""
    from benchmarks.llama_cpp import told, write_both

    file = write_both(model, root, programs)["int4"]
    batch = ("-m", str(file), "-t", "1", "-npp", str(PROMPT), "-ntg", str(OUTPUT), "-npl", str(SLOTS), "-c", "1024")
    half = ("-ngl", str(int(str(LLAMA_3_2_1B["num_hidden_layers"])) // 2 + 1))  # with the head, which counts as one
    seen: dict[str, list[float]] = defaultdict(list)
    with Lab(2) as lab:
        for host in range(2):
            lab.limit(host, MBPS)
        serve = [programs / "ggml-rpc-server", "-H", lab.address(1), "-p", str(RPC_PORT), "-t", "1"]
        lab.exec(1, serve, cpu=1, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for _ in range(rounds):
            for who, how in (("one", ()), ("two", ("--rpc", f"{lab.address(1)}:{RPC_PORT}", *half))):
                options = (*batch, *how, "--output-format", "jsonl")
                (found,) = told(programs / "llama-batched-bench", *options, prefix=lab.argv(0, [], 0))
                seen[f"llama.cpp {who} eight"].append(found["speed_tg"])
    return seen


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--kinds", nargs="*", default=["int8", "int4"])
    parser.add_argument("--model", type=Path, help="of that shape; without, one is written")
    parser.add_argument("--llama", type=Path, default=os.environ.get("LLAMA_BIN"), help="a folder of its programs")
    args = parser.parse_args(argv)
    require_lab()
    with tempfile.TemporaryDirectory(prefix="peerllm-bench-") as directory:
        root = Path(directory)
        model = args.model or write_llama(root / "model", LLAMA_3_2_1B)
        found = {kind: measure(root, model, kind, args.rounds) for kind in args.kinds}
        if args.llama is not None:
            found["Q4_0"] = llama(root, model, Path(args.llama), args.rounds)
    medians = {kind: {name: median(seen) for name, seen in one.items()} for kind, one in found.items()}
    print(json.dumps(medians, indent=1))


if __name__ == "__main__":
    main()
