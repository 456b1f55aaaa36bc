"""Who this host is: its keys, its certificate and whom it obeys; got once for a token, kept under the state directory.

The keys are made and stored before anything is sent, so that a crash at any moment leaves something that can be
tried again with the same token.
"""

from __future__ import annotations

import asyncio
import hashlib
import http.client
import ipaddress
import logging
import os
import socket
import ssl
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlsplit

import msgspec
import psutil
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from volery.contracts.agent import SIGNATURE_HEADER, HostCapabilities
from volery.contracts.base import Message, encode
from volery.contracts.enrolment import (
    CA_PATH,
    ENROL_PATH,
    RENEW_PATH,
    RENEW_SUBJECT,
    CertificateRenewed,
    Enrol,
    Enrolled,
    EnrolmentToken,
    RenewCertificate,
)
from volery.runtime.permissions import SIGNERS
from volery.runtime.signing import Key, Signer, format_creds

log = logging.getLogger(__name__)

HTTP_SECONDS = 20.0
ANSWER_MAX_BYTES = 1024 * 1024
RENEW_BELOW_SECONDS = 30 * 86_400.0
"""A third of a certificate's 90 days."""

A = TypeVar("A", bound=Message)


class EnrolmentError(Exception):
    """This host can't enrol; the message says why and what to do."""


class Unreachable(EnrolmentError):
    """The control plane could not be asked; the same request may be sent again later."""


class Keys(msgspec.Struct, frozen=True, kw_only=True):
    """The private halves. Stored before the public ones are sent anywhere."""

    seed: str
    data_key_pem: str


class Identity(msgspec.Struct, frozen=True, kw_only=True):
    """All that enrolment gave. One file, replaced as a whole."""

    keys: Keys
    enrolled: Enrolled
    directory: str = ""
    control_plane_url: str = ""

    @property
    def host_id(self) -> str:
        return self.enrolled.host_id

    @property
    def creds_path(self) -> Path | None:
        """The NATS credentials; None where the bus asks for none."""
        return self._path("bus.creds") if self.enrolled.user_jwt else None

    @property
    def ca_path(self) -> Path:
        return self._path("ca.pem")

    @property
    def certificate_path(self) -> Path:
        return self._path("data.crt")

    @property
    def key_path(self) -> Path:
        return self._path("data.key")

    def _path(self, name: str) -> Path:
        return Path(self.directory) / name


def load(state_dir: Path) -> Identity | None:
    """The stored identity, with its parts laid out as files; None before enrolment.

    Raises EnrolmentError when the file is damaged.
    """
    directory = state_dir / "identity"
    try:
        stored = (directory / "identity.json").read_bytes()
    except FileNotFoundError:
        return None
    try:
        identity = msgspec.json.decode(stored, type=Identity)
    except msgspec.DecodeError as error:
        raise EnrolmentError(
            f"{directory}/identity.json is damaged ({error}): restore it, or remove it and enrol this host again"
        ) from error
    identity = msgspec.structs.replace(identity, directory=str(directory))
    parts = {
        "ca.pem": identity.enrolled.ca_pem,
        "data.crt": identity.enrolled.certificate_pem,
        "data.key": identity.keys.data_key_pem,
    }
    if identity.enrolled.user_jwt:
        parts["bus.creds"] = format_creds(identity.enrolled.user_jwt, identity.keys.seed)
    for name, text in parts.items():
        write(directory / name, text.encode())
    return identity


def store(state_dir: Path, identity: Identity) -> Identity:
    """Makes it durable; from then on this host is enrolled."""
    directory = state_dir / "identity"
    write(directory / "identity.json", encode(identity))
    loaded = load(state_dir)
    assert loaded is not None
    return loaded


