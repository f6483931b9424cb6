"""The token that opens this device's API: made once, kept where only its owner reads."""

from __future__ import annotations

import secrets
from pathlib import Path

from peerllm.errors import BadInputError
from peerllm.saved_files import replace_file

TOKEN_FILE = "token"  # noqa: S105  a file's name
TOKEN_BYTES = 32
MIN_TOKEN_CHARS = 16


def load_or_create_token(data_dir: Path) -> str:
    """The token in DIR/token (0600), made if there is none."""
    path = data_dir / TOKEN_FILE
    if not path.exists():
        replace_file(path, f"{secrets.token_urlsafe(TOKEN_BYTES)}\n".encode())
    path.chmod(0o600)
    token = path.read_text(encoding="ascii", errors="replace").strip()
    if len(token) < MIN_TOKEN_CHARS:
        raise BadInputError(f"{path} holds no usable token; delete it, and a new one is made at the next start")
    return token
