"""One device against `transformers`: decode and prefill of a 1.24 B model (Llama-3.2-1B's shape, random weights).

The baseline is `generate(do_sample=False)` in bfloat16 after one warm-up, in this process, with as many threads as the
device has. Ours are real daemons with their engines, one in bfloat16, one in int8, one in int4, asked through the API
for answers of the same length. All live at once and are asked in turn; medians over the rounds. With LLAMA_BENCH=path
(llama.cpp's `llama-bench`) and LLAMA_MODEL=path (a GGUF file of the same shape), its rates stand beside them.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.models import LLAMA_3_2_1B, write_llama
from tests.household import Device, household

PROMPT, OUTPUT, LONG = 32, 64, 512  # tokens
CONTEXT = 640
BASELINE = "transformers generate, bfloat16"


class Baseline:
    """transformers in this process."""

    def __init__(self, model_dir: Path) -> None:
        from transformers import AutoModelForCausalLM

        self._model: Any = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.bfloat16)
        self._vocabulary = self._model.config.vocab_size

    def run(self, prompt: int, output: int) -> float:
        """Seconds of one call."""
        ids = torch.randint(0, self._vocabulary, (1, prompt))
        started = time.perf_counter()
        self._model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, min_new_tokens=output, max_new_tokens=output,
            pad_token_id=0,
        )  # fmt: skip
        return time.perf_counter() - started


@contextmanager
def device(root: Path, model: Path, threads: int, prefix: Sequence[str], quantize: str) -> Iterator[Device]:
    """One that serves the model."""
    name, options = quantize or "bfloat16", ("--no-mdns", "--threads", str(threads))
    with household(root / name, [name], memory="6GB", prefixes={name: list(prefix)}, options=options) as (one,):
        rounded = ["--quantize", quantize or "none"]
        one.cli("run", str(model), "--slots", "1", "--context", str(CONTEXT), *rounded)
        yield one


def rates(one: Device, model: str, prompt: int, output: int) -> tuple[float, float]:
    """(milliseconds to the first token, tokens/s after it) of one answer."""
    body = {"model": model, "sequences": 1, "prompt_tokens": prompt, "output_tokens": output}
    found = one.post("/peerllm/v1/bench", body)
    steps = found["step_ms"]
    return found["time_to_first_token_ms"][0], 1000 / steps[0] if steps else 0.0


def measure(threads: int, rounds: int, quantized: Sequence[str]) -> dict[str, dict[str, float]]:
    """By arrangement: decode and prefill in tokens/s."""
    cores = ["taskset", "-c", "0" if threads == 1 else "0,1"]
    os.sched_setaffinity(0, {0} if threads == 1 else {0, 1})
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory(prefix="peerllm-bench-") as directory:
        root = Path(directory)
        model = write_llama(root / "model", LLAMA_3_2_1B)
        baseline = Baseline(model)
        seen: dict[str, dict[str, list[float]]] = {}

        def note(name: str, decode: float, prefill: float) -> None:
            both = seen.setdefault(name, {"decode": [], "prefill": []})
            both["decode"].append(decode)
            both["prefill"].append(prefill)

        with ExitStack() as stack:
            devices = {
                kind: stack.enter_context(device(root, model, threads, cores, kind)) for kind in ("", *quantized)
            }
            baseline.run(PROMPT, OUTPUT)
            for one in devices.values():
                rates(one, str(model), PROMPT, OUTPUT)
            for _ in range(rounds):
                long_s, one_s, all_s = baseline.run(LONG, 1), baseline.run(PROMPT, 1), baseline.run(PROMPT, OUTPUT)
                note(BASELINE, (OUTPUT - 1) / (all_s - one_s), LONG / long_s)
                for name, one in devices.items():
                    first_ms, _ = rates(one, str(model), LONG, 1)
                    _, decode = rates(one, str(model), PROMPT, OUTPUT)
                    note(f"peerllm, {name or 'bfloat16'}", decode, LONG / first_ms * 1000)
        for name, (decode, prefill) in llama_bench(threads).items():
            note(name, decode, prefill)
    return {name: {kind: median(values) for kind, values in both.items()} for name, both in seen.items()}


def llama_bench(threads: int) -> dict[str, tuple[float, float]]:
    """(decode, prefill) of llama.cpp, if it is there."""
    program, model = os.environ.get("LLAMA_BENCH"), os.environ.get("LLAMA_MODEL")
    if not program or not model:
        return {}
    command = [program, "-m", model, "-t", str(threads), "-p", str(LONG), "-n", str(OUTPUT), "-r", "5", "-o", "json"]
    found = json.loads(subprocess.run(command, capture_output=True, check=True, text=True).stdout)
    by_kind = {("decode" if one["n_gen"] else "prefill"): one["avg_ts"] for one in found}
    return {f"llama.cpp, {found[0]['model_type']}": (by_kind["decode"], by_kind["prefill"])}


def table(found: dict[str, dict[str, float]]) -> str:
    """Markdown; ratios are over the baseline."""
    base = found[BASELINE]
    lines = ["| | decode, tokens/s | / baseline | prefill of 512, tokens/s | / baseline |", "|---|---|---|---|---|"]
    for name, one in found.items():
        decode, prefill = one["decode"], one["prefill"]
        lines.append(
            f"| {name} | {decode:.1f} | {decode / base['decode']:.2f} | {prefill:.0f} "
            f"| {prefill / base['prefill']:.2f} |"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2, choices=(1, 2))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quantize", nargs="*", default=["int8", "int4"])
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(argv)
    found = measure(args.threads, args.rounds, args.quantize)
    print(json.dumps(found) if args.json else table(found))


if __name__ == "__main__":
    main()
