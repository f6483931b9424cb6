"""`python -m peerllm`: the same as the `peerllm` command."""

from __future__ import annotations

import sys

from peerllm.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
