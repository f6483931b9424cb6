"""Certificates that look right and are not."""

from __future__ import annotations

import ssl
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from peerllm.transport.identity import Identity


def issued_by(issuer: Identity, context: ssl.SSLContext) -> None:
    """Load into `context` a fresh key whose certificate `issuer` signed."""
    key = Ed25519PrivateKey.generate()
    authority = x509.load_pem_x509_certificate(issuer.certificate_pem.encode())
    certificate = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([]))
        .issuer_name(authority.subject)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(datetime(2000, 1, 1, tzinfo=UTC))
        .not_valid_after(datetime(2100, 1, 1, tzinfo=UTC))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("x")]), critical=True)
        .sign(issuer._key, None)
    )
    with TemporaryDirectory() as directory:
        path = Path(directory) / "both.pem"
        path.write_bytes(
            key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
            + certificate.public_bytes(Encoding.PEM)
            + authority.public_bytes(Encoding.PEM)
        )
        context.load_cert_chain(path)
