"""The plots of docs/edgeshard.md."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure as Canvas

from benchmarks.edgeshard_paper import SWEPT, Cell, Results
from benchmarks.edgeshard_testbed import MODELS, PUBLISHED, PUBLISHED_NO_BUBBLE_GAIN, STRATEGIES, Figure

COLOURS = {"edge-solo": "#7f7f7f", "cloud-edge-even": "#d9822b", "cloud-edge-opt": "#2b6cb0", "edgeshard": "#2f855a"}
MARKERS = {"edge-solo": "s", "cloud-edge-even": "^", "cloud-edge-opt": "D", "edgeshard": "o"}
WIDTH = 0.38  # of a bar
STYLE: Any = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 10}


def draw(found: Results, folder: Path) -> None:
    """Write the three PNG files into `folder`."""
    with mpl.rc_context(STYLE):
        for name, plot in (("bars", bars), ("bandwidth", bandwidth), ("bubbles", bubbles)):
            canvas = plot(found)
            canvas.savefig(folder / f"edgeshard-{name}.png", dpi=120, metadata={"Software": None})


def bars(found: Results) -> Canvas:
    """Published against ours, each strategy and model."""
    canvas = Canvas(figsize=(10.5, 6.4), layout="constrained")
    axes: Any = canvas.subplots(2, len(MODELS))
    measures: list[tuple[str, Callable[[Cell], float | None], Callable[[Figure], float]]] = [
        ("ms per token, less is better", lambda one: one.ms_per_token, lambda told: told.ms_per_token),
        ("tokens per second, more is better", lambda one: one.tokens_per_second,
         lambda told: told.tokens_per_second),
    ]  # fmt: skip
    for line, (label, ours, theirs) in enumerate(measures):
        for column, model in enumerate(MODELS):
            axis = axes[line, column]
            high = 0.0
            empty: list[float] = []
            for place, strategy in enumerate(STRATEGIES):
                told = PUBLISHED[model][strategy]
                pair = (theirs(told) if told else None, ours(found.main[model][strategy]))
                for side, value in enumerate(pair):
                    at = place + (side - 0.5) * WIDTH
                    if value is None:
                        empty.append(at)
                        continue
                    high = max(high, value)
                    colour = COLOURS[strategy]
                    face = {"color": "white", "edgecolor": colour, "hatch": "////"} if not side else {"color": colour}
                    axis.bar(at, value, WIDTH * 0.92, **face)
                    axis.annotate(plain(value), (at, value), (0, 2), textcoords="offset points", ha="center", size=7)
            axis.set_ylim(0, high * 1.12)
            for at in empty:
                axis.text(at, high * 0.02, "out of memory", ha="center", va="bottom", rotation=90, fontsize=7,
                          color="#666666")  # fmt: skip
            axis.set_xticks(range(len(STRATEGIES)), [strategy.replace("-e", "-\ne").replace("-o", "-\no").replace(
                "edge-s", "edge-\ns") for strategy in STRATEGIES], fontsize=8)  # fmt: skip
            axis.set_xlim(-0.6, len(STRATEGIES) - 0.4)
            if not line:
                axis.set_title(model)
            if not column:
                axis.set_ylabel(label)
    canvas.suptitle("Left, hatched: published. Right, filled: planned here on the public profile", fontsize=10)
    return canvas


def plain(value: float) -> str:
    """Three or four digits."""
    return f"{value:.{2 if value < 20 else 1 if value < 100 else 0}f}"


def bandwidth(found: Results) -> Canvas:
    """Both objectives over the bandwidth between source and cloud."""
    canvas = Canvas(figsize=(9.5, 6.4), layout="constrained")
    axes: Any = canvas.subplots(len(SWEPT), 2, sharex=True)
    for line, model in enumerate(SWEPT):
        by = found.sweep[model]
        for column, label in enumerate(("ms per token", "tokens per second")):
            axis = axes[line, column]
            for strategy in STRATEGIES:
                points = [(mbps, at[strategy].ms_per_token if not column else at[strategy].tokens_per_second)
                          for mbps, at in by.items()]  # fmt: skip
                known = [(mbps, value) for mbps, value in points if value is not None]
                name = strategy if known else f"{strategy}: out of memory"
                axis.plot(*(zip(*known, strict=True) if known else ([], [])), color=COLOURS[strategy],
                          marker=MARKERS[strategy], markersize=4, linewidth=1.6, label=name)  # fmt: skip
            axis.set_xscale("log")
            axis.set_xticks(list(by), [str(mbps) if mbps != 40 else "" for mbps in by])
            axis.minorticks_off()
            axis.set_ylim(bottom=0)
            axis.set_ylabel(label)
            axis.set_title(model)
            axis.grid(alpha=0.25)
            if line == len(SWEPT) - 1:
                axis.set_xlabel("Mbps between source and cloud (log)")
        axes[line, 0].legend(fontsize=8, frameon=False)
    return canvas


def bubbles(found: Results) -> Canvas:
    """The same plans simulated with and without bubbles."""
    canvas = Canvas(figsize=(9.5, 3.6), layout="constrained")
    axes: Any = canvas.subplots(1, len(SWEPT) + 1, width_ratios=[4, 2, 1])
    for axis, model in zip(axes, MODELS, strict=True):
        runs = found.bubbles[model]
        top = max(run.no_bubble for run in runs.values())
        for place, (strategy, run) in enumerate(runs.items()):
            for side, value in enumerate((run.bubble, run.no_bubble)):
                at = place + (side - 0.5) * WIDTH
                face = {"color": COLOURS[strategy]} if side else {"color": "white", "edgecolor": COLOURS[strategy]}
                axis.bar(at, value, WIDTH * 0.92, **face)
            told = PUBLISHED_NO_BUBBLE_GAIN.get(strategy) if model == next(iter(MODELS)) else None
            text = f"{run.gain:+.2f}" + (f"\n(published {told:+.2f})" if told else "")
            axis.text(place, max(run.bubble, run.no_bubble) + top * 0.02, text, ha="center", fontsize=8)
        axis.set_xticks(range(len(runs)), [f"{name}\n{run.micro_batch} × {run.micro_batches}" for name, run in
                                          runs.items()], fontsize=7.5)  # fmt: skip
        axis.set_xlim(-0.6, len(runs) - 0.4)
        axis.set_ylim(0, top * 1.18)
        axis.set_title(model)
    axes[0].set_ylabel("tokens per second, simulated")
    canvas.suptitle("Open: with bubbles. Filled: without. Above: the gain. Below: micro-batch × how many", fontsize=9)
    return canvas
