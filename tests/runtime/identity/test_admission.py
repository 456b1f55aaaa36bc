"""Who is let in, and how a connection behaves: foreign credentials, TLS, a bus that is away."""

from __future__ import annotations

import asyncio
import random
import ssl
import time
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import nats
import nats.micro
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID
from nats.aio.client import Server as Known
from nats.errors import OutboundBufferLimitError

from tests.support.nats_realm import (
    PATIENCE_SECONDS,
    Connect,
    Server,
    enrol,
    ignore,
    is_turned_away,
    open_user,
)
from volery.contracts.ids import new_id
from volery.runtime.connection import connect_options, reconnect_delay, settle
from volery.runtime.identity import Realm, mint_agent
from volery.runtime.signing import IdentityError, Key, format_creds, sign_jwt


async def test_expired_foreign_stolen_and_forged_credentials_are_turned_away(
    server: Server, realm: Realm, tmp_path: Path
) -> None:
    foreign = Realm.create(tmp_path / "foreign")
    key, host_id, now = Key.new("user"), new_id(), int(time.time())
    agents = Key((realm.directory / "keys" / "agent.seed").read_text())
    volery = {"type": "user", "issuer_account": realm.accounts["VOLERY"]}
    widened = {**volery, "pub": {"allow": [">"]}, "subs": -1, "data": -1, "payload": -1}
    good = mint_agent(realm, host_id, key.public)
    head, body, signature = good.split(".")
    tokens = {
        "good": (good, key),
        "expired": (mint_agent(realm, host_id, key.public, expires_in_seconds=-10), key),
        "foreign": (mint_agent(foreign, host_id, key.public), key),
        "stolen token without its key": (good, Key.new("user")),
        "self-signed": (sign_jwt(Key.new("account"), key.public, host_id, volery, now), key),
        "signed by a user": (sign_jwt(key, key.public, host_id, volery, now), key),
        "wider than its scope": (sign_jwt(agents, key.public, host_id, widened, now), key),
        "in the system account": (
            sign_jwt(agents, key.public, host_id,
                     {**volery, "issuer_account": realm.system_account}, now), key),
        "damaged": (f"{head}.{body}.{signature[:-8]}AAAAAAAA", key),
    }  # fmt: skip
    turned_away = {}
    for what, (token, holder) in tokens.items():
        path = tmp_path / "try.creds"
        path.write_text(format_creds(token, holder.seed))
        turned_away[what] = await is_turned_away(server, path, host_id)
    assert turned_away == {what: what != "good" for what in tokens}
    path.write_text("")
    with pytest.raises(IdentityError):
        connect_options(path, host_id, [server.url])
    with pytest.raises(nats.errors.Error, match=r"(?i)authorization"):
        await nats.connect(server.url, allow_reconnect=False, error_cb=ignore)


async def test_a_token_that_expires_ends_the_connection(
    realm: Realm, connect: Connect, tmp_path: Path
) -> None:
    host_id, path, key = enrol(realm, tmp_path)
    path.write_text(format_creds(mint_agent(realm, host_id, key.public, 2), key.seed))
    agent = await connect(host_id, path)
    await asyncio.wait_for(agent.closed.wait(), PATIENCE_SECONDS)


def test_reconnects_are_spread_and_never_slow() -> None:
    pick = reconnect_delay(random.Random(1))
    fresh = Known(uri=urlparse("nats://a:1"), reconnects=0)
    tired = Known(uri=urlparse("nats://b:1"), reconnects=40)
    assert pick([fresh, tired], {})[0] is fresh
    first = [pick([fresh], {})[1] for _ in range(200)]
    later = [pick([tired], {})[1] for _ in range(200)]
    assert max(first) <= 0.25
    assert len({round(delay, 3) for delay in first}) > 50
    assert min(later) >= 1.0
    assert max(later) <= 2.0


async def test_orders_fail_at_once_while_the_bus_is_away(own: Server) -> None:
    own.start()
    creds = own.realm.creds_path("inventory")
    orders = await open_user(own, creds, "inventory", at_once=True)
    calls = await open_user(own, creds, "inventory")
    await orders.nc.publish("host.x.order", b"")
    await asyncio.gather(settle(orders.nc), settle(calls.nc))
    own.stop()
    while orders.nc.is_connected or calls.nc.is_connected:
        await asyncio.sleep(0.005)  # the client tells of a disconnect before it knows it itself
    with pytest.raises(OutboundBufferLimitError):
        await orders.nc.publish("host.x.order", b"")
    await calls.nc.publish("inventory.vm.get", b"")
    own.start()
    for user in (orders, calls):
        await asyncio.wait_for(user.reconnected.wait(), PATIENCE_SECONDS)
        assert not await user.publish_refused("host.x.order")
        await user.nc.close()


def certificate(directory: Path, name: str, issuer: tuple[Any, Any] | None = None) -> tuple[Any, Any]:
    """A certificate and its key in `{name}.pem` and `{name}.key`: an authority, or a server's by one."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    by = issuer[0].subject if issuer else subject
    now = datetime.now(UTC)
    names = x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))])
    signed = (
        x509.CertificateBuilder(by, subject, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(hours=1))
        .add_extension(x509.BasicConstraints(ca=issuer is None, path_length=None), critical=True)
        .add_extension(names, critical=False)
        .sign(issuer[1] if issuer else key, hashes.SHA256())
    )
    (directory / f"{name}.pem").write_bytes(signed.public_bytes(Encoding.PEM))
    (directory / f"{name}.key").write_bytes(
        key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    )
    return signed, key


async def test_a_connection_trusts_only_servers_of_its_authority(own: Server, tmp_path: Path) -> None:
    ours, _ = certificate(tmp_path, "ca"), certificate(tmp_path, "stranger")
    certificate(tmp_path, "server", ours)
    files = f'cert_file: "{tmp_path}/server.pem", key_file: "{tmp_path}/server.key"'
    own.write_config(f"tls: {{ {files}, handshake_first: true }}")
    own.start()
    url = own.url.replace("nats://", "tls://")
    creds = own.realm.creds_path("ha")
    options = connect_options(creds, "ha", [url], ca=tmp_path / "ca.pem")
    nc = await nats.connect(**options)
    await settle(nc)
    await nc.close()
    options = connect_options(creds, "ha", [url], ca=tmp_path / "stranger.pem")
    with pytest.raises(ssl.SSLCertVerificationError):
        await nats.connect(**options, allow_reconnect=False, error_cb=ignore)
