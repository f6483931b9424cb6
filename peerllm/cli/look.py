"""`peerllm status` and `peerllm devices`: the household as text, or the status object as it is."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from typing import Any

from peerllm.cli.device import LocalDevice
from peerllm.cli.terminal import human_ms, human_rate, layer_bar, printable, table
from peerllm.planner.cost.byte_sizes import human_bytes
from peerllm.types import SCHEDULE_NAMES

Status = Mapping[str, Any]
MAX_LINKS = 30  # lines of the table
MAX_ASKERS = 12  # the same of the last who asked


def status(args: argparse.Namespace) -> None:
    device = LocalDevice(args.data)
    found = device.get("/peerllm/v1/status")
    if args.json:
        print(json.dumps(found))
        return
    print(f"{printable(found['device']['name'])}: {device.url}\n")
    print(devices_text(found))
    if found["devices"][0]["state"] == "starting":
        print("\nModels that ran here before come back when it has started.")
        return
    print(links_text(found))
    print(deployments_text(found))
    if asking := asking_text(found):
        print(asking)


def devices(args: argparse.Namespace) -> None:
    found = LocalDevice(args.data).get("/peerllm/v1/status")
    print(json.dumps(found["devices"]) if args.json else f"{devices_text(found)}\n{links_text(found)}".rstrip())


def devices_text(found: Status) -> str:
    rows = [("DEVICE", "STATE", "MEMORY", "LENT", "USED", "ENGINE ITSELF", "COMPUTES ON", "ID")]
    for one in found["devices"]:
        here = " (this one)" if one["id"] == found["device"]["id"] else ""
        own = one["used_bytes"] - one["promised_bytes"]  # libraries and what they keep: not counted in what is lent
        known = [human_bytes(one[key]) for key in ("memory_bytes", "lent_bytes", "promised_bytes")]
        memory = (*known, human_bytes(own) if own > 0 else "") if one["memory_bytes"] else [""] * 4  # it was never here
        place = (one.get("compute") or {}).get("place", "")
        rows.append((one["name"] + here, one.get("leaving") or one["state"], *memory, place, one["id"][:12]))
    lines = [table(rows)]
    lines += [f"{one['name']}: {one['problem']}" for one in found["devices"] if one.get("problem")]
    strangers = [str(one["name"]) for one in found.get("nearby", ())]
    if strangers:
        lines.append(f"Nearby, not of this household: {', '.join(strangers)}")
    return "\n".join([lines[0], *map(printable, lines[1:])])


def links_text(found: Status) -> str:
    """How the devices reach each other, a line for each direction; nothing where there is but one device."""
    links = found.get("links", ())
    if not links:
        return ""
    rows = [("FROM", "TO", "HOP", "ROUND TRIP", "BANDWIDTH", "")]
    for one in links[:MAX_LINKS]:
        trip = "" if one["rtt_ms"] is None else f"{one['rtt_ms']:.2f} ms"
        speed = f"{human_rate(one['mbps'])} Mbps"
        rows.append((one["from"], one["to"], f"{one['hop_ms']:.2f} ms", trip, speed, one["source"]))
    more = f"... and {len(links) - MAX_LINKS} more; see --json\n" if len(links) > MAX_LINKS else ""
    return f"\n{table(rows)}\n{more}"


def deployments_text(found: Status) -> str:
    """Each deployment with its stages drawn over the model's layers."""
    if not found["deployments"]:
        return "No model is served. Start the built-in one with: peerllm run builtin"
    return "\n\n".join(deployment_text(one) for one in found["deployments"])


def asking_text(found: Status) -> str:
    """Who asks for answers now, and how much each has had since this device started."""
    rows = [("WHO ASKS", "AT", "KNOWN BY", "NOW", "ANSWERS", "TOKENS IN", "TOKENS OUT")]
    for one in found.get("asking", ())[:MAX_ASKERS]:
        counts = [f"{one[key]:,}" for key in ("under_way", "answers", "prompt_tokens", "answer_tokens")]
        rows.append((one["name"], one["device"] or found["device"]["name"], one["by"], *counts))
    return f"\n{table(rows)}" if len(rows) > 1 else ""


def deployment_text(one: Mapping[str, Any]) -> str:
    doing = f", {one['message']}" if one.get("message") else ""
    head = f"{one['name']}: {one['state']}{doing}, coordinated by {one['coordinator']}, epoch {one['epoch']}"
    if one.get("schedule", SCHEDULE_NAMES[0]) != SCHEDULE_NAMES[0]:
        head += f", schedule {one['schedule']}"
    if one.get("reason"):
        head += f" ({one['reason']})"
    stages = (one.get("plan") or {}).get("stages") or ()
    if not stages:
        return printable(head)
    layers = max(int(stage["last_layer"]) for stage in stages) + 1
    rows = [("DEVICE", "LAYERS", f"of {layers}", "MEMORY", "A BLOCK TAKES")]
    for stage in stages:
        first, last = int(stage["first_layer"]), int(stage["last_layer"])
        bar = layer_bar(first, last, layers)
        speed = _block_ms((one.get("profiles") or {}).get(stage["device"]))
        rows.append((stage["device"], f"{first}-{last}", bar, human_bytes(stage["memory_bytes"]), speed))
    facts = [tell(one) for tell in (context_text, weights_text, speed_text, activations_text)]
    return f"{printable(head)}\n{table(rows)}{''.join(facts)}"


def context_text(one: Mapping[str, Any]) -> str:
    """How much a sequence may hold, and how many there is room for; "" where a device's version does not say."""
    if not one.get("context"):
        return ""
    return f"\ncontext: {one['context']:,} tokens, prompt and answer together; {one['slots']} at once"


def weights_text(one: Mapping[str, Any]) -> str:
    return printable(f"\nweights: {one['weights']}") if one.get("weights") else ""


def activations_text(one: Mapping[str, Any]) -> str:
    """Which ways carry rounded hidden states, and why."""
    plan = one["plan"]
    ways = zip(plan["stages"][1:], plan.get("activations") or (), strict=False)
    names = [str(stage["device"]) for stage, form in ways if form == "int8"]
    if not names:
        return ""
    bottleneck = "the link is the bottleneck" if len(names) == 1 else "the links are the bottleneck"
    why = "as asked for" if one.get("activations") == "int8" else bottleneck
    return printable(f"\nactivations travel as int8 to {', '.join(dict.fromkeys(names))}: {why}")


def speed_text(one: Mapping[str, Any]) -> str:
    """What was predicted and, once something was asked, what was measured."""
    said, seen = one["plan"].get("predicted") or {}, one.get("measured") or {}
    lines = [
        f"\n{title} first token after {human_ms(found['time_to_first_token_ms'])},"
        f" then one every {human_ms(found['step_ms'])}"
        for title, found in (("predicted:", said), ("measured: ", seen))
        if "step_ms" in found
    ]
    return "".join(lines)


def _block_ms(profile: Mapping[str, Any] | None) -> str:
    """What a block takes for one token, alone and while the machine's other devices compute too; "" where unknown."""
    times = profile["alone"] if profile else {}
    blocks = [points["1"] for kind, points in times.items() if kind.startswith("block") and "1" in points]
    if not profile or not blocks:
        return ""
    alone, times = sum(blocks) / len(blocks), profile["contention"]
    text = human_ms(alone) + (f", {human_ms(alone * times)} beside the others" if times > 1 else "")
    return f"about {text}" if profile["source"] == "estimated" else text
