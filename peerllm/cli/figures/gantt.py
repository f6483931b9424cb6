"""A simulated run as a Gantt chart: who computes and who sends, when, for which group of sequences."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from peerllm.cli.terminal import human_rate, printable
from peerllm.errors import BadInputError, UnavailableError
from peerllm.planner.scenario.scenario import Scenario
from peerllm.planner.simulator.run_report import SimulatedRun, SimulatedSpan
from peerllm.types import Plan

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SUFFIXES = (".svg", ".png")
DRAWN_STEPS = 4  # of each group, where the chart need not be whole
MAX_BARS = 5_000  # more are neither legible nor quick to draw
LEGEND_GROUPS = 12
MAX_HEIGHT = 100.0  # inches
COMPUTE_HEIGHT, TRANSFER_HEIGHT = 0.78, 0.42  # of a row
MIN_SHARE = 0.0008  # of the chart's width: nothing is drawn so thin that it cannot be seen
EDGED_SHARE = 0.003  # of the width, from which a transfer is set off from its neighbours
LETTER_SHARE = 0.005  # of the width that a letter takes: bars too short for their label have none
COLOURS = ("#3b6fb6", "#e08a2b", "#3f9c6b", "#c8504f", "#8466b5", "#2a9fb0", "#b8578f", "#8a7a3d")
INK, FAINT = "#2b2f36", "#d9dce1"


def require() -> None:
    """UnavailableError with what to install, where matplotlib is missing."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise UnavailableError("charts need matplotlib: pip install 'peerllm[bench]'") from error


def draw(run: SimulatedRun, scenario: Scenario, plan: Plan, path: Path, whole: bool = False) -> None:
    """Writes the chart; it ends after a few steps of each group unless the `whole` run is asked for."""
    require()
    from matplotlib.figure import Figure

    rows = _rows(run, scenario, plan)
    end = window_ms(run, whole)
    figure = Figure(figsize=(13, min(1.7 + 0.45 * len(rows), MAX_HEIGHT)), layout="constrained")
    axes = figure.subplots()
    colours = palette(len(run.returns))
    shown = [span for span in run.events if span.start_ms < end]
    places = {row: place for place, row in enumerate(rows)}
    _bars(axes, shown, places, colours, end)
    _frame(axes, run, rows, end)
    _legend(figure, run, colours)
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise BadInputError(f"{path} cannot be written: {error.strerror or error}") from error


def window_ms(run: SimulatedRun, whole: bool = False) -> float:
    """Until when to draw: all prompts and a few steps of each group, at most MAX_BARS bars."""
    end = run.makespan_ms
    if not whole:
        steps = max(times[min(DRAWN_STEPS, len(times) - 1)] for times in run.returns)
        end = min(end, max(steps, 1.5 * max(times[0] for times in run.returns)))
    starts = sorted(span.start_ms for span in run.events)
    return min(end, starts[MAX_BARS]) if len(starts) > MAX_BARS else end


def palette(groups: int) -> list[str]:
    """A colour for each group: a few that differ well, else as many hues as needed."""
    if groups <= len(COLOURS):
        return list(COLOURS[:groups])
    return [_hex(colorsys.hls_to_rgb(place / groups, 0.48 + 0.1 * (place % 2), 0.55)) for place in range(groups)]


def lighter(colour: str) -> str:
    """The same colour, for a prompt."""
    return _hex(tuple(1 - 0.45 * (1 - int(colour[at : at + 2], 16) / 255) for at in (1, 3, 5)))


def _hex(rgb: Sequence[float]) -> str:
    return "#" + "".join(f"{round(255 * part):02x}" for part in rgb)


def _rows(run: SimulatedRun, scenario: Scenario, plan: Plan) -> list[tuple[str, str]]:
    """(kind, resource) from top to bottom, along the ring: a device, then the links it sends over; media last."""
    rows: dict[tuple[str, str], None] = {}
    for place, stage in enumerate(plan.stages):
        after = plan.stages[(place + 1) % len(plan.stages)].device
        here, there = scenario.devices[stage.device].name, scenario.devices[after].name
        rows["compute", here] = None
        if after != stage.device:
            rows["transfer", f"{here} to {there}"] = None
    rows |= dict.fromkeys(("air", span.resource) for span in run.events if span.kind == "air")
    return list(rows)


