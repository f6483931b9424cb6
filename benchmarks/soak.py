"""Minutes of a fixed load on the demo's household, its processes watched: does anything grow?

Streaming clients, some hanging up midway, whole answers, bad requests, a page opened and closed, all without a pause;
every answer is compared with what the household said alone. `--write` puts the table and the plot into
docs/benchmarks.md. With `--stalls` random devices stand still for half a second now and
then, and nobody may take them for dead. Exits with 1 if a series grows beyond its tolerance or an answer is wrong.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import psutil

from benchmarks.soak_load import Load
from benchmarks.soak_plots import plot
from benchmarks.soak_trend import Trend, trend
from benchmarks.soak_watch import Watch
from peerllm.builtin import MODEL_DIR
from peerllm.cli.demo.demo import NAMES, SLOTS
from peerllm.cli.demo.demo_memory import limits, sizes_of
from tests.clients import clients
from tests.household import Device, household

DEVICES = 3
CONTEXT = 1024
EVERY_S = 3.0  # between two samples
STALL_S = 0.5  # less than the second after which a device counts as silent
BETWEEN_STALLS_S = (1.0, 5.0)
STALL_SEED = 5
PAGE = Path(__file__).parent.parent / "docs" / "benchmarks.md"
PLOT = PAGE.with_name("soak.png")


async def stall(devices: Sequence[Device], counts: Counter[str]) -> None:
    """Again and again a random device stands still for a moment, all its processes together."""
    dice = random.Random(STALL_SEED)
    while True:
        await asyncio.sleep(dice.uniform(*BETWEEN_STALLS_S))
        process = dice.choice(devices).process
        assert process is not None
        processes = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        for one in processes:
            one.suspend()
        try:
            await asyncio.sleep(STALL_S)
        finally:
            for one in processes:
                one.resume()
        counts["stalls"] += 1


def taken_for_dead(devices: Sequence[Device]) -> list[str]:
    """What the devices' logs say of devices that went away, though none did."""
    logs = ((device.name, (device.data_dir / "log.txt").read_text(errors="replace")) for device in devices)
    signs = re.compile(r"is offline|is gone")
    return [f"{name}: {line}" for name, log in logs for line in log.splitlines() if signs.search(line)]


async def soak(devices: Sequence[Device], minutes: float, stalls: bool = False) -> tuple[Watch, Counter[str]]:
    """Load and watch; raises what went wrong with an answer."""
    watch, stop = Watch(devices), asyncio.Event()
    async with clients(devices[0].url, devices[0].token()) as session:
        load = Load(session)
        loading = asyncio.create_task(load.run(stop), name="load")
        stalling = asyncio.create_task(stall(devices, load.counts), name="stalls") if stalls else None
        started = time.monotonic()
        while (now := time.monotonic() - started) < 60 * minutes and not loading.done():
            await watch.sample(session, now)
            await asyncio.wait({loading}, timeout=EVERY_S)
        stop.set()
        if stalling is not None:
            stalling.cancel()
            await asyncio.wait({stalling})
        await loading
    return watch, load.counts


def table(trends: Sequence[Trend]) -> str:
    """Markdown, a line per process."""
    lines = [
        "| process | memory, MB (growth) | asyncio tasks | open files | threads |",
        "|---|---|---|---|---|",
    ]
    found = {(one.process, one.counted): one for one in trends}
    for process in dict.fromkeys(one.process for one in trends):
        cells = []
        for counted, scale, digits in (("memory", 1e6, 2), ("tasks", 1, 1), ("files", 1, 1), ("threads", 1, 1)):
            one = found.get((process, counted))
            cells.append(f"{one.level / scale:.{digits}f} ({one.growth / scale:+.{digits}f})" if one else "")
        lines.append(f"| {process} | {' | '.join(cells)} |")
    return "\n".join(lines)


def verdict(trends: Sequence[Trend], counts: Counter[str], minutes: float) -> str:
    asked = ", ".join(f"{count} {name}" for name, count in sorted(counts.items()))
    growing = [f"{one.process}'s {one.counted} (+{one.growth:.4g})" for one in trends if one.grows]
    if growing:
        return f"After {minutes:g} minutes these grow: {', '.join(growing)}. Load: {asked}."
    return f"After {minutes:g} minutes nothing grows. Load: {asked}."


def write(page: Path, text: str) -> None:
    """Between the marks in the page."""
    marked = re.compile(r"(<!-- soak -->\n).*?(<!-- /soak -->)", re.DOTALL)
    old = page.read_text(encoding="utf-8")
    if not marked.search(old):
        raise SystemExit(f"{page} has no marks for the soak's table")
    page.write_text(marked.sub(lambda found: f"{found[1]}{text}\n{found[2]}", old), encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    """0: nothing grows, and every answer was right."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--stalls", action="store_true", help=f"devices stand still for {STALL_S:g} s now and then")
    parser.add_argument("--write", action="store_true", help="table and plot into docs/")
    parser.add_argument("--plot", type=Path, help="where else the plot goes")
    args = parser.parse_args(argv)
    names = NAMES[:DEVICES]
    lent = limits(sizes_of(MODEL_DIR, SLOTS, CONTEXT), DEVICES)
    memory = {name: str(nbytes) for name, nbytes in zip(names, lent, strict=True)}
    with (
        tempfile.TemporaryDirectory(prefix="peerllm-soak-") as directory,
        household(Path(directory), names, memory=memory) as devices,
    ):
        devices[0].cli("run", "builtin", "--slots", str(SLOTS), "--context", str(CONTEXT))
        watch, counts = asyncio.run(soak(devices, args.minutes, args.stalls))
        dead = taken_for_dead(devices)
    trends = [trend(process, counted, series) for (process, counted), series in sorted(watch.series.items())]
    said = verdict(trends, counts, args.minutes)
    print("\n".join([table(trends), "", said, *(f"taken for dead: {line}" for line in dead)]))
    for file in filter(None, (args.plot, PLOT if args.write else None)):
        plot(watch.series, file)
    if args.write:
        write(PAGE, f"{table(trends)}\n\n{said}")
    return int(any(one.grows for one in trends) or bool(dead))


if __name__ == "__main__":
    sys.exit(main())
