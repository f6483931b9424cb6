"""The device's key and certificate: made once, kept private, told apart from damage."""

from __future__ import annotations

import ssl
import stat
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path

import pytest
import trustme
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding

from peerllm.errors import AuthenticationError, BadInputError
from peerllm.transport.identity import (
    CERTIFICATE_FILE,
    KEY_FILE,
    Identity,
    fingerprint,
    load,
    load_or_create,
    parse_certificate,
    verify,
)


def test_it_is_made_once_and_only_its_owner_can_read_the_key(tmp_path: Path) -> None:
    identity = load_or_create(tmp_path / "a" / "identity")
    assert load_or_create(tmp_path / "a" / "identity") == identity
    assert load(identity.certificate_path, identity.key_path) == identity
    assert identity.device == fingerprint(ssl.PEM_cert_to_DER_cert(identity.certificate_pem))
    assert len(identity.device) == 64
    assert stat.S_IMODE(identity.key_path.stat().st_mode) == 0o600
    assert stat.S_IMODE(identity.key_path.parent.stat().st_mode) == 0o700
    assert sorted(path.name for path in identity.key_path.parent.iterdir()) == [CERTIFICATE_FILE, KEY_FILE]
    assert "_key" not in repr(identity)


def test_processes_that_start_at_once_agree(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        found = set(pool.map(lambda _: load_or_create(tmp_path).device, range(8)))
    assert found == {load_or_create(tmp_path).device}


def test_a_crash_between_key_and_certificate_is_mended(tmp_path: Path) -> None:
    identity = load_or_create(tmp_path)
    identity.certificate_path.unlink()
    again = load_or_create(tmp_path)
    verify(again.certificate_pem, identity.sign(b"x"), b"x")


def test_a_key_open_to_others_is_closed(tmp_path: Path) -> None:
    identity = load_or_create(tmp_path)
    identity.key_path.chmod(0o644)
    load_or_create(tmp_path)
    assert stat.S_IMODE(identity.key_path.stat().st_mode) == 0o600


@pytest.mark.parametrize("name", [CERTIFICATE_FILE, KEY_FILE])
@pytest.mark.parametrize("content", [b"", b"garbage", b"\xff" * 100, b"x" * 100_000])
def test_a_damaged_file_is_named(tmp_path: Path, name: str, content: bytes) -> None:
    load_or_create(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BadInputError, match=name):
        load_or_create(tmp_path)


def test_a_key_of_another_device_is_noticed(tmp_path: Path) -> None:
    one, other = load_or_create(tmp_path / "1"), load_or_create(tmp_path / "2")
    one.key_path.write_bytes(other.key_path.read_bytes())
    with pytest.raises(BadInputError, match="does not belong"):
        load_or_create(tmp_path / "1")
    one.key_path.unlink()
    with pytest.raises(BadInputError, match="cannot be read"):
        load_or_create(tmp_path / "1")


def test_signatures(alice: Identity, bob: Identity) -> None:
    signature = alice.sign(b"data")
    verify(alice.certificate_pem, signature, b"data")
    for pem, said, data in (
        (alice.certificate_pem, signature, b"Data"),
        (bob.certificate_pem, signature, b"data"),
        (alice.certificate_pem, "not hexadecimal", b"data"),
    ):
        with pytest.raises(AuthenticationError):
            verify(pem, said, data)


def test_the_certificate_is_for_all_times_and_both_roles(alice: Identity) -> None:
    certificate = x509.load_pem_x509_certificate(alice.certificate_pem.encode())
    assert certificate.not_valid_before_utc.replace(tzinfo=None) == datetime(1970, 1, 1)
    assert certificate.not_valid_after_utc.replace(tzinfo=None) == datetime(9999, 12, 31, 23, 59, 59)
    usages = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert {usage.dotted_string for usage in usages} == {"1.3.6.1.5.5.7.3.1", "1.3.6.1.5.5.7.3.2"}
    assert not certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    assert ssl.DER_cert_to_PEM_cert(certificate.public_bytes(Encoding.DER)).split() == alice.certificate_pem.split()


@pytest.mark.parametrize(
    ("there", "instead"),
    [
        ("a003020102", "a003020104"),  # a version that does not exist
        ("300506032b6570", "300506032b6579"),  # a kind of key nobody knows
        ("0603551d11", "0603551d99"),  # an extension nobody knows: its signature no longer fits
    ],
)
def test_odd_certificates_are_refused(alice: Identity, there: str, instead: str) -> None:
    right = ssl.PEM_cert_to_DER_cert(alice.certificate_pem)
    der = right.replace(bytes.fromhex(there), bytes.fromhex(instead))
    assert der != right
    with pytest.raises(BadInputError):
        parse_certificate(ssl.DER_cert_to_PEM_cert(der))


def test_a_name_of_an_unknown_form_is_refused() -> None:
    key = Ed25519PrivateKey.generate()
    name = x509.Name([])
    odd = x509.UnrecognizedExtension(x509.ObjectIdentifier("2.5.29.17"), bytes.fromhex("3004a3023000"))  # x400Address
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), 1, datetime(1970, 1, 1), datetime(2100, 1, 1))
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(odd, critical=False)
        .sign(key, None)
    )
    with pytest.raises(BadInputError):
        parse_certificate(certificate.public_bytes(Encoding.PEM).decode())


def test_certificates_of_other_makers_are_refused() -> None:
    authority = trustme.CA()
    for pem in (authority.cert_pem.bytes(), authority.issue_cert("localhost").cert_chain_pems[0].bytes()):
        with pytest.raises(BadInputError):
            parse_certificate(pem.decode())
