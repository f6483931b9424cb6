"""The decision chart of docs/planner.md: which method runs when. `python -m benchmarks.planner_chart` draws it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure as Canvas
from matplotlib.patches import FancyBboxPatch

from benchmarks.planner_plots import COLOURS, STYLE

PATH = Path(__file__).parent.parent / "docs" / "planner-methods.png"
WIDTH, HEIGHT = 112, 100  # of the drawing, in its own units
ASKS, DOES, ENDS = "#fff7e0", "#eef3fa", "#e8f5e9"

Box = tuple[float, float, float, float, str, str]  # centre x and y, width, height, text, colour
Arrow = tuple[tuple[float, float], tuple[float, float], str]  # from, to, what is written beside it

TITLE = "title"

LATENCY: list[Box] = [
    (27, 96, 50, 6, "latency: any layer on any device,\nleast time for one request", TITLE),
    (27, 84, 50, 8, "all blocks equal in time, bytes and hops?\n(4 layers or more)", ASKS),
    (
        14,
        62,
        24,
        24,
        "search by head position\n(equal_blocks)\n\nLagrangian bound on visits,\nraised by a bundle method\n"
        "local search over orders\nlabel setting, 48 then 400\nlabels (to 40,000 up to\n16 devices)",
        DOES,
    ),
    (14, 37, 24, 12, "plan found, and proven,\nwork limit reached, or\nmore than 16 devices?", ASKS),
    (
        43,
        40,
        20,
        38,
        "search for any layers\n(mixed_layers)\n\nLagrangian bound on\nmemory, raised by a\nbundle method\n\n"
        "label setting below a\ncutoff between bound\nand best; wider while\nundecided\n\n"
        "neighbourhood search\nbefore wide passes",
        DOES,
    ),
    (
        27,
        9,
        50,
        10,
        "plan + bound; optimal if they meet\n"
        "proof: every head position refuted,\nor label setting that dropped no label",
        ENDS,
    ),
]
LATENCY_ARROWS: list[Arrow] = [
    ((27, 93), (27, 88), ""),
    ((14, 80), (14, 74), "yes"),
    ((43, 80), (43, 59), "no"),
    ((14, 50), (14, 43), ""),
    ((14, 31), (14, 14), "yes"),
    ((26, 37), (33, 37), "no"),
    ((43, 21), (43, 14), ""),
]
THROUGHPUT: list[Box] = [
    (84, 96, 50, 6, "throughput: one range per device,\nmost tokens per second", TITLE),
    (
        84,
        83,
        50,
        10,
        "classes of interchangeable devices;\nbranch and bound over micro-batch sizes:\n"
        "an interval is refuted or split; a single size is searched",
        DOES,
    ),
    (84, 69, 50, 8, "one size: Lagrangian bound on visits;\nif it exceeds the cutoff, the size is refuted", DOES),
    (84, 56, 50, 8, "layers × classes² × subsets of used\ndevices up to 2,000,000?", ASKS),
    (70, 36, 22, 24, "subset dynamic\nprogram\n\nexact for this size", DOES),
    (
        96,
        36,
        26,
        24,
        "bundle method: tighter bound\nbeam search: 48, then 400 labels\nlocal search, if blocks are equal\n\n"
        "subsets up to 65,536:\nsubset dynamic program,\nelse the size stays open\nwith its bound",
        DOES,
    ),
    (
        84,
        9,
        50,
        10,
        "plan + bound; optimal if they meet\nproof: every interval refuted or searched\n"
        "(the bound leaves shared media out)",
        ENDS,
    ),
]
THROUGHPUT_ARROWS: list[Arrow] = [
    ((84, 93), (84, 88), ""),
    ((84, 78), (84, 73), ""),
    ((84, 65), (84, 60), ""),
    ((70, 52), (70, 48), "yes"),
    ((96, 52), (96, 48), "no"),
    ((70, 24), (70, 14), ""),
    ((96, 24), (96, 14), ""),
]


def draw(path: Path) -> None:
    """Two columns, one for each objective, from the question to what is proven."""
    with mpl.rc_context(STYLE):
        canvas = Canvas(figsize=(10.5, 8.2), layout="constrained")
        axes = canvas.subplots()
        axes.set_xlim(0, WIDTH)
        axes.set_ylim(0, HEIGHT)
        axes.axis("off")
        for objective, boxes, arrows in (
            ("latency", LATENCY, LATENCY_ARROWS),
            ("throughput", THROUGHPUT, THROUGHPUT_ARROWS),
        ):
            for box in boxes:
                _box(axes, box, COLOURS[objective])
            for arrow in arrows:
                _arrow(axes, arrow)
        canvas.savefig(path, dpi=120, metadata={"Software": None})


def _box(axes: Any, box: Box, colour: str) -> None:
    x, y, width, height, text, face = box
    title = face == TITLE
    shape = FancyBboxPatch(
        (x - width / 2, y - height / 2), width, height, boxstyle="round,pad=0,rounding_size=1.2",
        facecolor=colour if title else face, edgecolor=colour, linewidth=1.0,
    )  # fmt: skip
    axes.add_patch(shape)
    axes.text(x, y, text, ha="center", va="center", fontsize=8, color="white" if title else "#222222")


def _arrow(axes: Any, arrow: Arrow) -> None:
    start, end, text = arrow
    axes.annotate("", xy=end, xytext=start, arrowprops={"arrowstyle": "-|>", "color": "#555555", "linewidth": 1.0})
    if text:
        lift = 1.5 if start[1] == end[1] else 0.0
        axes.text(
            (start[0] + end[0]) / 2 + (0 if lift else 1),
            (start[1] + end[1]) / 2 + lift,
            text,
            fontsize=8,
            color="#555555",
            va="center",
        )


if __name__ == "__main__":
    draw(PATH)
