"""Volery's own certificate authority, and certificates that renew themselves, also after they expired."""

from __future__ import annotations

import fcntl
import ipaddress
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from volery.setup.errors import SetupError
from volery.setup.home import write_private

CA_LIFETIME = timedelta(days=3650)
LIFETIME = timedelta(days=90)
_BACKDATED = timedelta(hours=1)  # a host's clock may be a little behind ours


@dataclass(frozen=True)
class Issued:
    """A certificate and its key on disk."""

    certificate: Path
    key: Path
    expires: datetime
    renewed: bool
    """It was made or replaced by this call: who serves it must read it again."""


class Authority:
    """The CA in one directory: `ca.pem` (public) and `ca.key` (root's only)."""

    def __init__(
        self, directory: Path, key: ec.EllipticCurvePrivateKey, certificate: x509.Certificate
    ) -> None:
        self._directory = directory
        self._key = key
        self.certificate = certificate

    @classmethod
    def open(cls, directory: Path, *, name: str = "Volery", now: datetime | None = None) -> Authority:
        """The CA kept in the directory, made when there is none.

        Its certificate is signed anew, with the same key, when less than a third of its time is
        left; certificates it issued stay good. Raises SetupError when only half of it is there.
        """
        now = now or datetime.now(UTC)
        with (directory / ".lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            key_path, path = directory / "ca.key", directory / "ca.pem"
            if key_path.exists() != path.exists() and path.exists():
                raise SetupError(
                    f"{key_path} is missing beside {path}, so nothing can be signed any more. Restore"
                    f" it from a backup, or delete {path} to begin with a new authority; hosts and"
                    " command lines that trust the old one must then be told."
                )
            key = _load_key(key_path) if key_path.exists() else _new_key(key_path)
            certificate = x509.load_pem_x509_certificate(path.read_bytes()) if path.exists() else None
            if certificate is None or _is_due(certificate, now):
                subject = certificate.subject if certificate else _name(f"{name} certificate authority")
                certificate = _self_signed(key, subject, now)
                write_private(path, _pem(certificate), mode=0o644)
            return cls(directory, key, certificate)

    @property
    def pem(self) -> str:
        return _pem(self.certificate).decode()

    def ensure(
        self,
        name: str,
        *,
        dns: Iterable[str] = (),
        addresses: Iterable[str] = (),
        directory: Path | None = None,
        lifetime: timedelta = LIFETIME,
        now: datetime | None = None,
    ) -> Issued:
        """The certificate `{name}.pem` with key `{name}.key`, for servers and clients alike.

        Made when it is missing, damaged, of another authority, or lacks one of the names; renewed
        when less than a third of its lifetime is left, or none. Names it already had are kept.
        """
        now = now or datetime.now(UTC)
        place = directory or self._directory
        path, key_path = place / f"{name}.pem", place / f"{name}.key"
        wanted = subject_names(dns, addresses)
        old = _load_certificate(path)
        if old is not None and key_path.exists() and self._issued(old) and _key_fits(old, key_path):
            present = _names_of(old)
            if not _is_due(old, now) and set(wanted) <= set(present):
                return Issued(path, key_path, old.not_valid_after_utc, renewed=False)
            wanted = [*present, *(n for n in wanted if n not in present)]
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = self._sign(key.public_key(), name, wanted, lifetime, now)
        # The key first: a crash in between leaves a pair that doesn't fit, which is made again.
        write_private(key_path, _key_pem(key))
        write_private(path, _pem(certificate), mode=0o644)
        return Issued(path, key_path, certificate.not_valid_after_utc, renewed=True)

    def sign_request(
        self,
        request_pem: str,
        name: str,
        *,
        dns: Iterable[str] = (),
        addresses: Iterable[str] = (),
        lifetime: timedelta = LIFETIME,
        now: datetime | None = None,
    ) -> str:
        """A certificate (PEM) for the key in a certificate request.

        Only the key is taken from the request; what it may be called is said by the caller.
        Raises SetupError for a request that isn't one or isn't signed by its own key.
        """
        try:
            request = x509.load_pem_x509_csr(request_pem.encode())
        except ValueError as error:
            raise SetupError(f"The certificate request of {name} can't be read: {error}.") from error
        if not request.is_signature_valid:
            raise SetupError(f"The certificate request of {name} isn't signed by the key it names.")
        public = request.public_key()
        if not isinstance(public, ec.EllipticCurvePublicKey) or public.key_size < 256:
            raise SetupError(f"The key of {name} must be an elliptic curve key of 256 bits or more.")
        now = now or datetime.now(UTC)
        return _pem(self._sign(public, name, subject_names(dns, addresses), lifetime, now)).decode()

    def _issued(self, certificate: x509.Certificate) -> bool:
        try:
            certificate.verify_directly_issued_by(self.certificate)
        except (ValueError, TypeError, InvalidSignature):
            return False
        return True

    def _sign(
        self,
        public: ec.EllipticCurvePublicKey,
        name: str,
        names: Sequence[x509.GeneralName],
        lifetime: timedelta,
        now: datetime,
    ) -> x509.Certificate:
        usage = x509.KeyUsage(
            digital_signature=True, content_commitment=False, key_encipherment=False,
            data_encipherment=False, key_agreement=False, key_cert_sign=False, crl_sign=False,
            encipher_only=False, decipher_only=False,
        )  # fmt: skip
        return (
            x509.CertificateBuilder()
            .subject_name(_name(name))
            .issuer_name(self.certificate.subject)
            .public_key(public)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - _BACKDATED)
            .not_valid_after(now + lifetime)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(usage, critical=True)
            .add_extension(
                x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]),
                critical=False,
            )
            .add_extension(x509.SubjectAlternativeName(names or [x509.DNSName(name)]), critical=False)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), critical=False
            )
            .sign(self._key, hashes.SHA256())
        )


