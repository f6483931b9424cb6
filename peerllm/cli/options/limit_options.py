"""The options of `peerllm up` and `peerllm limits` that say what the owner allows."""

from __future__ import annotations

import argparse

from peerllm.cli.options.argument_types import celsius, hours, or_word, percent, positive, size


def add_limits(command: argparse.ArgumentParser) -> None:
    """What the owner allows."""
    command.add_argument(
        "--memory", type=or_word("free", 0, size), metavar="SIZE", help="the most it lends, like 4GB (default: free)"
    )
    command.add_argument(
        "--threads", type=or_word("all", 0, positive), metavar="N", help="processors it lends (default: all)"
    )
    command.add_argument("--hours", type=hours, metavar="FROM-TO", help="when it lends, like 20-8 (default: always)")
    command.add_argument(
        "--battery",
        type=or_word("off", 0, percent),
        metavar="PERCENT",
        help="on battery it lends down to this; off: to the end (default: 15)",
    )
    command.add_argument(
        "--hot", type=or_word("off", 0, celsius), metavar="CELSIUS", help="it stops lending when so hot (default: off)"
    )
