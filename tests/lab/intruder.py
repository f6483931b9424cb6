"""An unpaired host tries everything: every port, every route, with and without a certificate of its own.

`python -m tests.lab.intruder IDENTITY_DIR HOST...` prints one JSON object: what came back, by host, port and attempt.
A string that starts with "closed", "tls" or "4xx" is a refusal; anything else is a hole.
"""

from __future__ import annotations

import asyncio
import json
import socket
import ssl
import sys
from pathlib import Path

import aiohttp
from aiohttp import web

from peerllm.api.server import create_app
from peerllm.daemon.network import Network
from peerllm.daemon.settings import Settings
from peerllm.daemon.weights.exchange.holders import ROUTE as WEIGHTS
from peerllm.transport.identity import load_or_create
from peerllm.transport.links.echo import ECHO_PATH
from tests.api.fake import FakeHousehold

TIMEOUT_S = 5.0
PORTS = {"api": 8642, "control": 8643, "data": 8644, "pairing": 8645}
FILLED_IN = {
    "name": "app.js",
    "id": "builtin",
    "number": "1",
    "nbytes": "1024",
    "deployment": "0" * 32,
    "sha256": "0" * 64,
    "epoch": "1",
    "stage": "0",
}


def routes_of(app: web.Application) -> list[tuple[str, str]]:
    """Every route an application has, parameters filled in."""
    return [
        (route.method, route.resource.canonical.format(**FILLED_IN))
        for route in app.router.routes()
        if route.method != "HEAD" and route.resource is not None
    ]


def every_route(directory: Path) -> list[tuple[str, str]]:
    """Of the API and of the control port, read from the applications themselves, and of the data port."""
    identity = load_or_create(directory)
    network = Network(Settings(directory / "data", "intruder"), identity, lambda: None)  # type: ignore[arg-type]
    network.add_route("GET", WEIGHTS, lambda request: None)  # type: ignore[arg-type, return-value]
    apps = [create_app(FakeHousehold(directory), "t" * 32, loopback=False), network._app]
    links = [("GET", "/data/{deployment}/{epoch}/{stage}".format(**FILLED_IN)), ("GET", ECHO_PATH)]
    return [("GET", "/"), *links, *(route for app in apps for route in routes_of(app))]


def own_certificate(directory: Path) -> ssl.SSLContext:
    """A well-made certificate that nobody here knows."""
    identity = load_or_create(directory)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.load_cert_chain(identity.certificate_path, identity.key_path)
    return context


def no_certificate() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


async def attempt(session: aiohttp.ClientSession, method: str, url: str, tls: ssl.SSLContext | None) -> str:
    """What one request gets, as a word."""
    try:
        async with session.request(
            method, url, ssl=tls if tls is not None else True, json={"model": "builtin"}, allow_redirects=False
        ) as response:
            body = await response.read()
            return f"{response.status // 100}xx {response.status} {body[:120]!r}"
    except (aiohttp.ClientConnectorCertificateError, aiohttp.ClientSSLError, ssl.SSLError) as error:
        return f"tls {error}"
    except (aiohttp.ServerDisconnectedError, aiohttp.ClientConnectionResetError, ConnectionResetError) as error:
        return f"tls cut: {error}"
    except aiohttp.ClientConnectorError as error:
        return f"closed {error}"
    except (aiohttp.ClientOSError, aiohttp.ClientPayloadError, aiohttp.ClientResponseError) as error:
        return f"tls cut: {type(error).__name__} {error}"
    except TimeoutError:
        return "silent: nothing came in time"


def raw(host: str, port: int) -> str:
    """Plain bytes to a port: what it says to somebody who speaks no protocol at all."""
    try:
        with socket.create_connection((host, port), TIMEOUT_S) as connection:
            connection.sendall(b"hello\r\n\r\n")
            connection.settimeout(TIMEOUT_S)
            said = connection.recv(4096)
            # A TLS alert (21) or an HTTP refusal says nothing about anybody.
            if said[:1] in (b"", b"\x15"):
                return "tls alert"
            return f"{'4xx' if b' 40' in said[:20] else 'spoke'} {said!r}"
    except TimeoutError:
        return "closed: silent"
    except OSError as error:
        return f"closed {error}"


async def main(directory: Path, hosts: list[str]) -> dict[str, dict[str, str]]:
    """All attempts on all hosts."""
    routes = every_route(directory)
    contexts = {"plain": None, "no certificate": no_certificate(), "unknown certificate": own_certificate(directory)}
    results: dict[str, dict[str, str]] = {}
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=TIMEOUT_S)) as session:
        for host in hosts:
            found = results[host] = {}
            for name, port in PORTS.items():
                found[f"{name} raw"] = await asyncio.to_thread(raw, host, port)
                for kind, tls in contexts.items():
                    scheme = "http" if tls is None else "https"
                    for method, path in routes:
                        key = f"{name} {kind} {method} {path}"
                        found[key] = await attempt(session, method, f"{scheme}://{host}:{port}{path}", tls)
    return results


if __name__ == "__main__":
    print(json.dumps(asyncio.run(main(Path(sys.argv[1]), sys.argv[2:]))))