def subject_names(dns: Iterable[str], addresses: Iterable[str]) -> list[x509.GeneralName]:
    """DNS names and IP addresses as subject alternative names; SetupError for a bad one."""
    names: list[x509.GeneralName] = []
    try:
        names += [x509.DNSName(name) for name in dict.fromkeys(dns)]
        names += [x509.IPAddress(ipaddress.ip_address(a)) for a in dict.fromkeys(addresses)]
    except ValueError as error:
        raise SetupError(f"A certificate can't carry this name or address: {error}.") from error
    return names


def fingerprint(pem: str | bytes) -> str:
    """`sha256:` and the digest of the certificate in hex: what a person compares."""
    data = pem.encode() if isinstance(pem, str) else pem
    return "sha256:" + x509.load_pem_x509_certificate(data).fingerprint(hashes.SHA256()).hex()


def _is_due(certificate: x509.Certificate, now: datetime) -> bool:
    end = certificate.not_valid_after_utc
    return now > end - (end - certificate.not_valid_before_utc) / 3


def _load_certificate(path: Path) -> x509.Certificate | None:
    try:
        return x509.load_pem_x509_certificate(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return None


def _key_fits(certificate: x509.Certificate, path: Path) -> bool:
    try:
        return _load_key(path).public_key() == certificate.public_key()
    except SetupError:
        return False


def _names_of(certificate: x509.Certificate) -> list[x509.GeneralName]:
    try:
        return list(certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value)
    except x509.ExtensionNotFound:
        return []


def _self_signed(key: ec.EllipticCurvePrivateKey, subject: x509.Name, now: datetime) -> x509.Certificate:
    usage = x509.KeyUsage(
        digital_signature=False, content_commitment=False, key_encipherment=False,
        data_encipherment=False, key_agreement=False, key_cert_sign=True, crl_sign=True,
        encipher_only=False, decipher_only=False,
    )  # fmt: skip
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _BACKDATED)
        .not_valid_after(now + CA_LIFETIME)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text[:64])])


def _new_key(path: Path) -> ec.EllipticCurvePrivateKey:
    key = ec.generate_private_key(ec.SECP256R1())
    write_private(path, _key_pem(key))
    return key


def _load_key(path: Path) -> ec.EllipticCurvePrivateKey:
    try:
        key = serialization.load_pem_private_key(path.read_bytes(), password=None)
    except (ValueError, TypeError) as error:
        raise SetupError(f"{path} isn't a readable private key: {error}.") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise SetupError(f"{path} holds a key of another kind than Volery makes.")
    return key


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
