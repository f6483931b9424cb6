"""A Hugging Face hub on loopback, for tests: the models of a folder, and what was asked of them."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from huggingface_hub import constants

COMMIT = "c" * 40
_API = re.compile(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?/?")
_FILE = re.compile(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)")


class HubServer:
    """`bodies` counts the bytes that went out by file; `gate` holds back the bytes of whole weight files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.bodies: dict[str, int] = {}
        self.gate = threading.Event()
        self.gate.set()
        self.asked = threading.Event()  # for a whole weight file
        self.refuse: dict[str, tuple[int, str]] = {}  # status and error code, by the beginning of a path
        self.closed = False
        self.gated = False
        self.cuts = 0  # so many answers with a range end after half of it
        self.ranges: list[tuple[str, str]] = []  # that were asked for, by file
        self._lock = threading.Lock()
        self.parts = True  # False: whole files, whatever range is asked for
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                hub.answer(self, body=True)

            def do_HEAD(self) -> None:
                hub.answer(self, body=False)

            def log_message(self, *_: object) -> None: ...

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), name="hub")
        self._thread.start()

    def close(self) -> None:
        self.closed = True
        self.gate.set()
        self._server.shutdown()
        self._thread.join(10)
        self._server.server_close()

    def answer(self, request: BaseHTTPRequestHandler, body: bool) -> None:
        if self.closed:  # connections that were kept open are no way round
            request.close_connection = True
            return
        path = urlsplit(request.path).path
        refusal = next((said for start, said in self.refuse.items() if path.startswith(start)), None)
        if not refusal and (found := _API.fullmatch(path)) and (self.folder / found[1]).is_dir():
            self._json(request, self._listing(found[1], found[2]))
        elif not refusal and (found := _FILE.fullmatch(path)) and (self.folder / found[1] / found[2]).is_file():
            self._file(request, self.folder / found[1] / found[2], body)
        else:
            status, code = refusal or (404, "RepoNotFound")
            self._json(request, {"error": "no"}, status, {"X-Error-Code": code})

    def _listing(self, model: str, kind: str | None) -> object:
        files = [one for one in sorted((self.folder / model).rglob("*")) if one.is_file()]
        named = [(one.relative_to(self.folder / model).as_posix(), one.stat().st_size) for one in files]
        if kind == "tree":
            return [{"type": "file", "path": name, "size": size, "oid": "0" * 40} for name, size in named]
        siblings = [{"rfilename": name, "size": size, "blobId": "0" * 40} for name, size in named]
        return {
            "id": model,
            "sha": COMMIT,
            "siblings": siblings,
            "private": False,
            "gated": self.gated,
            "downloads": 0,
            "tags": [],
        }

    def _file(self, request: BaseHTTPRequestHandler, file: Path, body: bool) -> None:
        data, wanted = file.read_bytes(), re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("Range", ""))
        headers = {
            "ETag": f'"{hashlib.sha256(data).hexdigest()}"',
            "X-Repo-Commit": COMMIT,
            "Accept-Ranges": "bytes",
        }
        part, status = data, 200
        if wanted and self.parts:
            first = int(wanted[1])
            part, status = data[first : int(wanted[2]) + 1 if wanted[2] else None], 206
            headers["Content-Range"] = f"bytes {first}-{first + len(part) - 1}/{len(data)}"
        if body and file.suffix in (".safetensors", ".gguf") and not wanted:
            self.asked.set()
            self.gate.wait()
        cut = False
        if body:
            with self._lock:
                cut = bool(wanted) and self.cuts > 0
                self.cuts -= cut
                sent = len(part) // 2 if cut else len(part)
                self.bodies[file.name] = self.bodies.get(file.name, 0) + sent
                self.ranges.append((file.name, request.headers.get("Range", "")))
        self._send(request, status, headers, part, body, cut)

    def _json(
        self, request: BaseHTTPRequestHandler, value: object, status: int = 200, headers: dict[str, str] | None = None
    ) -> None:
        data = json.dumps(value).encode()
        self._send(request, status, {"Content-Type": "application/json", **(headers or {})}, data, True)

    @staticmethod
    def _send(
        request: BaseHTTPRequestHandler,
        status: int,
        headers: dict[str, str],
        data: bytes,
        body: bool,
        cut: bool = False,
    ) -> None:
        request.send_response(status)
        for name, value in headers.items():
            request.send_header(name, value)
        request.send_header("Content-Length", str(len(data)))
        request.end_headers()
        if body and request.command != "HEAD":
            with contextlib.suppress(ConnectionError):
                request.wfile.write(data[: len(data) // 2] if cut else data)
            request.close_connection = request.close_connection or cut


def hole(path: Path, tensors: Mapping[str, Any]) -> None:
    """A safetensors file with this header, and no data: nothing but its length."""
    header = json.dumps(tensors).encode()
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + max((one["data_offsets"][1] for one in tensors.values()), default=0))


@contextlib.contextmanager
def hub_server(folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """The hub that huggingface_hub asks meanwhile, with `cache` as its cache."""
    server = HubServer(folder)
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "")
    try:
        yield server
    finally:
        server.close()
