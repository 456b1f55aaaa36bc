"""How a machine becomes a host: a one-time token, then its own identity on the bus and its own certificate."""

from __future__ import annotations

import asyncio
import hashlib
import secrets
from datetime import timedelta
from pathlib import Path

from msgspec.structs import replace

from services.inventory.clusters import name_taken
from services.inventory.desk import Inventory
from services.inventory.store import CLUSTERS, HOSTS, HostPrivate
from volery.contracts.enrolment import (
    ENROL_HOST,
    RENEW_HOST_CERTIFICATE,
    CertificateRenewed,
    Enrol,
    Enrolled,
    EnrolmentToken,
    RenewCertificate,
)
from volery.contracts.errors import Kind, Refused, conflict, invalid
from volery.contracts.host import CREATE_HOST, RENEW_HOST_TOKEN, CreateHost, Host, HostToken, RenewHostToken
from volery.contracts.ids import new_id
from volery.runtime import checks
from volery.runtime.bus import Caller
from volery.runtime.clock import utc_now
from volery.runtime.core import shown_once
from volery.runtime.identity import Realm, mint_agent
from volery.runtime.service import Part
from volery.runtime.tables import Stale, Taken
from volery.setup.errors import SetupError
from volery.setup.pki import Authority, fingerprint

part = Part()


def _token(inv: Inventory, secret: str) -> str:
    ca = Path(inv.config.pki_dir, "ca.pem")
    return EnrolmentToken(
        url=inv.config.public_url,
        ca_sha256=fingerprint(ca.read_text()) if inv.config.pki_dir else "",
        secret=secret,
    ).text()


def _answer(inv: Inventory, host: Host, secret: str) -> HostToken:
    token = _token(inv, secret)
    command = f"VOLERY_AGENT_ENROLMENT_TOKEN={token} python -m host_agent enrol"
    return HostToken(host=host, enrolment_token=token, command=command)


def _shown(host: Host) -> bytes:
    """Kept instead of the answer: a reader of the database must not find the token there."""
    return shown_once(
        conflict(
            f"host {host.name} has been answered for under this Idempotency-Key; its enrolment token was shown then and "
            f"is kept nowhere: make a new one with `volery host token {host.name}`",
            host_id=host.id,
            rule="shown_once",
        )
    )


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


@part.answers(CREATE_HOST)
async def create_host(inv: Inventory, ask: CreateHost, caller: Caller) -> HostToken:
    checks.name(ask.name)
    checks.text(ask.comment, "comment")
    checks.object_id(ask.cluster_id, "cluster")
    checks.between(ask.token_seconds, 60, 7 * 86400, "token_seconds", "seconds")
    cluster = (await CLUSTERS.get(inv.core.pool, ask.cluster_id)).public
    now = utc_now()
    host = Host(
        id=new_id(),
        revision=1,
        created_at=now,
        updated_at=now,
        name=ask.name,
        cluster_id=cluster.id,
        data_center_id=cluster.data_center_id,
        comment=ask.comment,
        tags=checks.tags(ask.tags),
    )
    secret = secrets.token_urlsafe(32)
    private = HostPrivate(
        token_sha256=_hash(secret), token_expires_at=now + timedelta(seconds=ask.token_seconds)
    )
    answer = _answer(inv, host, secret)
    try:
        await inv.core.commit(HOSTS.insert(host, private), caller=caller, answer=_shown(host))
    except Taken:
        raise name_taken("host", ask.name) from None
    return answer


@part.answers(RENEW_HOST_TOKEN)
async def renew_token(inv: Inventory, ask: RenewHostToken, caller: Caller) -> HostToken:
    checks.between(ask.token_seconds, 60, 7 * 86400, "token_seconds", "seconds")
    while True:
        row = await HOSTS.get(inv.core.pool, ask.id)
        secret = secrets.token_urlsafe(32)
        private = replace(
            row.private,
            token_sha256=_hash(secret),
            token_expires_at=utc_now() + timedelta(seconds=ask.token_seconds),
        )
        answer = _answer(inv, row.public, secret)
        try:
            await inv.core.commit(
                HOSTS.update(row, row.public, private), caller=caller, answer=_shown(row.public)
            )
        except Stale:
            continue
        return answer


