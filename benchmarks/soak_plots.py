"""The plot of a soak: each kind of count over time, a line per process."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from benchmarks.soak_trend import TOLERANCES, Series

TITLES = {"memory": "memory of its own, MB", "tasks": "asyncio tasks", "files": "open files", "threads": "threads"}


def plot(series: Mapping[tuple[str, str], Series], file: Path) -> None:
    """A PNG."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    processes = sorted({process for process, _ in series})
    figure, axes = pyplot.subplots(2, 2, figsize=(11, 7), sharex=True)
    for counted, axis in zip(TOLERANCES, axes.flat, strict=True):
        for (process, what), points in sorted(series.items()):
            if what == counted:
                scale = 1e-6 if counted == "memory" else 1.0
                look = {"ls": "--" if process.endswith("engine") else "-", "color": f"C{processes.index(process)}"}
                axis.plot([t / 60 for t, _ in points], [v * scale for _, v in points], lw=1.2, label=process, **look)
        axis.set_title(TITLES[counted], fontsize=10)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    for axis in axes[1]:
        axis.set_xlabel("minutes of load")
    axes[0][0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    pyplot.close(figure)