def write(path: Path, content: bytes) -> None:
    """Replaces a file as a whole, readable by its owner alone; the new one is on the disk when this returns."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    if path.exists() and path.read_bytes() == content:
        return
    new = path.with_name(path.name + ".new")
    descriptor = os.open(new, os.O_CREAT | os.O_WRONLY | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


async def enrol(
    state_dir: Path, token: EnrolmentToken, capabilities: HostCapabilities | None = None
) -> Identity:
    """Asks for an identity and stores it. Raises EnrolmentError; Unreachable when it is worth trying again."""
    keys = _keys(state_dir)
    addresses = own_addresses()
    hostname = socket.gethostname()
    question = Enrol(
        token=token.secret,
        public_key=Key(keys.seed).public,
        csr_pem=make_csr(keys, hostname, addresses),
        hostname=hostname,
        addresses=addresses,
        capabilities=capabilities or HostCapabilities(),
    )
    ca_pem = await asyncio.to_thread(fetch_ca, token)
    answer = await asyncio.to_thread(_post, token.url, ENROL_PATH, encode(question), {}, ca_pem, Enrolled)
    if token.ca_sha256 and not _is_pinned(answer.ca_pem, token):
        raise EnrolmentError(
            f"{token.url} answered with another certificate authority than the token names: nothing was stored;"
            " make a new token"
        )
    identity = Identity(keys=keys, enrolled=answer, control_plane_url=token.url)
    stored = store(state_dir, identity)
    log.info("this machine is host %s of installation %s", answer.host_id, answer.installation)
    return stored


async def renew(state_dir: Path, identity: Identity) -> Identity:
    """A new certificate, and whatever else has changed. Raises EnrolmentError, Unreachable."""
    addresses = own_addresses()
    question = RenewCertificate(
        host_id=identity.host_id,
        public_key=Key(identity.keys.seed).public,
        csr_pem=make_csr(identity.keys, socket.gethostname(), addresses),
        addresses=addresses,
    )
    body = encode(question)
    headers = {SIGNATURE_HEADER: Signer(identity.keys.seed).sign(RENEW_SUBJECT, body)}
    answer = await asyncio.to_thread(
        _post,
        identity.control_plane_url,
        RENEW_PATH,
        body,
        headers,
        identity.enrolled.ca_pem,
        CertificateRenewed,
    )
    changed = {field: getattr(answer, field) for field in CertificateRenewed.__struct_fields__}
    renewed = msgspec.structs.replace(identity.enrolled, **changed)
    return store(state_dir, msgspec.structs.replace(identity, enrolled=renewed))


def is_due(identity: Identity, now: float) -> bool:
    """Whether to ask for a new certificate: it nears its end, or this host doesn't know the key of somebody whom it must
    obey, as one that was enrolled under an older release."""
    left = certificate_seconds_left(identity, now)
    if left is None:
        return False
    return left <= RENEW_BELOW_SECONDS or not set(SIGNERS) <= identity.enrolled.owner_keys.keys()


def certificate_seconds_left(identity: Identity, now: float) -> float | None:
    """Until the data server's certificate expires; negative afterwards, None without one. `now` in Unix seconds."""
    if not identity.enrolled.certificate_pem:
        return None
    certificate = x509.load_pem_x509_certificate(identity.enrolled.certificate_pem.encode())
    return certificate.not_valid_after_utc.timestamp() - now


def _keys(state_dir: Path) -> Keys:
    """The keys that were made for a former attempt, or new ones."""
    path = state_dir / "identity" / "keys.json"
    if path.exists():
        return msgspec.json.decode(path.read_bytes(), type=Keys)
    private = ec.generate_private_key(ec.SECP256R1())
    pem = private.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    keys = Keys(seed=Key.new("user").seed, data_key_pem=pem.decode())
    write(path, encode(keys))
    return keys


def make_csr(keys: Keys, hostname: str, addresses: tuple[str, ...]) -> str:
    """A request for a certificate that names the host and its addresses."""
    private = serialization.load_pem_private_key(keys.data_key_pem.encode(), None)
    assert isinstance(private, ec.EllipticCurvePrivateKey)
    names: list[x509.GeneralName] = [x509.DNSName(hostname)]
    names += [x509.IPAddress(ipaddress.ip_address(address)) for address in addresses]
    request = (
        x509.CertificateSigningRequestBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, hostname[:64])]))
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .sign(private, hashes.SHA256())
    )
    return request.public_bytes(serialization.Encoding.PEM).decode()


