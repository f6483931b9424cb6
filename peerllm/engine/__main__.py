"""`python -m peerllm.engine --fd N --parent PID`: what the daemon starts as its engine; not for people."""

from __future__ import annotations

import argparse

from peerllm.engine.process.launch import serve


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m peerllm.engine", description=__doc__)
    parser.add_argument("--fd", type=int, required=True, help="an inherited, connected stream socket")
    parser.add_argument("--parent", type=int, required=True, help="process whose death ends the engine")
    options = parser.parse_args()
    serve(options.fd, options.parent)


if __name__ == "__main__":
    main()