def _label(kind: str, name: str) -> str:
    """A name as text: no mathematics, no control characters."""
    plain = printable(name).replace("\n", " ").replace("$", r"\$")
    return {"compute": plain, "transfer": plain.replace(" to ", " → "), "air": f"{plain} (shared)"}[kind]


def _bars(
    axes: Axes, spans: Sequence[SimulatedSpan], places: dict[tuple[str, str], int], colours: Sequence[str], end: float
) -> None:
    least = MIN_SHARE * end
    for span in spans:
        place, colour = places[span.kind, span.resource], colours[span.group]
        computes = span.kind == "compute"
        height = COMPUTE_HEIGHT if computes else TRANSFER_HEIGHT
        took = min(span.end_ms, end) - span.start_ms
        face = colour if span.step else lighter(colour)
        edge = "white" if computes or took > EDGED_SHARE * end else face
        bar = [(span.start_ms, max(took, least))]
        axes.broken_barh(bar, (place - height / 2, height), facecolors=face, edgecolors=edge, linewidths=0.5)
        text, ink = (str(span.step), "white") if span.step else (f"p{(span.sequence or 0) + 1}", INK)
        if computes and took > LETTER_SHARE * end * (len(text) + 1):
            middle = span.start_ms + took / 2
            axes.text(middle, place, text, color=ink, fontsize=7.5, ha="center", va="center_baseline", clip_on=True)


def _frame(axes: Axes, run: SimulatedRun, rows: Sequence[tuple[str, str]], end: float) -> None:
    axes.set_xlim(0, end or 1)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_yticks(range(len(rows)), [_label(kind, name) for kind, name in rows])
    for label, (kind, _) in zip(axes.get_yticklabels(), rows, strict=True):
        label.set_color(INK if kind == "compute" else "#7b828c")
        label.set_fontsize(10 if kind == "compute" else 8)
    for place, (kind, _) in enumerate(rows):
        if kind == "compute":
            axes.axhspan(place - 0.5, place + 0.5, color="#f5f6f8", zorder=0)
    axes.grid(axis="x", color=FAINT, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, colors=INK)
    for spine in axes.spines.values():
        spine.set_visible(False)
    part = "" if end >= run.makespan_ms else f" (the first {end:,.0f} of {run.makespan_ms:,.0f})"
    axes.set_xlabel(f"milliseconds{part}", color=INK)
    steady = run.steady_tokens_per_second
    overall = f"{human_rate(run.tokens_per_second)} tokens/s"
    rate = overall if steady is None else f"{human_rate(steady)} tokens/s while all decode"
    groups = (
        f"{len(run.returns)} × {run.micro_batch} sequences"
        if len(run.returns) * run.micro_batch > 1
        else "one sequence"
    )
    axes.set_title(f"{run.schedule}: {rate}, {groups}", loc="left", color=INK, fontsize=13, fontweight="bold", pad=12)


def _legend(figure: Figure, run: SimulatedRun, colours: Sequence[str]) -> None:
    from matplotlib.patches import Patch

    handles = [Patch(color=colour, label=f"group {place + 1}") for place, colour in enumerate(colours[:LEGEND_GROUPS])]
    if len(colours) > LEGEND_GROUPS:
        handles.append(Patch(color="none", label=f"… {len(colours)} in all"))
    if run.prefill:
        handles.append(Patch(color=lighter(colours[0]), label="lighter: a prompt (p1: of the group's sequence 1)"))
    handles.append(Patch(color="none", label="1, 2, …: decode step"))
    figure.legend(
        handles=handles, loc="outside lower left", ncols=min(len(handles), 9), frameon=False, fontsize=8.5,
        handlelength=1.1, handleheight=0.9, columnspacing=1.4, labelcolor=INK,
    )  # fmt: skip
