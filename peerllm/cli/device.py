"""The running device of a data directory, over its API; blocking HTTP, since commands start faster without a loop."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from peerllm import request_ids
from peerllm.api.token import TOKEN_FILE
from peerllm.errors import NotFoundError, PeerLLMError, UnavailableError
from peerllm.saved_files import replace_file

DAEMON_FILE = "daemon.json"
DEMO_FILE = "demo.json"
START_S, LOOK_S = 15.0, 0.1  # how long a device that begins to start is waited for, and how often it is looked for
TIMEOUT_S = 180.0  # seconds without a byte; joining and leaving speak to other devices
RUN_TIMEOUT_S = 3600.0  # seconds between two lines of `run`: a large model may be on its way
MAX_LINE_BYTES = 64 << 20


class AnsweredError(PeerLLMError):
    """The device refused; the message is its own. `request`: the id under which its log says why it could not."""

    request = ""
    status = http.HTTPStatus.INTERNAL_SERVER_ERROR.value


class LocalDevice:
    """Built from DIR/daemon.json and DIR/token; NotFoundError if no device runs there.

    While none does, and a demo has left its note in DIR, the demo's first device is meant.
    """

    def __init__(self, data_dir: Path) -> None:
        self._data_dir = data_dir
        data_dir = demo_of(data_dir) or data_dir
        until = time.monotonic() + START_S
        while not (written := _read(data_dir / DAEMON_FILE)).get("url"):
            if not _alive(written):
                raise self._nobody()
            if time.monotonic() > until:
                raise UnavailableError(f"the device on {data_dir} is still starting; ask again in a moment")
            time.sleep(LOOK_S)
        self.url = str(written["url"])
        try:
            self._token = (data_dir / TOKEN_FILE).read_text().strip()
        except (OSError, ValueError) as error:
            raise self._nobody() from error

    def _nobody(self) -> NotFoundError:
        where = self._data_dir
        return NotFoundError(f"no device is running on {where}; start it with: peerllm up --data {where}")

    def get(self, path: str) -> Any:
        with self._answer("GET", path, None, TIMEOUT_S) as response:
            return _object(response.read())

    def post(self, path: str, body: Mapping[str, Any], timeout_s: float = TIMEOUT_S) -> Any:
        with self._answer("POST", path, body, timeout_s) as response:
            return _object(response.read())

    def lines(self, path: str, body: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """Every line of JSON; raises at a line that holds an error."""
        with self._answer("POST", path, body, RUN_TIMEOUT_S) as response:
            while line := response.readline(MAX_LINE_BYTES):
                yield _checked(_object(line))

    def events(self, path: str, body: Mapping[str, Any], comment: Callable[[str], None]) -> Iterator[dict[str, Any]]:
        """Every SSE event until [DONE]; raises at an error, and if the stream ends without one or the other.

        `comment` hears what is said between events.
        """
        with self._answer("POST", path, body, TIMEOUT_S) as response:
            while line := response.readline(MAX_LINE_BYTES):
                if line.startswith(b":"):
                    comment(line[1:].decode(errors="replace").strip())
                elif line.startswith(b"data:"):
                    data = line[5:].strip()
                    if data == b"[DONE]":
                        return
                    yield _checked(_object(data))
        raise UnavailableError("the answer broke off: the device stopped; ask again")

    @contextlib.contextmanager
    def _answer(
        self, method: str, path: str, body: Mapping[str, Any] | None, timeout_s: float
    ) -> Iterator[http.client.HTTPResponse]:
        parts = urlsplit(self.url)
        connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=timeout_s)
        headers = {"Authorization": f"Bearer {self._token}", "Content-Type": "application/json"}
        try:
            try:
                connection.request(method, path, None if body is None else json.dumps(body), headers)
                response = connection.getresponse()
            except ConnectionError as error:
                raise self._nobody() from error
            if response.status != http.HTTPStatus.OK:
                raise _refused(response)
            yield response
        except AnsweredError as error:
            if error.status >= http.HTTPStatus.INTERNAL_SERVER_ERROR:
                error.request = response.headers.get(request_ids.HEADER, "")
            raise
        except TimeoutError as error:
            raise UnavailableError(f"the device said nothing for {timeout_s:g} s; see its log") from error
        except (OSError, http.client.HTTPException) as error:
            raise UnavailableError("the connection to the device broke; it may have stopped, see its log") from error
        finally:
            connection.close()


def _refused(response: http.client.HTTPResponse) -> PeerLLMError:
    try:
        _checked(_object(response.read()))
    except AnsweredError as error:
        return error
    return AnsweredError(f"the device answered {response.status} {response.reason}")


def _object(data: bytes) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except ValueError as error:
        raise AnsweredError("the answer is not JSON; something else listens on the device's port") from error
    return value if isinstance(value, dict) else {}


def _checked(value: dict[str, Any]) -> dict[str, Any]:
    """The object, unless it is an error object."""
    error = value.get("error")
    if isinstance(error, dict):
        answered = AnsweredError(str(error.get("message") or "refused without a reason"))
        answered.status = error.get("status") or answered.status
        raise answered
    return value


def daemon_note(url: str) -> bytes:
    """What DIR/daemon.json says: where the other commands find the running device."""
    return json.dumps({"url": url, "pid": os.getpid()}).encode()


def write_daemon_file(data_dir: Path, url: str) -> None:
    """DIR/daemon.json (0600), from now on."""
    replace_file(data_dir / DAEMON_FILE, daemon_note(url))


@contextlib.contextmanager
def starting(data_dir: Path) -> Iterator[None]:
    """While the block runs, the other commands know that a device begins to start here, unless one runs already."""
    path = data_dir / DAEMON_FILE
    if not _alive(_read(path)):
        with contextlib.suppress(OSError):  # the disk is full: the device says so
            write_daemon_file(data_dir, "")
    try:
        yield
    finally:
        if _read(path).get("pid") == os.getpid():
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def demo_note(data_dir: Path, device_dir: Path) -> Iterator[bool]:
    """While the block runs, commands for `data_dir` reach the demo's device there; False if a device of its own runs.

    DIR/demo.json (0600) says so. A demo that began later has the word, and keeps it.
    """
    path, note = data_dir / DEMO_FILE, {"data": str(device_dir), "pid": os.getpid()}
    try:
        data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        _write(path, note)
    except OSError:
        yield False
        return
    try:
        yield demo_of(data_dir) == device_dir
    finally:
        if _read(path) == note:
            path.unlink(missing_ok=True)


def demo_of(data_dir: Path) -> Path | None:
    """Where the demo's device has its data; None where no demo runs, or a device of this directory does."""
    demo = _read(data_dir / DEMO_FILE)
    there = isinstance(demo.get("data"), str) and _alive(demo) and not _alive(_read(data_dir / DAEMON_FILE))
    return Path(demo["data"]) if there else None


def running_pid(data_dir: Path) -> int | None:
    """The process of the device that runs on a data directory; None where none does."""
    written = _read(data_dir / DAEMON_FILE)
    return int(written["pid"]) if _alive(written) else None


def _alive(written: Mapping[str, Any]) -> bool:
    """Whether the process that wrote a file is still there: one that was killed could not take it away."""
    if not written:
        return False
    import psutil

    return type(written.get("pid")) is int and psutil.pid_exists(written["pid"])


def _read(path: Path) -> dict[str, Any]:
    """The file's object; empty where there is none."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _write(path: Path, value: Mapping[str, Any]) -> None:
    replace_file(path, json.dumps(value).encode())
