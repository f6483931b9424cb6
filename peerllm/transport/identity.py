"""Who this device is: an Ed25519 key and a self-signed certificate whose SHA-256 is the device's id."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from tempfile import mkstemp

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from peerllm.errors import AuthenticationError, BadInputError
from peerllm.types import DeviceId

CERTIFICATE_FILE = "device.crt"
KEY_FILE = "device.key"
DIRECTORY_MODE, FILE_MODE = 0o700, 0o600
MAX_FILE_BYTES = 16 << 10  # a damaged or foreign file is not read whole
MAX_CERTIFICATE_BYTES = 4096  # PEM; ours have about 800
# Boards without a clock start in 1970, and nobody renews a device: whether it still belongs is the roster's to say.
VALID_FROM = datetime(1970, 1, 1, tzinfo=UTC)
VALID_TO = datetime(9999, 12, 31, 23, 59, 59, tzinfo=UTC)
# What reading a foreign certificate may raise: the library has no one family.
NOT_OURS = (
    ValueError,
    InvalidSignature,
    UnsupportedAlgorithm,
    x509.DuplicateExtension,
    x509.ExtensionNotFound,
    x509.InvalidVersion,
    x509.UnsupportedGeneralNameType,
)


@dataclass(frozen=True, slots=True)
class Identity:
    """This device's id, certificate and (private) key."""

    device: DeviceId
    certificate_pem: str
    certificate_path: Path
    key_path: Path
    _key: Ed25519PrivateKey = field(repr=False, compare=False)

    def sign(self, data: bytes) -> str:
        """Ed25519 signature (128 hex digits) by this device."""
        return self._key.sign(data).hex()


def fingerprint(der: bytes) -> DeviceId:
    """The device id of a certificate: SHA-256 as 64 hex digits."""
    return sha256(der).hexdigest()


def load_or_create(directory: Path) -> Identity:
    """The identity in `directory`, made there if there is none. BadInputError says which file is damaged."""
    certificate_path, key_path = directory / CERTIFICATE_FILE, directory / KEY_FILE
    directory.mkdir(mode=DIRECTORY_MODE, parents=True, exist_ok=True)
    directory.chmod(DIRECTORY_MODE)
    if not certificate_path.exists():
        _create(directory)
    return load(certificate_path, key_path)


def load(certificate_path: Path | str, key_path: Path | str) -> Identity:
    """The identity of two files. A key that others can read is closed to them first; BadInputError if damaged."""
    certificate_path, key_path = Path(certificate_path), Path(key_path)
    pem = _read(certificate_path)
    der, public = parse_certificate(pem.decode("ascii", "replace"), where=str(certificate_path))
    key = _load_key(key_path)
    if key_path.stat().st_mode & 0o077:
        key_path.chmod(FILE_MODE)
    if _raw(key.public_key()) != _raw(public):
        raise BadInputError(f"{key_path} does not belong to {certificate_path}; move both away to get a new identity")
    return Identity(fingerprint(der), _pem(der), certificate_path, key_path, key)


def verify(certificate_pem: str, signature: str, data: bytes) -> None:
    """AuthenticationError unless `signature` (hex) over `data` is by the certificate's key."""
    _, public = parse_certificate(certificate_pem)
    try:
        public.verify(bytes.fromhex(signature), data)
    except (ValueError, InvalidSignature) as error:
        raise AuthenticationError("the signature does not match") from error


def certificate_device(certificate_pem: str) -> DeviceId:
    """The device id of a certificate in PEM; BadInputError unless it is one of ours."""
    return fingerprint(parse_certificate(certificate_pem)[0])


def canonical_pem(pem: str) -> str:
    """The same certificate in the one spelling that entries and comparisons use."""
    return _pem(parse_certificate(pem)[0])


def parse_certificate(pem: str, where: str = "the certificate") -> tuple[bytes, Ed25519PublicKey]:
    """DER and public key; BadInputError unless it is one self-signed Ed25519 certificate that may not issue others."""
    if len(pem) > MAX_CERTIFICATE_BYTES:
        raise BadInputError(f"{where} has {len(pem)} bytes; at most {MAX_CERTIFICATE_BYTES} are read")
    try:
        certificate = x509.load_pem_x509_certificate(pem.encode())
        der, public = certificate.public_bytes(Encoding.DER), certificate.public_key()
        if not isinstance(public, Ed25519PublicKey):
            raise BadInputError(f"{where} has no Ed25519 key")
        public.verify(certificate.signature, certificate.tbs_certificate_bytes)
        authority = certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except BadInputError:
        raise
    except NOT_OURS as error:
        raise BadInputError(f"{where} is damaged or not a device's") from error
    if authority:
        raise BadInputError(f"{where} could issue others; a device's may not")
    return der, public


def _create(directory: Path) -> None:
    """Write key, then certificate, aside and then linked in: whoever is first wins, a crash leaves nothing torn."""
    secret = Ed25519PrivateKey.generate().private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    _place(directory / KEY_FILE, secret)
    key = _load_key(directory / KEY_FILE)
    _place(directory / CERTIFICATE_FILE, make_certificate(key).encode())


def _place(target: Path, data: bytes) -> None:
    """`data` as the file `target`, of mode FILE_MODE, unless it exists already."""
    descriptor, aside = mkstemp(prefix=".identity-", dir=target.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        with suppress(FileExistsError):
            os.link(aside, target)
    finally:
        Path(aside).unlink()


def make_certificate(key: Ed25519PrivateKey) -> str:
    """A self-signed certificate (PEM) for `key` that strict verifiers take for client and server."""
    public = key.public_key()
    # Verifiers look anchors up by subject: each device needs one of its own.
    label = f"peerllm {sha256(_raw(public)).hexdigest()[:32]}"
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, label)])
    identifier = x509.SubjectKeyIdentifier.from_public_key(public)
    usage = dict.fromkeys(
        (
            "content_commitment",
            "key_encipherment",
            "data_encipherment",
            "key_agreement",
            "key_cert_sign",
            "crl_sign",
            "encipher_only",
            "decipher_only",
        ),
        False,
    )
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(VALID_FROM)
        .not_valid_after(VALID_TO)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.KeyUsage(digital_signature=True, **usage), critical=True)
        .add_extension(
            x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False
        )
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("device.peerllm.invalid")]), critical=False)
        .add_extension(identifier, critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier), critical=False)
        .sign(key, None)
    )
    return certificate.public_bytes(Encoding.PEM).decode("ascii")


def _raw(public: Ed25519PublicKey) -> bytes:
    return public.public_bytes(Encoding.Raw, PublicFormat.Raw)


def _pem(der: bytes) -> str:
    return x509.load_der_x509_certificate(der).public_bytes(Encoding.PEM).decode("ascii")


def _load_key(path: Path) -> Ed25519PrivateKey:
    secret = _read(path)
    try:
        key = load_pem_private_key(secret, password=None)
    except (ValueError, TypeError) as error:
        raise BadInputError(f"{path} is not a private key; move it away to get a new identity") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise BadInputError(f"{path} is not an Ed25519 key; move it away to get a new identity")
    return key


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        hint = "move both identity files away to get a new identity"
        raise BadInputError(f"{path} cannot be read ({error.strerror}); {hint}") from error
    if len(data) > MAX_FILE_BYTES:
        raise BadInputError(f"{path} is larger than an identity file can be")
    return data
