"""One sequence on one device (one core) and on two devices (one core each): tokens/s and what a hop adds.

Real daemons, real TLS over loopback, interleaved round by round, medians. The two devices' memory limits force two
stages. What is not computing in a step is the step at the client less the stages' own times, as the engines measure
them: a hop adds (that on two − that on one) / 2, two hops there being: to the other device and back.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
import urllib.request
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.models import LLAMA_3_2_1B, write_llama
from tests.household import Device, household

PROMPT = "Tell me a long story about a lighthouse, a cat and a storm, please. Once upon a time there was a girl who"
SLOTS, CONTEXT = 1, 512
HOPS = 2  # there and back
SHARE = 0.62  # of the model, what each of two devices lends: one alone is too small


@dataclass(frozen=True, slots=True)
class Answer:
    """What one streamed answer took."""

    tokens: int
    first_token_ms: float
    step_ms: float  # mean time between tokens after the first


@dataclass(frozen=True, slots=True)
class Row:
    """One model's line of the table; medians over the rounds."""

    model: str
    rounds: int
    one_tokens_per_s: float
    two_tokens_per_s: float
    ratio: float
    one_step_ms: float
    two_step_ms: float
    one_compute_ms: float  # the stages' own times, summed
    two_compute_ms: float
    hop_ms: float
    one_first_token_ms: float
    two_first_token_ms: float


def ask(device: Device, model: str, tokens: int) -> Answer:
    """Stream one answer of at most `tokens` greedy tokens and time it at the client."""
    body = {"model": model, "stream": True, "temperature": 0, "max_tokens": tokens, "return_token_ids": True,
            "messages": [{"role": "user", "content": PROMPT}], "stream_options": {"include_usage": True}}
    request = urllib.request.Request(device.url + "/v1/chat/completions", json.dumps(body).encode(), headers={
        "Content-Type": "application/json", "Authorization": f"Bearer {device.token()}"})
    started = time.perf_counter()
    first = last = 0.0
    first_count = count = total = 0
    with urllib.request.urlopen(request, timeout=600) as response:
        for line in response:
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line[6:])
            if "error" in event:
                raise RuntimeError(event["error"]["message"])
            ids = event["choices"][0].get("token_ids") if event["choices"] else None
            if ids:
                count += len(ids)
                last = time.perf_counter()
                if not first:
                    first, first_count = last, count
            total = (event.get("usage") or {}).get("completion_tokens", total)
    return Answer(total, (first - started) * 1000, (last - first) * 1000 / max(1, count - first_count))


def run_model(device: Device, model: str) -> None:
    device.cli("run", model, "--slots", str(SLOTS), "--context", str(CONTEXT))


def served(device: Device) -> str:
    """The name clients ask for."""
    with urllib.request.urlopen(urllib.request.Request(device.url + "/v1/models", headers={
            "Authorization": f"Bearer {device.token()}"}), timeout=30) as response:
        name: str = json.load(response)["data"][0]["id"]
    return name


def measure(model: str, label: str, rounds: int, tokens: int) -> Row:
    """Both arrangements alive at once, asked in turn."""
    core = (["taskset", "-c", "0"], ["taskset", "-c", "1"])
    with tempfile.TemporaryDirectory(prefix="peerllm-bench-") as directory:
        root = Path(directory)
        with household(root / "one", ["solo"], memory="12GB", prefixes={"solo": core[0]}) as (solo,):
            run_model(solo, model)
            status = solo.status()
            held = sum(stage["memory_bytes"] for stage in status["deployments"][0]["plan"]["stages"])
            working = status["devices"][0]["promised_bytes"] - held  # every device of a plan needs it
            with household(root / "two", ["left", "right"], memory=str(int(held * SHARE) + working),
                           prefixes={"left": core[0], "right": core[1]}) as (left, right):
                run_model(left, model)
                stages = left.status()["deployments"][0]["plan"]["stages"]
                assert {stage["device"] for stage in stages} == {"left", "right"}, stages
                return compare(label, solo, (left, right), rounds, tokens)


def compute_ms(devices: Sequence[Device]) -> float:
    """Mean time of a decode step in the stages of all devices, as their engines measured it."""
    total = 0.0
    for device in devices:
        request = urllib.request.Request(device.url + "/peerllm/v1/engine", headers={
            "Authorization": f"Bearer {device.token()}"})
        with urllib.request.urlopen(request, timeout=30) as response:
            total += sum(json.load(response)["decode_ms"].values())
    return total


def compare(label: str, solo: Device, pair: tuple[Device, Device], rounds: int, tokens: int) -> Row:
    """Warm both, then ask them in turn; which goes first alternates."""
    arrangements = [("one", solo, served(solo)), ("two", pair[0], served(pair[0]))]
    answers: dict[str, list[Answer]] = {"one": [], "two": []}
    computing: dict[str, list[float]] = {"one": [], "two": []}
    for _, device, name in arrangements:
        ask(device, name, tokens)
    for turn in range(rounds):
        for key, device, name in arrangements[:: 1 if turn % 2 == 0 else -1]:
            answers[key].append(ask(device, name, tokens))
            computing[key].append(compute_ms([solo] if key == "one" else pair))
    compute = {key: statistics.median(taken) for key, taken in computing.items()}
    step = {key: statistics.median(answer.step_ms for answer in taken) for key, taken in answers.items()}
    first = {key: statistics.median(answer.first_token_ms for answer in taken) for key, taken in answers.items()}
    return Row(label, rounds, 1000 / step["one"], 1000 / step["two"], step["one"] / step["two"], step["one"],
               step["two"], compute["one"], compute["two"],
               ((step["two"] - compute["two"]) - (step["one"] - compute["one"])) / HOPS, first["one"], first["two"])


def table(rows: Sequence[Row]) -> str:
    """Markdown, as it stands in docs/benchmarks.md."""
    lines = ["| model | one device, tokens/s | two devices, tokens/s | two / one | step, ms (one, two) "
             "| of it computing, ms | per hop, ms | first token, ms (one, two) |", "|---|---|---|---|---|---|---|---|"]
    lines += [f"| {row.model} | {row.one_tokens_per_s:.1f} | {row.two_tokens_per_s:.1f} | {row.ratio:.2f} "
              f"| {row.one_step_ms:.2f}, {row.two_step_ms:.2f} "
              f"| {row.one_compute_ms:.2f}, {row.two_compute_ms:.2f} | {row.hop_ms:.2f} "
              f"| {row.one_first_token_ms:.0f}, {row.two_first_token_ms:.0f} |" for row in rows]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table; `--json` prints the rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--models", nargs="*", default=["builtin", "llama-1b"])
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(argv)
    rows = []
    with tempfile.TemporaryDirectory(prefix="peerllm-model-") as directory:
        for model in options.models:
            if model == "builtin":
                rows.append(measure("builtin", "built-in, float32", options.rounds, options.tokens))
            else:
                path = write_llama(Path(directory) / "llama-3.2-1b-shape", LLAMA_3_2_1B)
                rows.append(measure(str(path), "Llama-3.2-1B's shape, bfloat16", options.rounds, options.tokens))
    print(json.dumps([asdict(row) for row in rows]) if options.json else table(rows))


if __name__ == "__main__":
    main()
