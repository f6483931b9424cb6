"""One sequence over two devices that keep their caches warm while they wait, and over two that do not, by turns.

Both households live at once, each of two devices of a pinned core, in namespaces at 1 Gbit/s with TLS; who is not asked
sleeps; each plans for itself. 1.24 B parameters, answers of 200 tokens, medians; hops and passes from traces. Needs
root (namespaces).
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from benchmarks.models import LLAMA_3_2_1B, write_llama
from benchmarks.two_devices import API, CONTEXT, MBPS, PROMPT, SLOTS, Household, hops_ms
from tests.household import Device
from tests.lab.netns import Lab, require_lab
from tests.traces import passes

TRACED = 200
WAYS = {"warm": "always", "not": "never"}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--kind", default="int4", choices=("", "int8", "int4"))
    args = parser.parse_args(argv)
    require_lab()
    seen: dict[str, list[float]] = defaultdict(list)
    asked = [*(["--quantize", args.kind] if args.kind else []), "--objective", "throughput"]
    with tempfile.TemporaryDirectory(prefix="peerllm-bench-") as directory, Lab(2 * len(WAYS)) as lab:
        root = Path(directory)
        model = write_llama(root / "model", LLAMA_3_2_1B)
        for host in range(2 * len(WAYS)):
            lab.limit(host, MBPS)
        made: dict[str, list[Device]] = {}
        try:
            for way, choice in WAYS.items():
                made[way] = [
                    Device(root / f"{way}{core}", f"{way}{core}", memory="8GB", port=8643, api=API,
                           options=("--keep-warm", choice), prefix=lab.argv(2 * len(made) + core, [], core)).start()
                    for core in range(2)
                ]  # fmt: skip
            for left, right in made.values():
                left.wait_ready()
                right.wait_ready()
                right.cli("join", left.cli("invite").stdout.split()[-1])
            for way, (left, _) in made.items():
                cut = Household(left, model).serve(*asked, slots=SLOTS, context=CONTEXT)
                print(way, [(one["device"], one["first_layer"], one["last_layer"]) for one in cut], flush=True)
            for number in range(args.rounds):
                for way, (left, _) in made.items():
                    file = root / f"{way}-{number}.json"
                    took = Household(left, model).bench(1, PROMPT, TRACED, "--trace", str(file))["measured"]
                    trace = json.loads(file.read_text())
                    seen[f"{way}, step"].append(took["step_ms"])
                    seen[f"{way}, hop"] += hops_ms(trace, [f"{way}{core}" for core in range(2)])
                    steps = (p for c in range(2) for p in passes(trace, f"{way}{c}") if p["name"].endswith("step"))
                    seen[f"{way}, computing"].append(sum(p["dur"] for p in steps) / 1000 / (TRACED - 1))
        finally:
            for device in (one for some in made.values() for one in some):
                device.stop()
    print(json.dumps({f"{name}, ms": round(median(values), 3) for name, values in seen.items()}, indent=1))


if __name__ == "__main__":
    main()
