"""A recorded trace as a Gantt chart: when each device computes, and what is on the way to another meanwhile."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peerllm.cli.figures.gantt import COLOURS, FAINT, INK, MAX_BARS, MAX_HEIGHT, lighter, require
from peerllm.cli.terminal import printable
from peerllm.errors import BadInputError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COMPUTE_HEIGHT, WAY_HEIGHT = 0.78, 0.42  # of a row
MIN_SHARE, LETTER_SHARE = 0.0006, 0.0055  # of the chart's width: the thinnest bar, and a letter
GREY = "#9aa1ab"

What = tuple[int, int]  # a sequence, and the position its tokens begin at; (-1, -1): several sequences


@dataclass(frozen=True, slots=True)
class ChartBar:
    """Milliseconds from the beginning of the recording; `row` is a device, or "a → b"."""

    row: str
    start: float
    end: float
    what: What
    tokens: int
    prompt: bool


def bars(trace: Mapping[str, Any]) -> list[ChartBar]:
    """Passes, and the ways of frames with hidden states; rows in the order of the devices."""
    events: Sequence[Mapping[str, Any]] = trace["traceEvents"]
    names = {one["pid"]: str(one["args"]["name"]) for one in events if one["name"] == "process_name"}
    found = {name: [] for name in names.values()}  # type: dict[str, list[ChartBar]]
    begun: dict[tuple[int, float], Mapping[str, Any]] = {}
    for one in events:
        if one["ph"] != "X":
            continue
        if one["name"].startswith("stage "):
            found[names[one["pid"]]].append(_bar(names[one["pid"]], one["ts"], one["ts"] + one["dur"], one))
        elif one["name"] == "send activation":
            begun[one["pid"], one["ts"]] = one
    ways: dict[str, list[ChartBar]] = {}
    started: dict[tuple[int, Any], Mapping[str, Any]] = {}
    for one in events:
        if one["ph"] == "b" and one["name"].startswith("hop to ") and (one["pid"], one["ts"]) in begun:
            started[one["pid"], one["id"]] = one
        elif one["ph"] == "e" and (one["pid"], one["id"]) in started:
            first = started.pop((one["pid"], one["id"]))
            row = f"{names[one['pid']]} → {first['name'].removeprefix('hop to ')}"
            sent = begun[one["pid"], first["ts"]]
            ways.setdefault(row, []).append(_bar(row, first["ts"], one["ts"], sent))
    ordered: list[ChartBar] = []
    for name, computed in found.items():
        ordered += computed
        for row, carried in ways.items():
            ordered += carried if row.startswith(f"{name} → ") else []
    return ordered


def _bar(row: str, start: float, end: float, event: Mapping[str, Any]) -> ChartBar:
    args = event["args"]
    sequences, positions = args.get("sequences", []), args.get("positions", [])
    what = (sequences[0], positions[0]) if len(sequences) == 1 else (-1, -1)
    tokens = args.get("tokens", 0)
    return ChartBar(row, start / 1000, end / 1000, what, tokens, tokens > len(sequences))


def draw(trace: Mapping[str, Any], path: Path) -> None:
    """Writes the chart (.svg or .png). BadInputError where nothing was computed, or the file cannot be written."""
    require()
    from matplotlib.figure import Figure

    shown = bars(trace)
    if not shown:
        raise BadInputError("nothing was asked of the model meanwhile: there is nothing to draw")
    limit = sorted(bar.start for bar in shown)[min(len(shown), MAX_BARS) - 1]
    shown = [bar for bar in shown if bar.start <= limit]
    rows = list(dict.fromkeys(bar.row for bar in shown))
    figure = Figure(figsize=(13, min(1.5 + 0.5 * len(rows), MAX_HEIGHT)), layout="constrained")
    axes = figure.subplots()
    begin, end = min(bar.start for bar in shown), max(bar.end for bar in shown)
    _paint(axes, shown, {row: place for place, row in enumerate(rows)}, begin, end - begin)
    _frame(axes, rows, end - begin)
    model = printable(str(trace["otherData"]["model"])).replace("$", r"\$")
    axes.set_title(
        f"{Path(model).name}: what was computed, and what was on the way", loc="left", color=INK, fontsize=12
    )
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise BadInputError(f"{path} cannot be written: {error.strerror or error}") from error


def _paint(axes: Axes, shown: Iterable[ChartBar], places: Mapping[str, int], begin: float, length: float) -> None:
    colours = _colours(shown)
    for bar in shown:
        place, computes = places[bar.row], " → " not in bar.row
        height, start, took = COMPUTE_HEIGHT if computes else WAY_HEIGHT, bar.start - begin, bar.end - bar.start
        colour = colours[_part(bar)]
        face = lighter(colour) if bar.prompt else colour
        span = [(start, max(took, MIN_SHARE * length))]
        axes.broken_barh(span, (place - height / 2, height), facecolors=face, edgecolors="white", linewidths=0.5)
        label = f"{bar.what[1]}–{bar.what[1] + bar.tokens - 1}" if bar.prompt else str(bar.what[1])
        if bar.what[0] >= 0 and took > LETTER_SHARE * length * (len(label) + 1):
            ink = INK if bar.prompt else "white"
            axes.text(start + took / 2, place, label, color=ink, fontsize=7, ha="center", va="center_baseline")


def _part(bar: ChartBar) -> What:
    """What has a colour of its own: each chunk of a prompt, all steps of a sequence."""
    return bar.what if bar.prompt else (bar.what[0], -1)


def _colours(shown: Iterable[ChartBar]) -> dict[What, str]:
    parts = dict.fromkeys(_part(bar) for bar in shown)
    return {part: GREY if part[0] < 0 else COLOURS[place % len(COLOURS)] for place, part in enumerate(parts)}


def _frame(axes: Axes, rows: Sequence[str], length: float) -> None:
    axes.set_xlim(0, length or 1)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_yticks(range(len(rows)), [printable(row).replace("$", r"\$") for row in rows])
    for label, row in zip(axes.get_yticklabels(), rows, strict=True):
        label.set_color(INK if " → " not in row else "#7b828c")
    axes.grid(axis="x", color=FAINT, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, colors=INK)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.set_xlabel(
        "milliseconds; wide bars: computing, narrow bars: on the way; numbers: positions of the tokens", color=INK
    )
