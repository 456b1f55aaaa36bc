"""How a program connects to the bus as itself, and what it asks of the system account: claims, consumers."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import random
import ssl
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from nats.aio.client import Client, Server
from nats.errors import Error as NatsError
from nats.js import JetStreamContext
from nats.js.api import AckPolicy, ConsumerConfig, DeliverPolicy
from nats.js.errors import NotFoundError

from volery.contracts.errors import unavailable
from volery.runtime.clock import monotonic
from volery.runtime.identity import Realm, check_revocable, reader_name
from volery.runtime.permissions import ACCOUNT_OF, ACCOUNTS
from volery.runtime.signing import IdentityError, Key, decode_segment, parse_creds, read_jwt

READER_IDLE_SECONDS: Final = 7 * 86_400.0
"""How long a reader may stay away before the server forgets its position (protocol: a week)."""
READER_ACKS_PENDING: Final = 1_000
RECONNECT_FIRST_SECONDS: Final = 0.25
RECONNECT_MOST_SECONDS: Final = 2.0
CLAIMS_REQUEST_SECONDS: Final = 1.0
CLAIMS_PAUSE_SECONDS: Final = 0.05


class CredsFile:
    """Credentials that may be replaced while the program runs: read again for every connection.

    A file that is damaged at that moment doesn't end a running program, which goes on with what it had.
    (nats-py's own reader loops for ever on a file without a token.)
    """

    def __init__(self, path: Path) -> None:
        """Raises IdentityError when there are no credentials at `path`."""
        self.path = path
        self._jwt, self._key = self._load()

    def _load(self) -> tuple[str, Key]:
        try:
            return parse_creds(self.path.read_text())
        except OSError as error:
            raise IdentityError(
                f"can't read the credentials {self.path} ({error.strerror}): set up the bus identities"
                " first, or enrol this host"
            ) from error
        except IdentityError as error:
            raise IdentityError(f"{self.path}: {error}") from error

    @property
    def public_key(self) -> str:
        return self._key.public

    def sign(self, nonce: str) -> bytes:
        """The server's nonce, signed; called by the client once per connection, before `jwt`."""
        with contextlib.suppress(IdentityError):
            self._jwt, self._key = self._load()
        return base64.b64encode(self._key.sign(nonce.encode()))

    def jwt(self) -> bytes:
        return self._jwt.encode()


def reconnect_delay(choose: random.Random) -> Callable[[list[Server], dict[str, Any]], Any]:
    """Picks any server, after a random wait that doubles per failure: a thousand agents don't come at once."""

    def pick(servers: list[Server], _info: dict[str, Any]) -> tuple[Server, float]:
        fewest = min(server.reconnects for server in servers)
        server = choose.choice([s for s in servers if s.reconnects == fewest])
        most = min(RECONNECT_FIRST_SECONDS * 2.0 ** min(server.reconnects, 10), RECONNECT_MOST_SECONDS)
        return server, choose.uniform(0.0 if server.reconnects == 0 else most / 2, most)

    return pick


def connect_options(
    creds: Path,
    user: str,
    servers: Iterable[str],
    *,
    ca: Path | None = None,
    at_once: bool = False,
    name: str | None = None,
) -> dict[str, Any]:
    """Keyword arguments for `BusClient.connect` that make it one user's connection, kept for ever.

    `user` is the service's name, `sys`, `claims`, the host's id or `reader-{system}`: it names the only inbox
    this user may listen to. `ca` is the certificate authority of the servers (TLS); all servers are
    listed. `at_once` is for orders and beats: publishing while disconnected fails with
    `OutboundBufferLimitError` instead of being delivered late. Raises IdentityError without credentials.
    """
    credentials = CredsFile(creds)
    options: dict[str, Any] = {
        "servers": list(servers),
        "name": name or user,
        "user_jwt_cb": credentials.jwt,
        "signature_cb": credentials.sign,
        "inbox_prefix": f"_INBOX.{user}",
        "max_reconnect_attempts": -1,
        "reconnect_to_server_handler": reconnect_delay(random.Random()),  # noqa: S311
        "connect_timeout": 2,
        "ping_interval": 2,
        "max_outstanding_pings": 2,
    }
    if at_once:
        options["pending_size"] = 0
    if ca is not None:
        options["tls"] = ssl.create_default_context(cafile=str(ca))
        # Servers say nothing before it, and nobody in between can talk us out of it.
        options["tls_handshake_first"] = True
    return options


async def settle(nc: Client) -> None:
    """Come back when the server has handled all that was published and subscribed before.

    One `flush` isn't enough: nats-py writes its PING to the socket ahead of the commands it still buffers,
    so the first PONG says only that those have been written since.
    """
    await nc.flush()
    await nc.flush()


@dataclass(frozen=True, slots=True)
class Presence:
    """Who connected or disconnected, from an event of the system account. Evidence, never proof."""

    name: str
    """The name that was signed: a host's id, a service, `reader-{system}`."""
    public_key: str
    reason: str
    """`Client Closed`, `Stale Connection`, …; empty for a connect."""


def read_presence(event: bytes) -> Presence:
    """What a `$SYS.ACCOUNT.*.CONNECT` or `DISCONNECT` says. Raises ValueError if it is none.

    The event's own `client.name` is what the client calls itself, and its `jwt` must never be logged.
    """
    try:
        fields = json.loads(event)
        client = fields["client"]
        claims = json.loads(decode_segment(client["jwt"].split(".")[1]))
        return Presence(claims["name"], client["user"], fields.get("reason", ""))
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise ValueError("not a connection event of a user with a token") from error


async def push_accounts(realm: Realm, system: Client, timeout_seconds: float = 5.0) -> None:
    """Make every server know this realm's claims: after an upgrade, a restored store, at start.

    `system` is connected as `claims`. Does nothing when the servers have them already.
    Raises Refused(unavailable) when no server takes them in time.
    """
    for account in ACCOUNTS:
        await _push(realm, system, account, (), timeout_seconds)


async def revoke(
    realm: Realm,
    system: Client,
    public_keys: Iterable[str],
    role: str = "agent",
    timeout_seconds: float = 5.0,
) -> None:
    """Cut these users (`agent` or `reader`) off for ever, within milliseconds; others don't notice.

    `system` is connected as `claims`. A key can't be un-revoked: the host enrols again with a new one.
    Repeating it costs one question, so the owner of the list asks again from time to time, which also heals
    a server whose store went back in time and two replicas that revoked at the same moment.
    Raises Refused for a key that isn't a user's or is a service's; Refused(unavailable) when no server
    confirmed it in time: it is then written down here only, so repeat it.
    """
    keys = tuple(public_keys)
    check_revocable(realm, keys)
    await _push(realm, system, ACCOUNT_OF[role], keys, timeout_seconds)


async def _push(
    realm: Realm, system: Client, account: str, revoked: tuple[str, ...], timeout_seconds: float
) -> None:
    # In a thread: it waits for the disk, and for another program that holds the realm.
    await asyncio.to_thread(realm.sign_account, account, revoked)
    problem = "none answered"
    deadline = monotonic() + timeout_seconds
    while (left := deadline - monotonic()) > 0:
        patience = min(left, CLAIMS_REQUEST_SECONDS)
        try:
            served = await _served(realm, system, account, patience)
            seen, after = _seen(realm, account, served)
            wanted = await asyncio.to_thread(realm.sign_account, account, (*revoked, *seen), after)
            if served == wanted:
                return
            update = "$SYS.REQ.CLAIMS.UPDATE"
            answer = await system.request(update, wanted.encode(), timeout=patience)
            problem = str(json.loads(answer.data).get("error", "it answers with older claims"))
        except NatsError as error:
            problem = str(error) or type(error).__name__
            await asyncio.sleep(CLAIMS_PAUSE_SECONDS)
    raise unavailable(
        f"no NATS server took the claims of the account {account} ({problem}): check that the servers"
        " run, then repeat",
        account=account,
    )


async def _served(realm: Realm, system: Client, account: str, timeout_seconds: float) -> str:
    subject = f"$SYS.REQ.ACCOUNT.{realm.accounts[account]}.CLAIMS.LOOKUP"
    answer = await system.request(subject, b"", timeout=timeout_seconds)
    return answer.data.decode().strip()


def _seen(realm: Realm, account: str, served: str) -> tuple[tuple[str, ...], int]:
    """Keys that the server's claims revoke, and the time ours must be newer than to replace them.

    They may differ because another replica wrote them. Another operator's are worth nothing.
    """
    try:
        claims = read_jwt(served, realm.operator)
    except IdentityError:
        return (), -1
    ours = served == realm.account_jwt(account)
    return tuple(claims["nats"].get("revocations", ())), -1 if ours else claims["iat"]


async def create_reader_consumers(
    js: JetStreamContext,
    system: str,
    streams: Iterable[str],
    *,
    after: Mapping[str, int] | None = None,
    subjects: tuple[str, ...] = (),
) -> str:
    """Give an outside system its place in each of these streams; returns the durable's name.

    A place is kept for 7 days without the reader. `after` maps a stream to the sequence it has already
    seen (else it begins with the oldest retained fact); `subjects` narrows what it may see. Existing
    consumers are left where they are. A rebuilt stream has lost them: call this again.
    Raises Refused(invalid) for a bad name, nats.js errors for a stream that doesn't exist.
    """
    name = reader_name(system)
    for stream in streams:
        seen = (after or {}).get(stream)
        try:
            await js.consumer_info(stream, name)
            continue
        except NotFoundError:
            await js.stream_info(stream)
        config = ConsumerConfig(
            durable_name=name,
            description=f"outside system {system}",
            ack_policy=AckPolicy.EXPLICIT,
            deliver_policy=DeliverPolicy.ALL if seen is None else DeliverPolicy.BY_START_SEQUENCE,
            opt_start_seq=None if seen is None else seen + 1,
            filter_subjects=list(subjects) or None,
            max_ack_pending=READER_ACKS_PENDING,
            inactive_threshold=READER_IDLE_SECONDS,
        )
        await js.add_consumer(stream, config)
    return name


async def delete_reader_consumers(js: JetStreamContext, system: str, streams: Iterable[str]) -> None:
    """Forget an outside system's places. One that is already gone is no error."""
    for stream in streams:
        try:
            await js.delete_consumer(stream, reader_name(system))
        except NotFoundError:
            continue
