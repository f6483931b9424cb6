"""What can be typed. Commands and their long options are fixed: scripts rely on them."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path

from peerllm import __version__
from peerllm.cli.options.argument_types import (
    MAX_RECORD_S,
    address,
    compute_place,
    listening_address,
    pairing_address,
    port,
    positive,
    seconds,
    size,
    temperature,
)
from peerllm.cli.options.limit_options import add_limits
from peerllm.cli.service.unit_files import DROP_INS
from peerllm.daemon.settings import API_PORT, CONTROL_PORT, PAIRING_PORT
from peerllm.planner.scenario.scenario import OBJECTIVES, STRATEGIES
from peerllm.types import ACTIVATIONS, QUANTIZE, SCHEDULE_NAMES

_Command = Callable[..., argparse.ArgumentParser]
MODULES = {"demo": "demo.demo"} | {name: f"figures.{name}" for name in ("plan", "simulate", "bench", "trace")}
MAX_DEVICES = 8  # of the demo: they share one machine


def default_data_dir() -> Path:
    """Where a device's data lie unless --data says otherwise (XDG base directories)."""
    base = os.environ.get("XDG_DATA_HOME", "")
    return (Path(base) if Path(base).is_absolute() else Path.home() / ".local" / "share") / "peerllm"


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = argparse.ArgumentParser(
        prog="peerllm",
        description="One language model, run by the devices a household already owns.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"peerllm {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def command(name: str, text: str, data: bool = True) -> argparse.ArgumentParser:
        one = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        one.set_defaults(module=MODULES.get(name, name), function="run")
        if data:
            one.add_argument(
                "--data", type=Path, metavar="DIR", default=default_data_dir(), help="the device's data directory"
            )
        return one

    _up(command("up", "Start this device; it runs until it is stopped."))
    _demo(command("demo", "Try it: several devices on this machine, a model divided over them, the page.", data=False))
    _pairing(command)
    _models(command)
    _looking(command)
    _planning(command)
    _lending(command)
    _tokens(command("token", "Make, list or take back tokens of persons, whose names then show in `status` and logs."))
    _service(command("service", "Run this device as a service, which starts with the machine.", data=False))
    return parser


def _up(up: argparse.ArgumentParser) -> None:
    up.add_argument("--name", help="what the household calls this device (default: the host's name)")
    up.add_argument(
        "--port",
        type=port,
        default=CONTROL_PORT,
        metavar="N",
        help=f"control port; data and pairing follow it (default {CONTROL_PORT}; 0: any free ones)",
    )
    up.add_argument(
        "--api",
        type=listening_address,
        default=("127.0.0.1", API_PORT),
        metavar="HOST:PORT",
        help=f"where the API and the page listen (default 127.0.0.1:{API_PORT})",
    )
    up.add_argument(
        "--api-name",
        action="append",
        default=[],
        metavar="NAME",
        help="a further host name the API answers to when it listens on loopback (repeatable)",
    )
    add_limits(up)
    up.add_argument(
        "--cache",
        type=size,
        metavar="SIZE",
        help="the most that weights fetched from other devices or the hub take on its disk (default: 107GB)",
    )
    up.add_argument(
        "--compute",
        type=compute_place,
        default="cpu",
        metavar="WHERE",
        help="cpu (default), cuda, cuda:N or mps: accelerators are new, and were not measured yet",
    )
    up.add_argument(
        "--peer",
        type=address,
        action="append",
        default=[],
        metavar="HOST:PORT",
        help="a device to look for where multicast does not pass (repeatable)",
    )
    up.add_argument(
        "--in-process", action="store_true", help="run the engine in a thread (where child processes are killed)"
    )
    up.add_argument(
        "--no-mdns", action="store_true", help="neither look for devices by multicast nor announce this one"
    )
    up.add_argument("--loopback", action="store_true", help="listen on this machine only: no other machine can pair")
    up.add_argument("--exit-with-parent", action="store_true", help=argparse.SUPPRESS)
    up.add_argument("--expect", default="", help=argparse.SUPPRESS)  # the model that will be run: requests wait for it


def _demo(demo: argparse.ArgumentParser) -> None:
    demo.add_argument(
        "--devices",
        type=positive,
        default=3,
        metavar="N",
        choices=range(1, MAX_DEVICES + 1),
        help=f"how many, 1 to {MAX_DEVICES} (default 3)",
    )
    demo.add_argument(
        "--api",
        type=listening_address,
        default=("127.0.0.1", API_PORT),
        metavar="HOST:PORT",
        help=f"where the first device's page listens (default 127.0.0.1:{API_PORT})",
    )
    demo.add_argument(
        "--model",
        help="whatever `peerllm run` takes (default: smollm2, a real language model; builtin where that cannot be had)",
    )
    demo.add_argument("--no-browser", action="store_true", help="do not open the page in a browser")
    demo.add_argument("--json", action="store_true", help="one JSON object once the model serves")


def _pairing(command: _Command) -> None:
    invite = command("invite", "Print a code with which another device joins this household.")
    invite.add_argument("--json", action="store_true")
    join = command("join", "Join the household that gave the code.")
    join.add_argument("code", metavar="CODE")
    join.add_argument(
        "--at",
        type=pairing_address,
        metavar="HOST[:PORT]",
        help=f"the inviter's address, if it is not found by itself (port {PAIRING_PORT} unless another is given)",
    )
    leave = command("leave", "Leave the household; this device stays, alone.")
    remove = command("remove", "Put a device out of the household, such as one that was lost or sold.")
    remove.add_argument("device", metavar="DEVICE", help="its name or id, as `peerllm devices` shows them")
    for name, parser in (("invite", invite), ("join", join), ("leave", leave), ("remove", remove)):
        parser.set_defaults(module="household", function=name)


def _models(command: _Command) -> None:
    run = command("run", "Divide a model over the household's devices and serve it from this one.")
    run.add_argument(
        "model",
        metavar="MODEL",
        help="a Hugging Face id (owner/name, of GGUF files also owner/name:Q4_K_M), a name that `peerllm models` "
        "lists, a directory, a .gguf file, or builtin",
    )
    run.add_argument(
        "--as", dest="name", metavar="NAME", help="what to call it (default: the last part of its path or id)"
    )
    run.add_argument("--objective", choices=("latency", "throughput"), default="latency")
    run.add_argument("--context", type=positive, metavar="N", help="tokens that a sequence may hold, prompt and answer")
    run.add_argument("--slots", type=positive, metavar="N", help="sequences served at once")
    run.add_argument(
        "--private", action="store_true", help="keep the head here, so that no other device sees the answer"
    )
    run.add_argument(
        "--prompt-chunk",
        type=positive,
        metavar="N",
        help="tokens of a prompt that travel together (default: the cost model's choice, by the prompt's length)",
    )
    _exactness(run)
    run.add_argument(
        "--schedule",
        choices=SCHEDULE_NAMES,
        default=SCHEDULE_NAMES[0],
        help="in what order sequences go through the stages, to compare (default no-bubble)",
    )
    models = command("models", "List the models on this disk, and what well-known ones need.")
    models.set_defaults(module="catalogue", function="run")
    models.add_argument("--json", action="store_true")
    stop = command("stop", "Stop serving a model and free its memory on every device.")
    stop.set_defaults(module="run", function="stop")
    stop.add_argument("model", metavar="MODEL")
    chat = command("chat", "Ask the model; without PROMPT, talk with it.")
    chat.add_argument("prompt", nargs="?", metavar="PROMPT")
    chat.add_argument("--model", help="which one, if several are served")
    chat.add_argument("--system", help="instructions for the model")
    chat.add_argument("--temperature", type=temperature, metavar="T", help="0: always the likeliest token")
    chat.add_argument("--max-tokens", type=positive, metavar="N")
    chat.add_argument("--json", action="store_true", help="the whole answer as the API gives it")
    chat.add_argument("--trace", type=Path, metavar="FILE", help="of a PROMPT: write what every device did when")


def _exactness(command: argparse._ActionsContainer) -> None:
    command.add_argument(
        "--quantize",
        choices=QUANTIZE,
        default=QUANTIZE[0],
        help="round the weights: less memory, faster, a little less exact; auto: 16-bit models to int8 on processors",
    )
    command.add_argument(
        "--activations",
        choices=ACTIVATIONS,
        default=ACTIVATIONS[0],
        help="what travels between devices: exact, rounded to int8, or (auto) int8 where a link is the bottleneck",
    )
    command.add_argument(
        "--exact", action="store_true", help="round nothing, and compute in float32: the most memory, and the slowest"
    )


def _looking(command: _Command) -> None:
    for name, text in (
        ("status", "Show the devices and the models they hold."),
        ("devices", "Show the household's devices."),
    ):
        one = command(name, text)
        one.add_argument("--json", action="store_true")
        one.set_defaults(module="look", function=name)
    trace = command("trace", "Record what every device of a served model does when, for chrome://tracing and Perfetto.")
    trace.add_argument("model", nargs="?", metavar="MODEL", help="which one, if several are served")
    trace.add_argument(
        "--seconds",
        type=seconds,
        default=5.0,
        metavar="N",
        help=f"how long, at most {MAX_RECORD_S} (default 5; Ctrl-C ends it sooner)",
    )
    trace.add_argument("--out", type=Path, default=Path("trace.json"), metavar="FILE", help="default trace.json")
    trace.add_argument("--read", type=Path, metavar="FILE", help="record nothing: tell of a trace recorded before")
    trace.add_argument("--plot", type=Path, metavar="FILE", help="draw computing and sending (.svg or .png)")
    trace.add_argument("--json", action="store_true", help="what was written, in figures")


def _tokens(token: argparse.ArgumentParser) -> None:
    token.set_defaults(module="household", function="token")
    token.add_argument("doing", metavar="add|list|revoke", choices=("add", "list", "revoke"))
    token.add_argument("person", nargs="?", default="", metavar="PERSON", help="whom the token names")
    token.add_argument("--json", action="store_true")


def _lending(command: _Command) -> None:
    pause = command("pause", "Lend nothing until `peerllm resume`, also after a restart; others take over.")
    resume = command("resume", "Lend again.")
    limits = command("limits", "Show what this device lends and when, or change it while it runs.")
    add_limits(limits)
    limits.add_argument("--json", action="store_true")
    for name, parser in (("pause", pause), ("resume", resume), ("limits", limits)):
        parser.set_defaults(module="service.lending_commands", function=name)


def _planning(command: _Command) -> None:
    plan = command("plan", "Show how a model would be divided, and what that would cost: before `run`, or on paper.")
    simulate = command("simulate", "Run a scenario's plan event by event, with queues and links.", data=False)
    for one in (plan, simulate):
        what = "a scenario file (- is standard input)" + (", or a model to plan for as `run` would" * (one is plan))
        one.add_argument("scenarios", nargs="+", metavar="SCENARIO.json", help=what)
        one.add_argument("--objective", choices=OBJECTIVES, default="latency")
        one.add_argument("--strategy", choices=STRATEGIES, default="edgeshard", help="how to divide it")
        one.add_argument("--json", action="store_true", help="one JSON object a line (always so for several files)")
    plan.add_argument("--context", type=positive, metavar="N", help="of a model: tokens that a sequence may hold")
    plan.add_argument("--slots", type=positive, metavar="N", help="of a model: sequences served at once")
    _exactness(plan.add_argument_group("of a model, as in `run`"))
    plan.add_argument("--save", type=Path, metavar="FILE", help="of a model: write what was planned for as a scenario")
    simulate.add_argument(
        "--schedule",
        choices=SCHEDULE_NAMES,
        default=SCHEDULE_NAMES[0],
        help="in what order sequences go through the stages (default no-bubble)",
    )
    bench = command("bench", "Measure a served model, and print what was predicted of it beside.")
    bench.add_argument("--model", help="which one, if several are served")
    bench.add_argument("--sequences", type=positive, metavar="N", help="at once (default: 1, 2, 4, ... and all slots)")
    bench.add_argument("--prompt-tokens", type=positive, metavar="N", help="of each prompt (default: as planned for)")
    bench.add_argument("--output-tokens", type=positive, metavar="N", help="of each answer (default 64)")
    bench.add_argument("--apart", action="store_true", help="each begins when the one before has its first token")
    bench.add_argument("--json", action="store_true")
    bench.add_argument("--trace", type=Path, metavar="FILE", help="one more round: write what every device did when")
    simulate.add_argument("--steps", type=positive, metavar="N", help="tokens that each sequence generates")
    simulate.add_argument("--plot", type=Path, metavar="FILE", help="draw a Gantt chart (.svg or .png)")


def _service(service: argparse.ArgumentParser) -> None:
    doing = service.add_subparsers(metavar="install|uninstall|status", required=True)
    for name, text in (
        ("install", "Start this device with the machine, or anew with other options."),
        ("uninstall", "Take the service away; its data stay."),
        ("status", "Say whether a service is installed, and whether it runs."),
    ):
        one = doing.add_parser(name, help=text, description=text, allow_abbrev=False)
        one.set_defaults(module="service.service_commands", function=name)
        one.add_argument("--system", action="store_true", help="of the whole machine, as root; else of this user")
        if name == "install":
            one.add_argument(
                "--with",
                dest="with_",
                action="append",
                default=[],
                choices=DROP_INS,
                help="what it needs besides (cuda, jetson), or may not have: any network but the home's own (lan-only)",
            )
            one.add_argument("options", nargs="*", metavar="-- OPTIONS", help="of `peerllm up`, like -- --name kitchen")
        if name == "status":
            one.add_argument("--json", action="store_true")
