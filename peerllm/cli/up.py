"""`peerllm up`: reads the options and says that the device starts, before anything large is imported."""

from __future__ import annotations

import argparse
import logging
import socket
import sys
from typing import Any

from peerllm.cli.device import starting
from peerllm.cli.terminal import tell
from peerllm.daemon.settings import Settings
from peerllm.errors import BadInputError
from peerllm.request_ids import LOG_FORMAT, CauseInLog

MAX_NAME_CHARS = 63  # as of a host's name
HTTP_CLIENTS = ("httpx", "httpx2")
_LOOPBACK = ("127.0.0.1", "::1")


def run(args: argparse.Namespace) -> None:
    """Returns when the device was stopped; BadInputError if it cannot start."""
    handler = logging.StreamHandler(sys.stderr)
    handler.addFilter(CauseInLog())
    logging.basicConfig(handlers=[handler], level=logging.INFO, format=LOG_FORMAT)
    for client in HTTP_CLIENTS:  # of the hub's library: each request would be a line
        logging.getLogger(client).setLevel(logging.WARNING)
    settings = settings_of(args)
    try:
        settings.data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise BadInputError(f"cannot use --data {settings.data_dir}: {error.strerror}") from error
    tell(f"{settings.name} is starting, which takes up to half a minute (its data: {settings.data_dir})")
    with starting(settings.data_dir):
        from peerllm.cli.device_process import live

        live(settings, args.api_name, args.exit_with_parent, args.expect)


def settings_of(args: argparse.Namespace) -> Settings:
    """The options as settings, with what was left out filled in."""
    name = (args.name or socket.gethostname().split(".")[0] or "device").strip()
    if not 1 <= len(name) <= MAX_NAME_CHARS or not name.isprintable():
        raise BadInputError(f"--name must have 1 to {MAX_NAME_CHARS} printable characters")
    chosen: dict[str, Any] = {"hosts": _LOOPBACK} if args.loopback else {}
    return Settings(
        data_dir=args.data.expanduser().resolve(), name=name, port=args.port,
        api_host=args.api[0], api_port=args.api[1], memory_bytes=args.memory, threads=args.threads,
        cache_bytes=args.cache,
        peers=tuple(args.peer), in_process=args.in_process, mdns=not (args.no_mdns or args.loopback),
        compute=args.compute, hours=args.hours, battery_percent=args.battery, hot_celsius=args.hot, **chosen,
    )  # fmt: skip