def own_addresses() -> tuple[str, ...]:
    """IP addresses of this machine, without link-local ones; loopback last, for an installation on one machine."""
    found = {
        ipaddress.ip_address(address.address.split("%", 1)[0])
        for addresses in psutil.net_if_addrs().values()
        for address in addresses
        if address.family in (socket.AF_INET, socket.AF_INET6)
    }
    usable = [address for address in found if not address.is_link_local]
    return tuple(str(a) for a in sorted(usable, key=lambda a: (a.is_loopback, a.version, int(a))))


def fetch_ca(token: EnrolmentToken) -> str:
    """The certificate authority's certificate, if it is the one that the token names.

    Fetched over a connection that nobody vouches for: the fingerprint does. "" for a token without a fingerprint,
    of a gateway whose certificate is from an authority that everybody trusts.
    """
    if not token.ca_sha256:
        return ""
    unverified = ssl.create_default_context()
    unverified.check_hostname = False
    unverified.verify_mode = ssl.CERT_NONE
    status, body = _request(token.url, "GET", CA_PATH, b"", {}, unverified)
    try:
        pem = body.decode("ascii") if status == 200 else ""
        ssl.PEM_cert_to_DER_cert(pem)
    except ValueError:
        raise EnrolmentError(
            f"{token.url}{CA_PATH} is no certificate (status {status}): check that the token's address is a Volery"
            " gateway's"
        ) from None
    if not _is_pinned(pem, token):
        raise EnrolmentError(
            f"{token.url} has another certificate authority than the token names: somebody stands in between, or"
            " the token is of another installation; make a new one there"
        )
    return pem


def _is_pinned(ca_pem: str, token: EnrolmentToken) -> bool:
    try:
        der = ssl.PEM_cert_to_DER_cert(ca_pem)
    except ValueError:
        return False
    return hashlib.sha256(der).hexdigest() == token.ca_sha256.removeprefix("sha256:").lower()


def _post(url: str, path: str, body: bytes, headers: dict[str, str], ca_pem: str, answer: type[A]) -> A:
    verified = ssl.create_default_context(cadata=ca_pem or None)
    sent = {"content-type": "application/json", **headers}
    status, content = _request(url, "POST", path, body, sent, verified)
    if status >= 500:
        raise Unreachable(f"{url}{path} answered {status}: {_reason(content)}")
    if status >= 300:
        raise EnrolmentError(f"{url} refused this host ({status}): {_reason(content)}")
    try:
        return msgspec.json.decode(content, type=answer)
    except msgspec.DecodeError as error:
        raise EnrolmentError(f"{url}{path} answered what this agent can't read: {error}") from error


class _Refusal(msgspec.Struct):
    """An RFC 9457 problem, or ours."""

    detail: str = ""
    title: str = ""
    message: str = ""


def _reason(content: bytes) -> str:
    try:
        said = msgspec.json.decode(content, type=_Refusal)
    except msgspec.DecodeError:
        return "without a reason"
    return said.detail or said.message or said.title or "without a reason"


def _request(
    url: str, method: str, path: str, body: bytes, headers: dict[str, str], context: ssl.SSLContext
) -> tuple[int, bytes]:
    """Status and content. Raises Unreachable, EnrolmentError."""
    parts = urlsplit(url)
    if parts.scheme != "https" or not parts.hostname:
        raise EnrolmentError(f"the control plane's address must be https://host:port, not {url!r}")
    connection = http.client.HTTPSConnection(
        parts.hostname, parts.port or 443, timeout=HTTP_SECONDS, context=context
    )
    try:
        connection.request(method, parts.path.rstrip("/") + path, body or None, headers)
        answer = connection.getresponse()
        return answer.status, answer.read(ANSWER_MAX_BYTES)
    except ssl.SSLCertVerificationError as error:
        raise EnrolmentError(
            f"{url} did not prove who it is ({error.verify_message}): use an address that its certificate names"
        ) from error
    except (OSError, http.client.HTTPException) as error:
        raise Unreachable(
            f"{url} can't be reached ({error or type(error).__name__}): check the address, and that it runs"
        ) from error
    finally:
        connection.close()
