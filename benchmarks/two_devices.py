"""Two devices of one core each against one device of one core, over 1 Gbit/s with TLS: what dividing costs and gives.

Devices are network namespaces on a bridge, each limited to 1 Gbit/s, each pinned to a core; the single one has core 0.
The model has Llama-3.2-1B's shape and random weights; memory limits make two stages of it. `peerllm bench` measures,
arrangements in turn, medians over the rounds. Needs root (namespaces).
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
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
SLOTS, CONTEXT, LONG = 8, 256, 1024
PROMPT, OUTPUT = 32, 64


@contextmanager
def three(root: Path) -> Iterator[tuple[Device, Device, Device, Lab]]:
    """(left, right, alone), not paired."""
    require_lab()
    with Lab(3) as lab:
        for host in range(3):
            lab.limit(host, MBPS)
        made = [
            Device(root / name, name, memory="8GB", port=8643, api="127.0.0.1:8642", prefix=lab.argv(host, [], cpu=cpu))
            for host, (name, cpu) in enumerate((("left", 0), ("right", 1), ("alone", 0)))
        ]
        try:
            for device in made:
                device.start()
            for device in made:
                device.wait_ready()
            yield *made, lab
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


def measure(rounds: int, kinds: Sequence[str]) -> dict[str, Any]:
    """By kind of weights ("" is bfloat16): tokens/s of one and two devices, alone and eight at once, and so on."""
    seen: dict[str, list[float]] = defaultdict(list)
    with tempfile.TemporaryDirectory(prefix="peerllm-bench-") as directory:
        root = Path(directory)
        model = write_llama(root / "model", LLAMA_3_2_1B)
        with three(root) as (left, right, alone, _):
            right.cli("join", left.cli("invite").stdout.split()[-1])
            single, both = Household(alone, model), Household(left, model)
            for kind in kinds:
                rounded = ["--quantize", kind] if kind else []
                name = kind or "bfloat16"
                single.serve(*rounded, slots=SLOTS, context=CONTEXT)
                stages = both.serve(*rounded, "--objective", "throughput", slots=SLOTS, context=CONTEXT)
                assert len({stage["device"] for stage in stages}) == 2, stages
                for _ in range(rounds):
                    for who, house in (("one", single), ("two", both)):
                        seen[f"{name} {who} step_ms"].append(house.bench(1, PROMPT, OUTPUT)["measured"]["step_ms"])
                        eight = house.bench(SLOTS, PROMPT, OUTPUT)
                        seen[f"{name} {who} eight"].append(eight["measured"]["steady_tokens_per_second"])
                        seen[f"{name} {who} bound"].append(eight["predicted"]["formula_tokens_per_second"])
                file = root / "trace.json"
                both.bench(1, PROMPT, OUTPUT, "--trace", str(file))
                seen[f"{name} hop_ms"] = hops_ms(json.loads(file.read_text()), ("left", "right"))
                both.stop()
                both.serve(
                    *rounded, "--objective", "throughput", "--schedule", "bubble", slots=SLOTS, context=CONTEXT
                )
                for _ in range(rounds):
                    bubble = both.bench(SLOTS, PROMPT, OUTPUT)
                    seen[f"{name} two bubble"].append(bubble["measured"]["steady_tokens_per_second"])
                    seen[f"{name} two bubble bound"].append(bubble["predicted"]["formula_tokens_per_second"])
                both.stop()
                for chunk in ((), ("--prompt-chunk", str(LONG))):
                    both.serve(*rounded, "--objective", "throughput", *chunk, slots=1, context=LONG + 64)
                    for _ in range(rounds):
                        took = both.bench(1, LONG, 2)["measured"]["time_to_first_token_ms"]
                        seen[f"{name} two {'unchunked' if chunk else 'chunked'} first_ms"].append(took)
                    both.stop()
                single.stop()
    return {name: median(values) for name, values in seen.items()}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--kinds", nargs="*", default=["", "int4"], metavar="int4")
    args = parser.parse_args(argv)
    print(json.dumps(measure(args.rounds, args.kinds), indent=1))


if __name__ == "__main__":
    main()
