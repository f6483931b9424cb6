"""One sequence over two devices, by the code of several checkouts, by turns: what a change does to a step and a hop.

    git worktree add /tmp/before HEAD~1
    python -m benchmarks.trees /tmp/before .

Each checkout's household has two devices of a pinned core, in namespaces at 1 Gbit/s with TLS; all live at once, who is
not asked sleeps; each plans for itself. 1.24 B parameters, medians; hops from traces. Needs root (namespaces).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median

from benchmarks.models import LLAMA_3_2_1B, write_llama
from benchmarks.two_devices import API, CONTEXT, MBPS, PROMPT, SLOTS, Household, hops_ms
from tests.household import Device
from tests.lab.netns import Lab, require_lab

OUTPUT = 48


@contextmanager
def running(tree: Path) -> Iterator[None]:
    """What is started within runs this checkout's code."""
    here, path = Path.cwd(), os.environ.get("PYTHONPATH")
    os.chdir(tree)
    os.environ["PYTHONPATH"] = str(tree)
    try:
        yield
    finally:
        os.chdir(here)
        if path is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = path


def measure(trees: Sequence[Path], kind: str, rounds: int, root: Path, lab: Lab, stack: ExitStack) -> dict[str, float]:
    model = write_llama(root / "model", LLAMA_3_2_1B)
    options = [*(["--quantize", kind] if kind else []), "--objective", "throughput"]
    houses: list[tuple[Household, list[str]]] = []
    for turn, tree in enumerate(trees):
        names = [f"{'ab'[core]}{turn}" for core in range(2)]
        with running(tree):
            devices = [
                Device(root / name, name, memory="8GB", port=8643, api=API, prefix=lab.argv(2 * turn + core, [], core))
                for core, name in enumerate(names)
            ]
            for device in devices:
                stack.callback(device.start().stop)
            for device in devices:
                device.wait_ready()
            devices[1].cli("join", devices[0].cli("invite").stdout.split()[-1])
            house = Household(devices[0], model)
            cut = house.serve(*options, slots=SLOTS, context=CONTEXT)
        stages = [(one["device"], one["first_layer"], one["last_layer"]) for one in cut]
        print(tree, stages, file=sys.stderr, flush=True)
        houses.append((house, names))
    seen: dict[str, list[float]] = defaultdict(list)
    file = root / "trace.json"
    for _ in range(rounds):
        for tree, (house, names) in zip(trees, houses, strict=True):
            seen[f"{tree}, step, ms"].append(house.bench(1, PROMPT, OUTPUT)["measured"]["step_ms"])
            house.bench(1, PROMPT, OUTPUT, "--trace", str(file))
            seen[f"{tree}, hop, ms"].append(median(hops_ms(json.loads(file.read_text()), names)))
    found = {name: median(values) for name, values in seen.items()}
    first = trees[0]
    for tree in trees[1:]:
        for what in ("step", "hop"):
            pairs = zip(seen[f"{tree}, {what}, ms"], seen[f"{first}, {what}, ms"], strict=True)
            found[f"{tree} / {first}, {what}, by round"] = median(own / before for own, before in pairs)
    return {name: round(value, 3) for name, value in found.items()}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trees", nargs="+", type=Path, help="checkouts, the one to compare with first")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--kind", default="int4", choices=("", "none", "int8", "int4"))
    args = parser.parse_args(argv)
    require_lab()
    trees = [tree.resolve() for tree in args.trees]
    with tempfile.TemporaryDirectory(prefix="peerllm-bench-") as root, Lab(2 * len(trees)) as lab, ExitStack() as stack:
        for host in range(2 * len(trees)):
            lab.limit(host, MBPS)
        print(json.dumps(measure(trees, args.kind, args.rounds, Path(root), lab, stack), indent=1))


if __name__ == "__main__":
    main()
