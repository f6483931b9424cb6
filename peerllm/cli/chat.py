"""`peerllm chat`: one question, or a conversation."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from typing import Any

from peerllm.cli.device import LocalDevice
from peerllm.cli.figures.trace import recording, text
from peerllm.cli.served import meant
from peerllm.cli.terminal import PassingNote, printable
from peerllm.errors import BadInputError, NotFoundError, PeerLLMError

COMPLETIONS = "/v1/chat/completions"
IDLE = "idle"  # the state of a model that is on a disk and does not run
WORKING = "working"  # the comment that tells nothing (docs/json.md)
ANSWER_TIMEOUT_S = 3600.0  # seconds a whole answer may take when it is not streamed
HELP = """\
/help   this list
/exit   leave; so does Ctrl-D
Ctrl-C  stop the answer that is being written
Everything else is said to the model."""


def run(args: argparse.Namespace) -> None:
    device = LocalDevice(args.data)
    model = meant(device.get("/peerllm/v1/status"), args.model) if args.model else only_model(device)
    body: dict[str, Any] = {"model": model}
    if args.temperature is not None:
        body["temperature"] = args.temperature
    if args.max_tokens is not None:
        body["max_tokens"] = args.max_tokens
    messages = [{"role": "system", "content": args.system}] if args.system else []
    if args.prompt is None:
        if args.json or args.trace:
            raise BadInputError("--json needs a PROMPT" if args.json else "--trace needs a PROMPT")
        _converse(device, body, messages)
        return
    messages.append({"role": "user", "content": args.prompt})
    if args.trace:
        with recording(device, body["model"], args.trace) as trace:
            _ask(device, body, messages, args.json)
        print(text(args.trace, trace), file=sys.stderr)
    else:
        _ask(device, body, messages, args.json)


def _ask(device: LocalDevice, body: dict[str, Any], messages: list[dict[str, str]], whole: bool) -> None:
    if whole:
        print(json.dumps(device.post(COMPLETIONS, {**body, "messages": messages}, ANSWER_TIMEOUT_S)))
    else:
        _say(device, body, messages)


def only_model(device: LocalDevice) -> str:
    """The one model of the household; NotFoundError if there is none, or a choice to be made."""
    found: dict[tuple[str, int], str] = {}  # a model's other names come behind its own
    for one in device.get("/v1/models")["data"]:
        if one["state"] != IDLE:
            found.setdefault((one["model"], one["created"]), one["id"])
    names = list(found.values())
    if not names:
        raise NotFoundError("the household has no model; start one with: peerllm run builtin")
    if len(names) > 1:
        raise NotFoundError(f"the household has several models; choose one with --model: {', '.join(names)}")
    return names[0]


def _unheard(_: str) -> None:
    """Nobody reads comments, or thoughts."""


def answer_pieces(
    device: LocalDevice,
    body: dict[str, Any],
    messages: list[dict[str, str]],
    comment: Callable[[str], None] = _unheard,
    thinks: Callable[[str], None] = _unheard,
) -> Iterator[str]:
    """The answer's text as it comes; `comment` hears what it waits for, `thinks` what the model thinks before."""
    for event in device.events(COMPLETIONS, {**body, "messages": messages, "stream": True}, comment):
        for choice in event["choices"]:
            if thought := choice["delta"].get("reasoning_content"):
                thinks(thought)
            yield choice["delta"].get("content") or ""


def _say(device: LocalDevice, body: dict[str, Any], messages: list[dict[str, str]]) -> str:
    """What the model thinks goes to standard error."""
    said, thought, note = list[str](), list[str](), PassingNote()

    def comment(words: str) -> None:
        note.show("" if words == WORKING else words)

    def thinks(text: str) -> None:
        thought.append(text)
        note.show("")
        print(printable(text), end="", file=sys.stderr, flush=True)

    try:
        for piece in answer_pieces(device, body, messages, comment, thinks):
            if piece and thought:
                thought.clear()
                print("\n", file=sys.stderr, flush=True)
            said.append(piece)
            note.show("")
            print(printable(piece), end="", flush=True)
    finally:
        note.show("")
        print(flush=True)
    return "".join(said)


def _converse(device: LocalDevice, body: dict[str, Any], messages: list[dict[str, str]]) -> None:
    """Until /exit or the end of input; Ctrl-C ends an answer, an error does not end the conversation.

    Only what is typed at a terminal is looked through for commands: a file's lines are all for the model.
    """
    asking = sys.stdin.isatty()
    if asking:
        print(f"You talk with {printable(body['model'])}. /help lists what you can type, /exit or Ctrl-D leaves.")
    while True:
        try:
            prompt = input("> " if asking else "")
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            if not asking:
                raise
            print("\nNothing is being written. Leave with /exit or Ctrl-D.")
            continue
        command = prompt.strip().lower() if asking else ""
        if command == "/exit":
            return
        if command == "/help":
            print(HELP)
        if not prompt.strip() or command == "/help":
            continue
        messages.append({"role": "user", "content": prompt})
        try:
            messages.append({"role": "assistant", "content": _say(device, body, messages)})
        except PeerLLMError as error:
            messages.pop()
            if not asking:
                raise
            request = getattr(error, "request", "")
            print(f"peerllm: {printable(str(error))}{request and f' (request {request})'}", file=sys.stderr)
        except KeyboardInterrupt:
            if not asking:
                raise
            messages.pop()
