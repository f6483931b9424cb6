"""One device against llama.cpp on the same numbers: decode, prefill, and eight sequences at once, in tokens/s.

Ours is a real daemon with its engine, asked through its API; theirs are the programs `llama-bench` and
`llama-batched-bench` of --llama (or LLAMA_BIN), a folder. Both are asked in turn, round by round; medians. Without
--model a model of Llama-3.2-1B's shape is written with random weights, and its GGUF files: bfloat16, which int8 (the
default for such a checkpoint) stands beside, and Q4_0, head included, beside int4. With --files both sides read the
same GGUF files instead, as they are. Without --llama only ours is measured. Other programs on these cores spoil it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median

from benchmarks.models import LLAMA_3_2_1B, write_llama
from tests.household import Device, household

PROMPT, OUTPUT, LONG = 32, 32, 512  # tokens
AT_ONCE, CONTEXT = 8, 640
PARTNERS = {"int8": "BF16", "int4": "Q4_0"}
Rates = Mapping[str, float]


@contextmanager
def daemon(root: Path, model: Path, threads: int, kind: str) -> Iterator[Callable[[], Rates]]:
    """A device that serves the model with weights of that kind (a GGUF file as it is), and how to measure it."""
    options = ("--no-mdns", "--threads", str(threads))
    form = () if model.suffix == ".gguf" else ("--quantize", kind)
    with household(root / kind, ["device"], memory="8GB", options=options) as (one,):
        one.cli("run", str(model), "--slots", str(AT_ONCE), "--context", str(CONTEXT), *form)
        yield lambda: ours(one, str(model))


def ours(one: Device, model: str) -> Rates:
    """Of one device."""

    def bench(sequences: int, prompt: int, output: int) -> dict[str, list[float]]:
        body = {"model": model, "sequences": sequences, "prompt_tokens": prompt, "output_tokens": output}
        found: dict[str, list[float]] = one.post("/peerllm/v1/bench", body)
        return found

    return {
        "decode": 1000 / bench(1, PROMPT, OUTPUT)["step_ms"][0],
        "prefill": LONG / bench(1, LONG, 1)["time_to_first_token_ms"][0] * 1000,
        "eight": sum(1000 / step for step in bench(AT_ONCE, PROMPT, OUTPUT)["step_ms"]),
    }


def theirs(programs: Path, gguf: Path, threads: int) -> Rates:
    """Of llama.cpp."""
    from benchmarks.llama_cpp import told

    common = ("-m", str(gguf), "-t", str(threads))
    single = (*common, "-p", str(LONG), "-n", str(OUTPUT), "-r", "1", "-o", "jsonl")
    batch = (*common, "-npp", str(PROMPT), "-ntg", str(OUTPUT), "-npl", str(AT_ONCE), "-c", "1024")
    alone = {"decode" if one["n_gen"] else "prefill": one["avg_ts"] for one in told(programs / "llama-bench", *single)}
    (together,) = told(programs / "llama-batched-bench", *batch, "--output-format", "jsonl")
    return {"decode": alone["decode"], "prefill": alone["prefill"], "eight": together["speed_tg"]}


def measure(threads: int, rounds: int, models: Mapping[str, Path], programs: Path | None, against: Mapping[str, Path],
            root: Path) -> dict[str, dict[str, Rates]]:  # fmt: skip
    """By kind: medians of ours and theirs."""
    seen: dict[str, dict[str, list[Rates]]] = {}
    with ExitStack() as stack:
        daemons = {kind: stack.enter_context(daemon(root, model, threads, kind)) for kind, model in models.items()}
        for rates in daemons.values():
            rates()  # once unmeasured
        for turn in range(rounds):
            for kind, rates in daemons.items():
                both = seen.setdefault(kind, {"ours": [], "theirs": []})
                both["ours"].append(rates())
                if programs is not None and kind in against:
                    both["theirs"].append(theirs(programs, against[kind], threads))
                print(turn, kind, {who: list(all_[-1].values()) for who, all_ in both.items() if all_}, file=sys.stderr)
    return {
        kind: {who: {what: median(one[what] for one in all_) for what in all_[0]} for who, all_ in both.items() if all_}
        for kind, both in seen.items()
    }


def table(found: Mapping[str, Mapping[str, Rates]], partners: Mapping[str, str]) -> str:
    """Markdown: ours, theirs, and the ratio."""
    heads = ("decode", f"prefill of {LONG}", f"{AT_ONCE} at once")
    lines = ["| ours, theirs | " + " | ".join(f"{head}: tokens/s | ratio" for head in heads) + " |", "|---" * 7 + "|"]
    for kind, both in found.items():
        line = f"| {kind}, {partners.get(kind, 'none')} "
        for what, mine in both["ours"].items():
            other = both.get("theirs", {}).get(what)
            line += f"| {mine:.1f} | |" if other is None else f"| {mine:.1f}, {other:.1f} | {mine / other:.2f} "
        lines.append(line + "|")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1, help="and as many cores, from the first on")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--kinds", nargs="*", default=["int8", "int4"], help="with `none` the checkpoint as it is")
    parser.add_argument("--model", type=Path, help="a model directory")
    parser.add_argument("--against", nargs="*", default=[], metavar="int4=FILE", help="a GGUF file for each kind")
    parser.add_argument("--files", nargs="*", default=[], type=Path, help="GGUF files, instead of all that")
    parser.add_argument("--llama", type=Path, default=os.environ.get("LLAMA_BIN"), help="a folder of its programs")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(argv)
    os.sched_setaffinity(0, range(args.threads))
    against = {kind: Path(file) for kind, file in (pair.split("=", 1) for pair in args.against)}
    programs = None if args.llama is None else Path(args.llama)
    with tempfile.TemporaryDirectory(prefix="peerllm-bench-") as directory:
        root = Path(directory)
        if args.files:
            models = against = {file.stem: file.resolve() for file in args.files}
        else:
            model = args.model or write_llama(root / "model", LLAMA_3_2_1B)
            models = dict.fromkeys(args.kinds, model)
        if programs is not None and args.model is None and not args.files:
            from benchmarks.llama_cpp import write_both

            against = write_both(models[args.kinds[0]], root, programs)
        found = measure(args.threads, args.rounds, models, programs, against, root)
    named = args.against or args.files
    partners = {kind: file.stem if named else PARTNERS[kind] for kind, file in against.items()}
    print(json.dumps(found) if args.json else table(found, partners))


if __name__ == "__main__":
    main()
