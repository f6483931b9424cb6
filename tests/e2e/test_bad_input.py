"""Bad input to a real device: one clear line, the right exit code or status, and the device lives on."""

from __future__ import annotations

import json
import shutil
import socket
import ssl
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e import tiny
from tests.household import Device, household

MEMORY = 3_000_000  # bytes: too few for the built-in model


@pytest.fixture(scope="module")
def device(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Device]:
    with household(tmp_path_factory.mktemp("bad"), ["laptop"], memory=str(MEMORY)) as (started,):
        yield started


@pytest.fixture(autouse=True)
def _lives_on(device: Device) -> Iterator[None]:
    yield
    assert device.process is not None
    assert device.process.poll() is None
    assert device.status()["device"]["name"] == "laptop"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make("llama", tmp_path_factory.mktemp("models") / "llama")


def refused(device: Device, command: str, *args: str, code: int = 1) -> str:
    """The one line a refused command gives."""
    done = device.cli(command, *args, check=False)
    lines = [line for line in done.stderr.strip().splitlines() if line.startswith("peerllm:")]
    assert done.returncode == code, done
    assert len(lines) == 1, done.stderr
    assert "Traceback" not in done.stderr
    return lines[0]


def damaged(model: Path, target: Path, how: str) -> Path:
    """A copy of the model with one thing wrong."""
    shutil.copytree(model, target)
    weights = target / "model.safetensors"
    data = weights.read_bytes()
    if how == "truncated":
        weights.write_bytes(data[: len(data) // 2])
    elif how == "missing tensor":
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        header = {name.replace("layers.3.mlp.up", "layers.3.mlp.gone"): entry for name, entry in header.items()}
        text = json.dumps(header).encode()
        weights.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    elif how == "huge header":
        weights.write_bytes((2**62).to_bytes(8, "little") + data[8:])
    elif how == "no config":
        (target / "config.json").unlink()
    elif how == "config is no JSON":
        (target / "config.json").write_text("{")
    elif how == "unknown architecture":
        (target / "config.json").write_text(json.dumps({"model_type": "abacus"}))
    elif how == "pickle only":
        weights.unlink()
        (target / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    return target


@pytest.mark.parametrize(("how", "word"), [
    ("truncated", "model.safetensors"), ("missing tensor", "layers.3.mlp.up_proj"),
    ("huge header", "model.safetensors"),
    ("no config", "config.json"), ("config is no JSON", "config.json"), ("unknown architecture", "abacus"),
    ("pickle only", "safetensors"),
])  # fmt: skip
def test_damaged_models(device: Device, model: Path, tmp_path: Path, how: str, word: str) -> None:
    assert word in refused(device, "run", str(damaged(model, tmp_path / "model", how)))


def test_a_model_too_large_says_how_much_is_missing(device: Device) -> None:
    line = refused(device, "run", "builtin")
    assert "missing" in line
    assert "MB" in line
    assert not device.status()["deployments"] or device.status()["deployments"][0]["state"] != "serving"


@pytest.mark.parametrize(("command", "args", "code"), [
    ("run", ["/no/such/model"], 1), ("stop", ["nothing"], 1), ("join", ["22-222222"], 1), ("join", ["nonsense"], 1),
    ("join", ["22-222222", "--at", "127.0.0.1:1"], 1), ("chat", ["hello"], 1),
])  # fmt: skip
def test_commands_that_cannot_be_done(device: Device, command: str, args: list[str], code: int) -> None:
    assert len(refused(device, command, *args, code=code)) < 400


def test_unknown_flags_are_usage_errors(device: Device) -> None:
    done = device.cli("status", "--frobnicate", check=False)
    assert done.returncode == 2
    assert "--frobnicate" in done.stderr


def taken_below_the_ephemeral(sock: socket.socket) -> int:
    """Bound where no outgoing connection takes the port above it (the data port follows the control port)."""
    for port in range(20000, 32000, 3):
        try:
            sock.bind(("127.0.0.1", port))
        except OSError:
            continue
        return port
    raise AssertionError("no port is free")


@pytest.mark.parametrize("option", ["--port", "--api"])
def test_a_port_in_use(device: Device, tmp_path: Path, option: str) -> None:
    with socket.socket() as taken:
        port = taken_below_the_ephemeral(taken)
        taken.listen()
        second = Device(
            tmp_path / "second",
            "second",
            memory="1MB",
            options=["--no-mdns"],
            port=port if option == "--port" else 0,
            api=f"127.0.0.1:{port}" if option == "--api" else "127.0.0.1:0",
        ).start()
        assert second.process is not None
        try:
            assert second.process.wait(120) == 1
            lines = [line for line in second.log_tail().splitlines() if line.startswith("peerllm:")]
            assert len(lines) == 1, second.log_tail()
            assert str(port) in lines[0]
            assert option in lines[0]
        finally:
            second.stop()


@pytest.mark.parametrize("options", [[], pytest.param(["--in-process"], marks=pytest.mark.slow)])
def test_an_accelerator_that_is_not_there(tmp_path: Path, options: list[str]) -> None:
    given = ["--no-mdns", "--compute", "cuda:99", *options]
    device = Device(tmp_path / "device", "device", memory="1MB", options=given).start()
    assert device.process is not None
    try:
        assert device.process.wait(120) == 1
        lines = [line for line in device.log_tail().splitlines() if line.startswith("peerllm:")]
        assert len(lines) == 1, device.log_tail()
        assert "--compute cuda:99" in lines[0]
        assert "leave it out" in lines[0]
    finally:
        device.stop()


def test_the_same_data_directory_twice(device: Device) -> None:
    second = Device(device.data_dir, "twin", memory="1MB", options=["--no-mdns"])
    assert "already" in refused(second, "up", "--port", "0", "--api", "127.0.0.1:0")


@pytest.mark.parametrize(("body", "status"), [
    (b"{", 400), (b"\xff\xfe", 400), (b"[" * 100_000, 400), (b'{"model":"builtin"}', 400),
    (b'{"model":"nothing","messages":[{"role":"user","content":"x"}]}', 404), (b" " * (64 << 20), 413),
])  # fmt: skip
def test_requests_that_cannot_be_answered(device: Device, body: bytes, status: int) -> None:
    try:
        with device.open("/v1/chat/completions", body, timeout=30) as response:
            got, answer = response.status, response.read()
    except urllib.error.HTTPError as error:
        got, answer = error.code, error.read()
    except (urllib.error.URLError, ConnectionError):
        assert status == 413  # cut while still sending is an answer too
        return
    assert got == status, answer
    assert json.loads(answer)["error"]["message"]


def test_garbage_on_every_port(device: Device) -> None:
    """Plain bytes, half a TLS handshake, nothing at all."""
    import psutil

    refused(device, "run", "builtin")  # for which an idle engine is started
    assert device.process is not None
    family = [psutil.Process(device.process.pid), *psutil.Process(device.process.pid).children(recursive=True)]
    ports = {c.laddr.port for one in family for c in one.net_connections("tcp") if c.status == "LISTEN"}
    assert len(ports) >= 3
    for port in ports:
        for bytes_ in (b"", b"\x00" * 4096, b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"):
            with socket.create_connection(("127.0.0.1", port), 10) as connection:
                try:
                    connection.sendall(bytes_)
                    connection.shutdown(socket.SHUT_WR)
                    connection.settimeout(30)
                    while connection.recv(4096):
                        pass
                except (OSError, ssl.SSLError):
                    pass
