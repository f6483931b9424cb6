"""TLS 1.3 contexts: both sides pinned to certificates of the household, nothing else trusted, nothing resumed."""

from __future__ import annotations

import ssl
from collections.abc import Iterable
from typing import Protocol

from peerllm.errors import AuthenticationError
from peerllm.transport.identity import Identity, fingerprint
from peerllm.types import DeviceId


class HasPeer(Protocol):
    """What knows its peer: an asyncio transport, an aiohttp request or websocket."""

    def get_extra_info(self, name: str, default: object = None) -> object: ...


def server_context(identity: Identity, trusted: Iterable[str]) -> ssl.SSLContext:
    """For listeners: a client must show one of the `trusted` certificates (PEM); with none, everybody is refused."""
    context = _context(ssl.PROTOCOL_TLS_SERVER, identity)
    context.num_tickets = 0  # a resumed session would outlive the removal of its device
    _require(context, trusted)
    return context


def client_context(identity: Identity, certificate_pem: str) -> ssl.SSLContext:
    """For dialling the one device that has this certificate."""
    context = _context(ssl.PROTOCOL_TLS_CLIENT, identity)
    context.check_hostname = False  # addresses change; the certificate is the name
    _require(context, (certificate_pem,))
    return context


def door_context(identity: Identity) -> ssl.SSLContext:
    """For the pairing door: the client shows no certificate, the code speaks for it."""
    context = _context(ssl.PROTOCOL_TLS_SERVER, identity)
    context.num_tickets = 0
    context.verify_mode = ssl.CERT_NONE
    return context


def knock_context() -> ssl.SSLContext:
    """For knocking at a pairing door: any certificate will do, the code vouches for it afterwards."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    _harden(context)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def peer_device(connection: HasPeer | ssl.SSLObject | ssl.SSLSocket) -> DeviceId:
    """Fingerprint of the live peer's certificate; AuthenticationError if it showed none."""
    return fingerprint(peer_certificate(connection))


def peer_certificate(connection: HasPeer | ssl.SSLObject | ssl.SSLSocket) -> bytes:
    """DER of the live peer's certificate; AuthenticationError if it showed none."""
    session = connection
    if not isinstance(connection, ssl.SSLObject | ssl.SSLSocket):
        session = connection.get_extra_info("ssl_object")  # type: ignore[assignment]
    if not isinstance(session, ssl.SSLObject | ssl.SSLSocket):
        raise AuthenticationError("the connection is not encrypted")
    der = session.getpeercert(binary_form=True)
    if not der:
        raise AuthenticationError("the other side showed no certificate")
    return der


def _context(protocol: ssl._SSLMethod, identity: Identity) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    _harden(context)
    context.load_cert_chain(identity.certificate_path, identity.key_path)
    return context


def _harden(context: ssl.SSLContext) -> None:
    context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_3
    context.options |= ssl.OP_NO_COMPRESSION | ssl.OP_NO_TICKET | ssl.OP_NO_RENEGOTIATION


def _require(context: ssl.SSLContext, trusted: Iterable[str]) -> None:
    context.verify_mode = ssl.CERT_REQUIRED
    # Python 3.13 sets these by itself; set here they mean the same everywhere.
    context.verify_flags |= ssl.VERIFY_X509_STRICT | ssl.VERIFY_X509_PARTIAL_CHAIN
    anchors = "".join(f"{pem.strip()}\n" for pem in trusted)
    if anchors:
        context.load_verify_locations(cadata=anchors)
