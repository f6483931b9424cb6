"""`peerllm trace`, and `--trace FILE` elsewhere: what every device of a deployment did when, written to a file."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from peerllm.cli.device import LocalDevice
from peerllm.cli.figures import timeline
from peerllm.cli.figures.gantt import SUFFIXES, require
from peerllm.cli.served import served_here
from peerllm.cli.terminal import human_ms, printable, table
from peerllm.errors import BadInputError

ROUTE = "/peerllm/v1/trace"
Span = tuple[float, float]  # start and end, in microseconds


def run(args: argparse.Namespace) -> None:
    if args.plot:
        if args.plot.suffix.lower() not in SUFFIXES:
            raise BadInputError(f"{args.plot} must end in {' or '.join(SUFFIXES)}")
        require()
    out: Path = args.read or args.out
    found = _read(out) if args.read else _recorded(args)
    try:
        said = json.dumps({"file": str(out), **figures(found)}) if args.json else text(out, found)
        if args.plot:
            timeline.draw(found, args.plot)
    except BadInputError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise BadInputError(f"{out} is no trace of peerllm's") from error
    print(said)


def _recorded(args: argparse.Namespace) -> Mapping[str, Any]:
    device = LocalDevice(args.data)
    model = served_here(device, args.model)
    with recording(device, model, args.out) as found:
        if not args.json:
            print(f"recording {printable(model)} for {args.seconds:g} s", file=sys.stderr)
        with contextlib.suppress(KeyboardInterrupt):
            time.sleep(args.seconds)
    return found


def _read(file: Path) -> Mapping[str, Any]:
    """BadInputError if it is none."""
    try:
        found = json.loads(file.read_bytes())
    except OSError as error:
        raise BadInputError(f"{file} cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise BadInputError(f"{file} is no trace: {error}") from error
    if not isinstance(found, dict):
        raise BadInputError(f"{file} is no trace of peerllm's")
    return found


@contextlib.contextmanager
def recording(device: LocalDevice, model: str, out: Path) -> Iterator[dict[str, Any]]:
    """Records while the block runs, however it ends; then the file holds the trace, and so does what was yielded."""
    writable(out)
    found: dict[str, Any] = {}
    number = device.post(ROUTE, {"model": model})["recording"]
    try:
        yield found
    finally:
        found |= device.post(ROUTE, {"model": model, "recording": number})
        with _telling(out):
            out.write_text(json.dumps(found, separators=(",", ":")))


def writable(out: Path) -> None:
    """BadInputError if the file could not be written: what cannot be kept is not begun."""
    there = out.exists()
    with _telling(out):
        out.open("ab").close()
        if not there:
            out.unlink()


@contextlib.contextmanager
def _telling(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise BadInputError(f"{out} cannot be written: {error.strerror or error}") from error


def figures(trace: Mapping[str, Any]) -> dict[str, Any]:
    """What a trace shows, by device: shares of the time from its first pass to its last."""
    about, events = trace["otherData"], trace["traceEvents"]
    names = {one["pid"]: one["args"]["name"] for one in events if one["name"] == "process_name"}
    spans: dict[tuple[int, str], list[Span]] = {}
    for one in events:
        if one["ph"] == "X":
            kind = "pass" if one["name"].startswith("stage ") else one["name"].split()[0]
            spans.setdefault((one["pid"], kind), []).append((one["ts"], one["ts"] + one["dur"]))
    passes = [span for (_, kind), found in spans.items() if kind == "pass" for span in found]
    length = max((end for _, end in passes), default=0.0) - min((start for start, _ in passes), default=0.0)
    devices = []
    for pid, name in names.items():
        computing, sending, idle = (spans.get((pid, kind), []) for kind in ("pass", "send", "idle"))
        devices.append({
            "device": name,
            "passes": len(computing),
            "computing": _share(computing, length),
            "idle": _share(_within(idle, passes), length),
            "sending": _share(sending, length),
            "sending_while_computing": shared(computing, sending) / (_total(sending) or 1.0),
            "on_the_way": _share(ways := _united(_ways(events, pid)), length),
            "on_the_way_while_computing": shared(computing, ways) / (_total(ways) or 1.0),
            **about["devices"][name],
        })  # fmt: skip
    return {
        "model": about["model"],
        "seconds": about["seconds"],
        "events": len(events),
        "devices": devices,
        "missing": about["missing"],
    }


def _ways(events: Sequence[Mapping[str, Any]], pid: int) -> list[Span]:
    """Of the frames that a device sent: from their sending to their arrival."""
    begun, found = {}, []
    for one in events:
        if one["pid"] == pid and one["name"].startswith("hop to "):
            if one["ph"] == "b":
                begun[one["id"]] = one["ts"]
            elif one["ph"] == "e" and one["id"] in begun:
                found.append((begun.pop(one["id"]), one["ts"]))
    return found


def _united(spans: Sequence[Span]) -> list[Span]:
    """The time that any of them covers."""
    united: list[Span] = []
    for start, end in sorted(spans):
        if united and start <= united[-1][1]:
            united[-1] = united[-1][0], max(end, united[-1][1])
        else:
            united.append((start, end))
    return united


def shared(one: Sequence[Span], other: Sequence[Span]) -> float:
    """For how long both went on; the spans of each follow one another."""
    total, place = 0.0, 0
    second = sorted(other)
    for start, end in sorted(one):
        while place < len(second) and second[place][1] <= start:
            place += 1
        at = place
        while at < len(second) and second[at][0] < end:
            total += min(end, second[at][1]) - max(start, second[at][0])
            at += 1
    return total


def _within(spans: Sequence[Span], passes: Sequence[Span]) -> list[Span]:
    """Cut to the time between the first pass of all and the last."""
    if not passes:
        return []
    first, last = min(start for start, _ in passes), max(end for _, end in passes)
    return [(max(start, first), min(end, last)) for start, end in spans if start < last and end > first]


def _total(spans: Sequence[Span]) -> float:
    return sum(end - start for start, end in spans)


def _share(spans: Sequence[Span], length: float) -> float:
    return _total(spans) / length if length > 0 else 0.0


def text(out: Path, trace: Mapping[str, Any]) -> str:
    found = figures(trace)
    rows = [("DEVICE", "PASSES", "COMPUTING", "IDLE", "ON THE WAY FROM IT", "OF THAT WHILE COMPUTING", "CLOCK")]
    for one in found["devices"]:
        shares = (f"{one[key]:.0%}" for key in ("computing", "idle", "on_the_way", "on_the_way_while_computing"))
        rows.append((one["device"], str(one["passes"]), *shares, f"± {human_ms(one['uncertainty_us'] / 1000)}"))
    lines = [table(rows)]
    lines += [f"{name} tells nothing: {reason}" for name, reason in found["missing"].items()]
    lines += [
        f"{one['device']}: its first {one['spans_lost']} spans are lost, there were too many"
        for one in found["devices"]
        if one["spans_lost"]
    ]
    if not any(one["passes"] for one in found["devices"]):
        lines.append("Nothing was asked of the model meanwhile.")
    lines.append(
        f"{out}: {found['events']} events in {human_ms(1000 * found['seconds'])}; open it at https://ui.perfetto.dev"
    )
    return printable("\n".join(lines))
