"""The entry point: parse, hand over to the command's module, turn errors into one line and an exit code."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from peerllm.cli.exactness import UsageError
from peerllm.cli.parser import build_parser
from peerllm.cli.terminal import printable
from peerllm.errors import PeerLLMError
from peerllm.saved_files import FULL, disk_error

OK, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0 ok, 1 refused or failed and 2 wrong usage, with one line on stderr; argparse itself exits with 2."""
    args = build_parser().parse_args(argv)
    try:
        command = importlib.import_module(f"peerllm.cli.{args.module}")
        return int(getattr(command, args.function)(args) or OK)
    except PeerLLMError as error:
        request = getattr(error, "request", "")
        text = f"{' '.join(str(error).split())}{request and f' (request {request})'}"
        print(f"peerllm: {printable(text)}", file=sys.stderr)
        return USAGE if isinstance(error, UsageError) else FAILED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else the interpreter complains when it flushes
        return FAILED
    except OSError as error:
        if error.errno not in FULL:
            raise
        place = Path(error.filename or getattr(args, "data", "."))
        print(f"peerllm: {disk_error(error, place, 'what is needed')}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        return INTERRUPTED
