"""The plot of docs/planner.md: solve time over devices and over layers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure as Canvas
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, NullLocator

from benchmarks.planner import GROWTH_DEVICES_LAYERS, GROWTH_LAYERS_DEVICES, Point

COLOURS = {"latency": "#2b6cb0", "throughput": "#d9822b"}
DASHES: dict[str, Any] = {"all different": "-", "8 kinds": "--"}
SHAPES = {"all different": "o", "8 kinds": "s"}
STYLE: Any = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 10}


def draw(points: Sequence[Point], path: Path) -> None:
    """Two panels with logarithmic axes; a hollow mark is a size where not every plan is proven optimal."""
    with mpl.rc_context(STYLE):
        canvas = Canvas(figsize=(10.5, 4.4), layout="constrained")
        left, right = canvas.subplots(1, 2, sharey=True)
        over_devices = [p for p in points if p.layers == GROWTH_DEVICES_LAYERS]
        over_layers = [p for p in points if p.devices == GROWTH_LAYERS_DEVICES]
        _panel(left, over_devices, "devices", f"{GROWTH_DEVICES_LAYERS} layers")
        _panel(right, over_layers, "layers", f"{GROWTH_LAYERS_DEVICES} devices")
        left.set_ylabel("median solve time, ms")
        shown = [
            Line2D([], [], color=colour, linestyle=DASHES[household], marker=SHAPES[household], ms=5,
                   label=f"{objective}, {household}")
            for objective, colour in COLOURS.items() for household in DASHES
        ]  # fmt: skip
        hollow: Any = {"color": "#555555", "linestyle": "", "marker": "o", "markerfacecolor": "white"}
        shown.append(Line2D([], [], ms=5, label="not all proven optimal", **hollow))
        left.legend(handles=shown, frameon=False, fontsize=8, loc="upper left")
        canvas.savefig(path, dpi=120, metadata={"Software": None})


def _panel(axis: Any, points: Sequence[Point], along: str, title: str) -> None:
    for objective, colour in COLOURS.items():
        for household, dash in DASHES.items():
            mine = {getattr(p, along): p for p in points if (p.objective, p.household) == (objective, household)}
            line = [mine[size] for size in sorted(mine)]
            sizes, times = sorted(mine), [p.ms for p in line]
            axis.plot(sizes, times, dash, color=colour, linewidth=1.4)
            for size, p in zip(sizes, line, strict=True):
                face = colour if p.optimal else "white"
                axis.plot([size], [p.ms], SHAPES[household], color=colour, markerfacecolor=face, markersize=5)
    axis.set_xscale("log")
    axis.set_yscale("log")
    ticks = sorted({getattr(p, along) for p in points})
    axis.set_xticks(ticks, [str(tick) for tick in ticks])
    axis.xaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.grid(color="#e5e5e5", linewidth=0.6)
    axis.set_axisbelow(True)
    axis.set_xlabel(along)
    axis.set_title(title)
