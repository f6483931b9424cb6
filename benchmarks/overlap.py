"""Sending overlaps computing: a long prompt in chunks over a slow link, as its trace shows it.

Two devices of one core each (network namespaces, TLS) with about half of a model in int8 each, joined at `--mbps`.
While a chunk is on its way the sender computes the next one. `--write` draws the trace as docs/overlap.png. Needs root.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.models import LLAMA_3_2_1B, write_llama
from benchmarks.two_devices import SLOTS, Household, pinned
from peerllm.cli.figures.timeline import draw
from peerllm.cli.figures.trace import figures

PROMPT, OUTPUT = 1024, 4
PLOT = Path(__file__).parent.parent / "docs" / "overlap.png"


def recorded(root: Path, mbps: int) -> dict[str, Any]:
    """The trace of one prompt."""
    model = write_llama(root / "model", LLAMA_3_2_1B)
    file = root / "trace.json"
    with pinned(root / "devices", {"left": 0, "right": 1}, mbps) as (left, _):
        household = Household(left, model)
        household.serve("--activations", "exact", "--objective", "throughput", slots=SLOTS, context=PROMPT + 64)
        household.bench(1, PROMPT, OUTPUT, "--trace", str(file))
    found: dict[str, Any] = json.loads(file.read_text())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mbps", type=int, default=100)
    parser.add_argument("--write", action="store_true", help="draw docs/overlap.png")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="peerllm-bench-") as directory:
        trace = recorded(Path(directory), args.mbps)
    if args.write:
        draw(trace, PLOT)
    print(json.dumps(figures(trace)["devices"], indent=1))


if __name__ == "__main__":
    main()
