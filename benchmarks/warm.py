"""One sequence over two devices that keep their caches warm while they wait, and over two that do not, by turns.

Both households live at once, each of two devices of a pinned core, in namespaces at 1 Gbit/s with TLS; who is not asked
sleeps; each plans for itself, with the head at the source. 1.24 B parameters, short answers (a second or so each, for
the machine's speed drifts), medians; hops from a trace of each. Needs root (namespaces).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median

from benchmarks.models import LLAMA_3_2_1B, write_llama
from benchmarks.two_devices import API, CONTEXT, MBPS, PROMPT, SLOTS, Household, hops_ms
from peerllm.cli.device import LocalDevice
from tests.household import Device
from tests.lab.netns import Lab, require_lab

OUTPUT, TRACED = 24, 128
WAYS = {"warm": "always", "not": "never"}


def asking(data: Path, model: str) -> None:
    """In the device's namespace: an answer for each line that comes in, milliseconds a step for each that goes out."""
    body = {"model": model, "sequences": 1, "prompt_tokens": PROMPT, "output_tokens": OUTPUT, "apart": False}
    device = LocalDevice(data)
    for _ in sys.stdin:
        print(device.post("/peerllm/v1/bench", body, 300.0)["step_ms"][0], flush=True)


class Asked:
    """A household's source, and who asks it."""

    def __init__(self, source: Device, model: Path) -> None:
        argv = [*source.prefix, sys.executable, "-m", "benchmarks.warm", "--ask", str(source.data_dir), str(model)]
        self._process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def step_ms(self) -> float:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return float(self._process.stdout.readline())

    def close(self) -> None:
        self._process.communicate(timeout=60)


def measure(root: Path, lab: Lab, kind: str, rounds: int, stack: ExitStack) -> dict[str, list[float]]:
    model = write_llama(root / "model", LLAMA_3_2_1B)
    made: dict[str, list[Device]] = {}
    for way, choice in WAYS.items():
        made[way] = [
            Device(root / f"{way}{core}", f"{way}{core}", memory="8GB", port=8643, api=API,
                   options=("--keep-warm", choice), prefix=lab.argv(2 * len(made) + core, [], core))
            for core in range(2)
        ]  # fmt: skip
        for device in made[way]:
            stack.callback(device.start().stop)
    seen: dict[str, list[float]] = defaultdict(list)
    asked: dict[str, Asked] = {}
    for way, (left, right) in made.items():
        left.wait_ready()
        right.wait_ready()
        right.cli("join", left.cli("invite").stdout.split()[-1])
        options = ["--quantize", kind or "none", "--objective", "throughput", "--private"]
        cut = Household(left, model).serve(*options, slots=SLOTS, context=CONTEXT)
        print(way, [(one["device"], one["first_layer"], one["last_layer"]) for one in cut], file=sys.stderr, flush=True)
        asked[way] = Asked(left, model)
        stack.callback(asked[way].close)
    for _ in range(rounds):
        for way, one in asked.items():
            seen[f"{way}, step"].append(one.step_ms())
    for way, (left, _) in made.items():
        file = root / f"{way}.json"
        Household(left, model).bench(1, PROMPT, TRACED, "--trace", str(file))
        seen[f"{way}, hop"] = hops_ms(json.loads(file.read_text()), [f"{way}{core}" for core in range(2)])
    return seen


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--kind", default="int4", choices=("", "int8", "int4"))
    parser.add_argument("--ask", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.ask:
        asking(Path(args.ask[0]), args.ask[1])
        return
    require_lab()
    with tempfile.TemporaryDirectory(prefix="peerllm-bench-") as root, Lab(2 * len(WAYS)) as lab, ExitStack() as stack:
        for host in range(2 * len(WAYS)):
            lab.limit(host, MBPS)
        seen = measure(Path(root), lab, args.kind, args.rounds, stack)
    found = {f"{name}, ms": round(median(values), 3) for name, values in seen.items()}
    by_round = zip(seen["warm, step"], seen["not, step"], strict=True)
    print(json.dumps({**found, "warm / not, by round": round(median(a / b for a, b in by_round), 3)}, indent=1))


if __name__ == "__main__":
    main()
