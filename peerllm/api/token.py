"""The token that opens this device's API: made once, kept where only its owner reads."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from peerllm.errors import BadInputError

TOKEN_FILE = "token"  # noqa: S105  a file's name
TOKEN_BYTES = 32
MIN_TOKEN_CHARS = 16


def load_or_create_token(data_dir: Path) -> str:
    """The token in DIR/token (0600), made if there is none."""
    path = data_dir / TOKEN_FILE
    if not path.exists():
        data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        fresh = path.with_suffix(f".{os.getpid()}.new")
        with os.fdopen(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
            file.write(secrets.token_urlsafe(TOKEN_BYTES) + "\n")
        fresh.replace(path)
    path.chmod(0o600)
    token = path.read_text(encoding="ascii", errors="replace").strip()
    if len(token) < MIN_TOKEN_CHARS:
        raise BadInputError(f"{path} holds no usable token; delete it, and a new one is made at the next start")
    return token
