"""The certificate authority: real TLS handshakes, renewal before and after expiry."""

from __future__ import annotations

import socket
import ssl
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from volery.setup.errors import SetupError
from volery.setup.pki import CA_LIFETIME, LIFETIME, Authority, Issued, fingerprint

NOW = datetime.now(UTC).replace(microsecond=0)


def handshake(issued: Issued, ca: Path, name: str) -> None:
    """Raises ssl.SSLError unless a client that trusts `ca` accepts the server under `name`."""
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(issued.certificate, issued.key)
    client = ssl.create_default_context(cafile=str(ca))
    ours, theirs = socket.socketpair()

    def serve() -> None:
        try:
            server.wrap_socket(theirs, server_side=True).close()
        except OSError:
            theirs.close()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        client.wrap_socket(ours, server_hostname=name).close()
    finally:
        ours.close()
        thread.join()


def test_a_client_that_trusts_the_authority_accepts_the_server(tmp_path: Path) -> None:
    authority = Authority.open(tmp_path)
    issued = authority.ensure("gateway", dns=["volery.example"], addresses=["127.0.0.1", "::1"])
    for name in ("volery.example", "127.0.0.1", "::1"):
        handshake(issued, tmp_path / "ca.pem", name)
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(issued, tmp_path / "ca.pem", "other.example")
    assert issued.key.stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "ca.key").stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "ca.pem").stat().st_mode & 0o777 == 0o644


def test_another_authority_s_client_refuses(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    issued = Authority.open(tmp_path / "a").ensure("gateway", addresses=["127.0.0.1"])
    Authority.open(tmp_path / "b")
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(issued, tmp_path / "b" / "ca.pem", "127.0.0.1")


def test_opening_again_is_the_same_authority_and_issues_nothing_new(tmp_path: Path) -> None:
    first = Authority.open(tmp_path)
    issued = first.ensure("nats", dns=["localhost"])
    again = Authority.open(tmp_path)
    assert fingerprint(again.pem) == fingerprint(first.pem)
    repeated = again.ensure("nats", dns=["localhost"])
    assert not repeated.renewed
    assert repeated.expires == issued.expires


@pytest.mark.parametrize(
    ("age", "renewed"),
    [(LIFETIME / 2, False), (LIFETIME * 0.69, True), (LIFETIME + timedelta(days=400), True)],
)
def test_renewed_with_a_third_left_and_after_it_expired(
    tmp_path: Path, age: timedelta, renewed: bool
) -> None:
    authority = Authority.open(tmp_path, now=NOW - age)
    authority.ensure("nats", addresses=["127.0.0.1"], now=NOW - age)
    issued = Authority.open(tmp_path).ensure("nats", addresses=["127.0.0.1"])
    assert issued.renewed == renewed
    handshake(issued, tmp_path / "ca.pem", "127.0.0.1")


def test_the_authority_itself_renews_and_what_it_issued_stays_good(tmp_path: Path) -> None:
    then = NOW - CA_LIFETIME * 0.7
    old = Authority.open(tmp_path, now=then)
    new = Authority.open(tmp_path, now=NOW)
    assert new.certificate.not_valid_after_utc == NOW + CA_LIFETIME
    assert new.certificate.subject == old.certificate.subject
    issued = old.ensure("nats", addresses=["127.0.0.1"], now=NOW)
    handshake(issued, tmp_path / "ca.pem", "127.0.0.1")
    assert not new.ensure("nats", addresses=["127.0.0.1"]).renewed


def test_a_new_address_is_added_and_the_old_names_are_kept(tmp_path: Path) -> None:
    authority = Authority.open(tmp_path)
    authority.ensure("gateway", dns=["one"], addresses=["10.0.0.1"])
    issued = authority.ensure("gateway", addresses=["10.0.0.2"])
    assert issued.renewed
    for name in ("one", "10.0.0.1", "10.0.0.2"):
        handshake(issued, tmp_path / "ca.pem", name)


@pytest.mark.parametrize("damage", ["gateway.pem", "gateway.key"])
def test_a_damaged_or_foreign_half_is_made_again(tmp_path: Path, damage: str) -> None:
    authority = Authority.open(tmp_path)
    authority.ensure("gateway", addresses=["127.0.0.1"])
    (tmp_path / damage).write_text("rubbish")
    issued = authority.ensure("gateway", addresses=["127.0.0.1"])
    assert issued.renewed
    handshake(issued, tmp_path / "ca.pem", "127.0.0.1")


def test_a_lost_authority_key_is_not_replaced_silently(tmp_path: Path) -> None:
    Authority.open(tmp_path)
    (tmp_path / "ca.key").unlink()
    with pytest.raises(SetupError, match="backup"):
        Authority.open(tmp_path)


def request(name: str, key: ec.EllipticCurvePrivateKey) -> x509.CertificateSigningRequest:
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    return (
        x509.CertificateSigningRequestBuilder()
        .subject_name(subject)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("gateway")]), critical=False)
        .sign(key, hashes.SHA256())
    )


def test_a_request_gives_its_key_only_not_its_wishes(tmp_path: Path) -> None:
    authority = Authority.open(tmp_path)
    key = ec.generate_private_key(ec.SECP256R1())
    pem = request("evil", key).public_bytes(serialization.Encoding.PEM).decode()
    certificate = x509.load_pem_x509_certificate(
        authority.sign_request(pem, "host-1", addresses=["10.0.0.5"]).encode()
    )
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert [str(n.value) for n in names] == ["10.0.0.5"]
    assert not certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    assert certificate.public_key() == key.public_key()


@pytest.mark.parametrize("pem", ["", "rubbish", "-----BEGIN CERTIFICATE REQUEST-----\nAA\n"])
def test_a_request_that_is_none_is_refused(tmp_path: Path, pem: str) -> None:
    with pytest.raises(SetupError):
        Authority.open(tmp_path).sign_request(pem, "host-1")


def test_a_name_that_is_no_address_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SetupError, match="address"):
        Authority.open(tmp_path).ensure("x", addresses=["not-an-address"])
