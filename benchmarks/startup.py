"""How long `peerllm run` takes until a model on disk serves: three devices of this machine, 1 GB of random weights.

With --model FILE.gguf --alone one device serves that file.

The first run times layers, hashes and fetches; the second finds all of that in the devices' data. Processor seconds
stand beside, for they tell more where a machine has other work.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

from benchmarks.models import LLAMA_3_2_1B, write_llama
from tests.household import Device, household

SHAPE = LLAMA_3_2_1B | {
    "hidden_size": 1536, "intermediate_size": 6144, "num_hidden_layers": 13, "num_attention_heads": 24,
    "vocab_size": 32000, "bos_token_id": 1,
}  # fmt: skip
MEMORY = "400MB"  # of each device: the model needs all three
NAMES = ("anna", "bert", "carla")


def processor_s(devices: Sequence[Device]) -> float:
    """Of the daemons and their engines so far."""
    daemons = [psutil.Process(device.process.pid) for device in devices if device.process is not None]
    everyone = [one for daemon in daemons for one in (daemon, *daemon.children(recursive=True))]
    return sum(sum(one.cpu_times()[:2]) for one in everyone)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=Path(tempfile.gettempdir()) / "peerllm-1gb",
                        help="where the model lies, or is written")  # fmt: skip
    parser.add_argument("--alone", action="store_true", help="one device, which lends enough, with all processors")
    args = parser.parse_args(argv)
    model = args.model.resolve() if args.model.suffix == ".gguf" else write_llama(args.model, SHAPE)
    names, memory = (NAMES[:1], "8GB") if args.alone else (NAMES, MEMORY)
    options = ["--no-mdns", *(["--threads", str(psutil.cpu_count())] if args.alone else [])]
    with (
        tempfile.TemporaryDirectory(prefix="peerllm-bench-") as directory,
        household(Path(directory), names, memory=memory, options=options) as devices,
    ):
        for run in ("first", "second"):
            began, worked = time.monotonic(), processor_s(devices)
            devices[0].cli("run", str(model))
            took, work = time.monotonic() - began, processor_s(devices) - worked
            print(json.dumps({"run": run, "seconds": round(took, 2), "processor_seconds": round(work, 2)}), flush=True)
            devices[0].cli("stop", str(model))


if __name__ == "__main__":
    main()
