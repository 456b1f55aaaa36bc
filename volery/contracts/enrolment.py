"""How a machine becomes a host: one HTTPS request with a one-time token, and later ones to renew what it got.

The token carries all that a new host needs to know: where the control plane is, the fingerprint of its certificate
authority, and a secret that is good once. The private halves of the host's keys never leave it.
"""

from __future__ import annotations

import base64
import binascii

import msgspec

from volery.contracts.agent import HostCapabilities
from volery.contracts.base import Call, Message, encode

ENROL_PATH = "/api/v1/enrolment"
RENEW_PATH = "/api/v1/enrolment/renew"
CA_PATH = "/ca.pem"
"""Served to anybody: its fingerprint is in the token."""
RENEW_SUBJECT = "enrolment.renew"
"""What a renewal is signed for, with the host's nkey, in the header `Volery-Signature`."""
TOKEN_PREFIX = "volery-enrol."  # noqa: S105


class EnrolmentToken(Message):
    """What is behind `volery-enrol.` in base64url."""

    url: str
    """https://host:port of the gateway."""
    ca_sha256: str
    """Of the certificate authority's certificate in DER: `sha256:` and hexadecimal. "": the gateway's certificate is
    from a public authority."""
    secret: str

    def text(self) -> str:
        return TOKEN_PREFIX + base64.urlsafe_b64encode(encode(self)).rstrip(b"=").decode()


def read_token(text: str) -> EnrolmentToken:
    """The token's parts. Raises ValueError, which never holds the secret, for what isn't one."""
    body = text.strip().removeprefix(TOKEN_PREFIX)
    if len(body) == len(text.strip()):
        raise ValueError(f"an enrolment token begins with {TOKEN_PREFIX}")
    try:
        raw = base64.urlsafe_b64decode(body + "=" * (-len(body) % 4))
        return msgspec.json.decode(raw, type=EnrolmentToken)
    except (binascii.Error, msgspec.DecodeError) as error:
        raise ValueError("the enrolment token is damaged: copy it again, whole") from error


class Enrol(Message):
    """POST {ENROL_PATH}. The same token with the same public key is answered again, so a crash in between is harmless;
    with another key it is refused."""

    token: str
    """The token's secret."""
    public_key: str
    """nkey of a NATS user, made by the host."""
    csr_pem: str
    """For the certificate of the host's data server."""
    hostname: str
    addresses: tuple[str, ...] = ()
    """IP addresses of the host, for the certificate."""
    capabilities: HostCapabilities = HostCapabilities()


class Enrolled(Message):
    host_id: str
    installation: str
    user_jwt: str
    """For `public_key`, limited to this host's own subjects. "": the bus asks for none (tests only)."""
    bus_servers: tuple[str, ...]
    """nats:// or tls:// URLs of every server."""
    owner_keys: dict[str, str]
    """Public nkeys of the owners that may give orders, by owner."""
    ca_pem: str
    certificate_pem: str


class RenewCertificate(Message):
    """POST {RENEW_PATH}, signed. A replay is harmless: the certificate is for a key that only the host has."""

    host_id: str
    public_key: str
    csr_pem: str
    addresses: tuple[str, ...] = ()


class CertificateRenewed(Message):
    """Everything that may have changed since the host enrolled."""

    user_jwt: str
    bus_servers: tuple[str, ...]
    owner_keys: dict[str, str]
    ca_pem: str
    certificate_pem: str


ENROL_HOST = Call("inventory.host.enrol", Enrol, Enrolled)
RENEW_HOST_CERTIFICATE = Call("inventory.host.renew_certificate", RenewCertificate, CertificateRenewed)