@part.answers(ENROL_HOST)
async def enrol(inv: Inventory, ask: Enrol, caller: Caller) -> Enrolled:
    """The same token with the same key is answered again; with another key it is refused."""
    while True:
        row = await inv.store.host_with_token(_hash(ask.token))
        if row is None:
            raise Refused(
                Kind.FORBIDDEN,
                "this enrolment token is not known: it was replaced or mistyped; make a new one with "
                "`volery host token`",
            )
        private = row.private
        if not private.public_key and not _fresh(private):
            raise Refused(
                Kind.FORBIDDEN,
                f"this enrolment token of host {row.public.name} has expired; make a new one",
                host_id=row.id,
            )
        if private.public_key not in ("", ask.public_key):
            raise conflict(
                f"host {row.public.name} is enrolled with another key; remove it from the first machine, or create "
                "another host",
                host_id=row.id,
            )
        if await _twin(inv, row.id, ask.capabilities.hardware_uuid):
            raise conflict(
                f"this machine (hardware {ask.capabilities.hardware_uuid}) is enrolled as another host already; "
                "delete that host first",
            )
        answer = await _enrolled(inv, row.id, ask.public_key, ask.csr_pem, ask.addresses, ask.hostname)
        host = replace(
            row.public,
            enrolled_at=row.public.enrolled_at or utc_now(),
            address=row.public.address or (ask.addresses[0] if ask.addresses else ""),
            capabilities=ask.capabilities,
        )
        kept = replace(private, public_key=ask.public_key)
        try:
            await inv.core.commit(HOSTS.update(row, host, kept))
        except Stale:
            continue
        return answer


def _fresh(private: HostPrivate) -> bool:
    return private.token_expires_at is not None and private.token_expires_at > utc_now()


async def _twin(inv: Inventory, host_id: str, hardware_uuid: str) -> bool:
    """Whether another host already is this machine."""
    if not hardware_uuid:
        return False
    found = await inv.store.hosts_of_machine(hardware_uuid)
    return any(row.id != host_id and row.private.public_key for row in found)


async def _enrolled(
    inv: Inventory, host_id: str, public_key: str, csr_pem: str, addresses: tuple[str, ...], hostname: str
) -> Enrolled:
    return await asyncio.to_thread(_sign, inv, host_id, public_key, csr_pem, addresses, hostname)


def _sign(
    inv: Inventory, host_id: str, public_key: str, csr_pem: str, addresses: tuple[str, ...], hostname: str
) -> Enrolled:
    config = inv.config
    realm = Realm.load(Path(config.secrets_dir)) if config.secrets_dir else None
    jwt = mint_agent(realm, host_id, public_key) if realm else ""
    ca_pem, certificate = "", ""
    if config.pki_dir:
        authority = Authority.open(Path(config.pki_dir))
        ca_pem = authority.pem
        try:
            certificate = authority.sign_request(
                csr_pem, host_id, dns=[hostname, host_id], addresses=addresses
            )
        except (SetupError, ValueError) as error:
            raise invalid(f"the certificate request can't be used: {error}") from None
    return Enrolled(
        host_id=host_id,
        installation=config.installation,
        user_jwt=jwt,
        bus_servers=tuple(s for s in config.bus_public_servers.split(",") if s),
        owner_keys=dict(realm.order_keys()) if realm else {},
        ca_pem=ca_pem,
        certificate_pem=certificate,
    )


@part.answers(RENEW_HOST_CERTIFICATE)
async def renew_certificate(inv: Inventory, ask: RenewCertificate, caller: Caller) -> CertificateRenewed:
    """The gateway has verified the signature against `public_key`; here it must be the host's."""
    row = await HOSTS.get(inv.core.pool, ask.host_id)
    if row.private.public_key != ask.public_key:
        raise Refused(Kind.FORBIDDEN, f"this key is not that of host {row.public.name}; enrol again")
    made = await _enrolled(
        inv, row.id, ask.public_key, ask.csr_pem, ask.addresses, row.public.capabilities.hostname
    )
    return CertificateRenewed(
        user_jwt=made.user_jwt,
        bus_servers=made.bus_servers,
        owner_keys=made.owner_keys,
        ca_pem=made.ca_pem,
        certificate_pem=made.certificate_pem,
    )
