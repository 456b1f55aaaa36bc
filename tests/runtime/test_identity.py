"""Every user of the bus is tried against a real nats-server: what it needs works, the rest is refused."""

from __future__ import annotations

import asyncio
import json
import random
import shutil
import ssl
import stat
import subprocess
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
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
from nats.aio.client import Client
from nats.aio.client import Server as Known
from nats.aio.msg import Msg
from nats.errors import NoRespondersError, OutboundBufferLimitError
from nats.js.api import StreamConfig

from volery.contracts.errors import Refused
from volery.contracts.ids import new_id
from volery.runtime.connection import (
    CredsFile,
    connect_options,
    create_reader_consumers,
    delete_reader_consumers,
    push_accounts,
    read_presence,
    reconnect_delay,
    revoke,
    settle,
)
from volery.runtime.identity import Realm, mint_agent, mint_reader
from volery.runtime.permissions import (
    ACCOUNT_OF,
    COMMANDERS,
    LISTENERS,
    OWNERS,
    OWNERS_STREAMS,
    READERS_DOMAIN,
    SERVICES,
    permissions_of,
    stream_of,
    table,
)
from volery.runtime.signing import (
    IdentityError,
    Key,
    Signer,
    Verifier,
    format_creds,
    is_public_key,
    parse_creds,
    read_jwt,
    sign_jwt,
    verify,
)

ROOT = Path(__file__).parents[2]
SERVER = ROOT / ".venv" / "bin" / "nats-server"
PATIENCE_SECONDS = 10.0


class Server:
    """One nats-server that trusts a realm. `start` again keeps its port and, unless told, its store."""

    def __init__(self, directory: Path, realm: Realm) -> None:
        self.directory, self.realm, self.port = directory, realm, -1
        self.cluster_url = ""
        self.process: subprocess.Popen[bytes] | None = None
        directory.mkdir()

    def write_config(self, extra: str = "", jetstream: bool = True) -> None:
        store = f'jetstream: {{ store_dir: "{self.directory}/js", sync_interval: always }}'
        (self.directory / "nats.conf").write_text(
            f'host: 127.0.0.1\nport: {self.port}\nports_file_dir: "{self.directory}"\n'
            f'server_name: "{self.directory.name}"\n{store if jetstream else ""}\n{extra}\n'
            + self.realm.render_nats_conf_identity(self.directory / "resolver")
        )

    def start(self) -> None:
        for old in self.directory.glob("*.ports"):
            old.unlink()
        config = self.directory / "nats.conf"
        config.write_text(config.read_text().replace("port: -1", f"port: {self.port}"))
        with (self.directory / "log").open("ab") as log:
            self.process = subprocess.Popen(
                [SERVER, "-c", self.directory / "nats.conf"], stdout=log, stderr=log
            )
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not (ports := self._ports()):
            assert self.process.poll() is None, (self.directory / "log").read_text()
            assert time.monotonic() < deadline, "nats-server wrote no ports file"
            time.sleep(0.01)  # the server announces its port by a file only
        self.port = int(ports["nats"][0].rpartition(":")[2])
        self.cluster_url = ports["cluster"][0] if ports.get("cluster") else ""

    def _ports(self) -> dict[str, list[str]]:
        for path in self.directory.glob("*.ports"):
            if (text := path.read_text().strip()).endswith("}"):
                return dict(json.loads(text))
        return {}

    @property
    def url(self) -> str:
        return f"nats://127.0.0.1:{self.port}"

    def stop(self) -> None:
        if self.process:
            self.process.kill()
            self.process.wait()


class User:
    """A connection, what the server refused it, and the moment it was closed."""

    def __init__(self, nc: Client) -> None:
        self.nc = nc
        self.errors: list[str] = []
        self.closed, self.reconnected = asyncio.Event(), asyncio.Event()
        self.disconnects = 0

    async def refuses(self, act: Awaitable[Any]) -> bool:
        """Whether the server answered this with a permissions violation, which comes before the pong."""
        self.errors.clear()
        await act
        await settle(self.nc)
        return any("permissions violation" in error for error in self.errors)

    async def publish_refused(self, subject: str) -> bool:
        return await self.refuses(self.nc.publish(subject, b"x"))

    async def subscribe_refused(self, subject: str) -> bool:
        return await self.refuses(self.nc.subscribe(subject))


async def open_user(
    server: Server, creds: Path, name: str, called: str | None = None, at_once: bool = False
) -> User:
    user = User(Client())

    async def on_error(error: Exception) -> None:
        user.errors.append(str(error).lower())

    async def on_closed() -> None:
        user.closed.set()

    async def on_disconnected() -> None:
        user.disconnects += 1

    async def on_reconnected() -> None:
        user.reconnected.set()

    options = connect_options(creds, name, [server.url], name=called, at_once=at_once)
    await user.nc.connect(
        **options,
        error_cb=on_error,
        closed_cb=on_closed,
        disconnected_cb=on_disconnected,
        reconnected_cb=on_reconnected,
    )
    return user


async def is_turned_away(server: Server, creds: Path, name: str) -> bool:
    """Whether the server refuses these credentials at the door (one try)."""
    options = connect_options(creds, name, [server.url])
    del options["reconnect_to_server_handler"]
    options |= {"max_reconnect_attempts": 1, "allow_reconnect": False, "error_cb": _ignore}
    try:
        nc = await nats.connect(**options)
    except nats.errors.Error as error:
        return "authorization" in str(error).lower() or "authentication" in str(error).lower()
    await nc.close()
    return False


async def _ignore(_error: Exception) -> None:
    return


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    directory = tmp_path_factory.mktemp("identity")
    server = Server(directory / "nats", Realm.create(directory / "bus"))
    server.write_config()
    server.start()
    yield server
    server.stop()


@pytest.fixture
def realm(server: Server) -> Realm:
    return server.realm


@pytest.fixture
def own(tmp_path: Path) -> Iterator[Server]:
    """A server of the test's own, not started yet."""
    server = Server(tmp_path / "nats", Realm.create(tmp_path / "bus"))
    server.write_config()
    yield server
    server.stop()


Connect = Callable[..., Awaitable[User]]


@pytest.fixture
async def connect(server: Server) -> AsyncIterator[Connect]:
    """Connects a service, or the holder of other credentials, and closes it afterwards."""
    async with AsyncExitStack() as stack:

        async def open_one(name: str, creds: Path | None = None, at: Server = server) -> User:
            user = await open_user(at, creds or at.realm.creds_path(name), name)
            stack.push_async_callback(user.nc.close)
            return user

        yield open_one


def enrol(realm: Realm, directory: Path, host_id: str | None = None) -> tuple[str, Path, Key]:
    """What an agent does: make a key, have its public half signed, keep the credentials."""
    host_id = host_id or new_id()
    key = Key.new("user")
    path = directory / f"{host_id}.creds"
    path.write_text(format_creds(mint_agent(realm, host_id, key.public), key.seed))
    return host_id, path, key


async def witness_creds(realm: Realm, directory: Path) -> Path:
    """A user that may do everything in VOLERY, signed by the account itself, to see what arrives."""
    key = Key.new("user")
    account = Key((realm.directory / "keys" / "VOLERY.seed").read_text())
    nats_claims = {"type": "user", "subs": -1, "data": -1, "payload": -1}
    path = directory / "witness.creds"
    token = sign_jwt(account, key.public, "witness", nats_claims, int(time.time()))
    path.write_text(format_creds(token, key.seed))
    return path


@asynccontextmanager
async def streams(owners: tuple[str, ...], connect: Connect) -> AsyncIterator[dict[str, User]]:
    """Each owner's stream, made by the owner; FACTS_HOST by inventory. Removed afterwards."""
    users = {owner: await connect("inventory" if owner == "host" else owner) for owner in owners}
    for owner, user in users.items():
        config = StreamConfig(name=stream_of(owner), subjects=[f"fact.{owner}.>"])
        await user.nc.jetstream().add_stream(config)
    try:
        yield users
    finally:
        for owner, user in users.items():
            await user.nc.jetstream().delete_stream(stream_of(owner))


# --- keys and files ---------------------------------------------------------------------------------


def test_a_second_start_reuses_every_key_and_changes_no_file(tmp_path: Path) -> None:
    first = Realm.create(tmp_path / "bus")
    before = {p: p.read_bytes() for p in (tmp_path / "bus").rglob("*") if p.is_file()}
    second = Realm.create(tmp_path / "bus")
    after = {p: p.read_bytes() for p in (tmp_path / "bus").rglob("*") if p.is_file()}
    assert second == first == Realm.load(tmp_path / "bus")
    assert after == before
    assert set(first.users) == {*SERVICES, "sys", "claims"}
    assert set(first.resolver_preload()) == set(first.accounts.values())


def test_secrets_are_readable_by_their_owner_only(tmp_path: Path) -> None:
    Realm.create(tmp_path / "bus")
    for path in [tmp_path / "bus", *(tmp_path / "bus").rglob("*")]:
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path


async def test_starters_at_the_same_moment_make_one_realm(tmp_path: Path) -> None:
    makers = [asyncio.to_thread(Realm.create, tmp_path / "bus") for _ in range(6)]
    realms = await asyncio.gather(*makers)
    assert all(realm == realms[0] for realm in realms)


def test_a_lost_operator_key_is_told_instead_of_replaced(tmp_path: Path) -> None:
    Realm.create(tmp_path / "bus")
    (tmp_path / "bus" / "keys" / "operator.seed").unlink()
    with pytest.raises(IdentityError, match=r"operator\.seed is missing.*backup"):
        Realm.create(tmp_path / "bus")
    assert not (tmp_path / "bus" / "keys" / "operator.seed").exists()


def test_damaged_files_are_named(tmp_path: Path) -> None:
    realm = Realm.create(tmp_path / "bus")
    realm.creds_path("ha").write_text("")
    with pytest.raises(IdentityError, match="NATS credentials"):
        Realm.create(tmp_path / "bus")
    with pytest.raises(IdentityError, match=r"ha\.creds.*NATS credentials"):
        CredsFile(realm.creds_path("ha"))
    with pytest.raises(IdentityError, match=r"can't read .*nobody\.creds"):
        CredsFile(realm.creds_path("nobody"))
    with pytest.raises(IdentityError, match=r"can't read .*realm\.json"):
        Realm.load(tmp_path / "elsewhere")


def test_a_deleted_service_credential_is_made_anew_and_the_others_stay(tmp_path: Path) -> None:
    before = Realm.create(tmp_path / "bus")
    before.creds_path("ha").unlink()
    after = Realm.create(tmp_path / "bus")
    assert after.users["ha"] != before.users["ha"]
    assert {k: v for k, v in after.users.items() if k != "ha"} == {
        k: v for k, v in before.users.items() if k != "ha"
    }


def test_a_running_program_survives_credentials_that_are_being_replaced(tmp_path: Path) -> None:
    realm = Realm.create(tmp_path / "bus")
    creds = CredsFile(realm.creds_path("ha"))
    good = creds.sign("nonce"), creds.jwt()
    realm.creds_path("ha").write_text("half a fi")
    assert (creds.sign("nonce"), creds.jwt()) == good
    realm.creds_path("ha").write_text(realm.creds_path("dwh").read_text())
    assert creds.sign("nonce") != good[0]
    assert creds.public_key == realm.users["dwh"]


def test_seeds_never_show_in_a_trace() -> None:
    key = Key.new("user")
    assert key.seed not in repr(key)
    assert key.public in repr(key)


@pytest.mark.parametrize("text", ["", "U", "SUAAA", "ü", "U" * 56, "not a key", "O" * 56])
def test_what_is_no_public_key_is_seen(text: str) -> None:
    assert not is_public_key(text, "user")


def test_a_public_key_is_of_one_kind() -> None:
    assert is_public_key(Key.new("user").public, "user")
    assert not is_public_key(Key.new("account").public, "user")
    altered = Key.new("user").public
    assert not is_public_key(altered[:-5] + ("B" if altered[-5] == "A" else "A") + altered[-4:], "user")


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


# --- permissions as a table -------------------------------------------------------------------------


def test_no_role_has_an_empty_list_which_would_mean_everything() -> None:
    for role in ACCOUNT_OF:
        claims = permissions_of(role).claims()
        assert claims["pub"].get("allow") or claims["pub"]["deny"] == [">"]
        assert claims["sub"].get("allow") or claims["sub"]["deny"] == [">"]
        for side in ("pub", "sub"):
            assert not {">", "*", "host.>", "fact.>", "$JS.API.>"} & set(claims[side].get("allow", []))


def test_the_documentation_shows_the_table() -> None:
    assert table() in (ROOT / "docs" / "architecture" / "identities.md").read_text()


# --- order signatures -------------------------------------------------------------------------------


def test_an_order_is_known_by_its_signature(tmp_path: Path) -> None:
    realm = Realm.create(tmp_path / "bus")
    subject, payload = "host.a.order", b'{"kind":"domain.destroy"}'
    signers = {o: Signer(parse_creds(realm.creds_path(o).read_text())[1].seed) for o in OWNERS}
    verifier = Verifier(realm.order_keys())
    for owner, signer in signers.items():
        header = signer.sign(subject, payload)
        assert verify(signer.public_key, subject, payload, header)
        expected = owner if owner in COMMANDERS else None
        assert verifier.owner_of(subject, payload, header) == expected


def test_a_signature_holds_for_one_subject_and_one_payload_only() -> None:
    signer, other = Signer(Key.new("user").seed), Signer(Key.new("user").seed)
    header = signer.sign("host.a.order", b"payload")
    _, _, signature = header.partition(".")
    forgeries = [
        (signer.public_key, "host.b.order", b"payload", header),
        (signer.public_key, "host.a.order", b"payloae", header),
        (signer.public_key, "host.a.order\npay", b"load", header),
        (other.public_key, "host.a.order", b"payload", header),
        (other.public_key, "host.a.order", b"payload", f"{other.public_key}.{signature}"),
        (signer.public_key, "host.a.order", b"payload", header[:-2]),
        (signer.public_key, "host.a.order", b"payload", ""),
        (signer.public_key, "host.a.order", b"payload", f"{signer.public_key}.ü!"),
        ("nonsense", "host.a.order", b"payload", f"nonsense.{signature}"),
    ]
    for forgery in forgeries:
        assert not verify(*forgery), forgery


# --- agents -----------------------------------------------------------------------------------------


async def test_an_agent_can_do_its_work(realm: Realm, connect: Connect, tmp_path: Path) -> None:
    host_id, creds, _ = enrol(realm, tmp_path)
    agent = await connect(host_id, creds)
    async with streams(("host",), connect) as owners:
        ack = await agent.nc.jetstream().publish(f"fact.host.{host_id}.inventory.reported", b"{}")
        assert (ack.stream, ack.seq) == ("FACTS_HOST", 1)
        heard = {}
        for listener in LISTENERS:
            user = owners["host"] if listener == "inventory" else await connect(listener)
            heard[listener] = [await user.nc.subscribe(s) for s in ("beat.host.*", "metrics.host.*")]
            await settle(user.nc)
        for subject in (f"beat.host.{host_id}", f"metrics.host.{host_id}"):
            await agent.nc.publish(subject, subject.encode())
        for subscriptions in heard.values():
            for subscription in subscriptions:
                message = await subscription.next_msg(PATIENCE_SECONDS)
                assert message.subject == message.data.decode()
        assert not agent.errors


@pytest.mark.parametrize("word", ["order", "cancel", "committed", "report", "ask", "ask.describe"])
async def test_owners_that_command_reach_the_agent_and_are_answered(
    word: str, realm: Realm, connect: Connect, tmp_path: Path
) -> None:
    host_id, creds, _ = enrol(realm, tmp_path)
    agent = await connect(host_id, creds)

    async def answer(message: Msg) -> None:
        await message.respond(b"journaled")

    await agent.nc.subscribe(f"host.{host_id}.>", cb=answer)
    await settle(agent.nc)
    for owner in COMMANDERS:
        user = await connect(owner)
        reply = await user.nc.request(f"host.{host_id}.{word}", b"", timeout=PATIENCE_SECONDS)
        assert reply.data == b"journaled"
    assert not agent.errors


async def test_an_agent_answers_once(realm: Realm, connect: Connect, tmp_path: Path) -> None:
    host_id, creds, _ = enrol(realm, tmp_path)
    agent, inventory = await connect(host_id, creds), await connect("inventory")
    orders = await agent.nc.subscribe(f"host.{host_id}.order")
    inbox = inventory.nc.new_inbox()
    answers = await inventory.nc.subscribe(inbox)
    await asyncio.gather(settle(agent.nc), settle(inventory.nc))
    await inventory.nc.publish(f"host.{host_id}.order", b"", reply=inbox)
    order = await orders.next_msg(PATIENCE_SECONDS)
    assert not await agent.refuses(order.respond(b"first"))
    assert await agent.refuses(order.respond(b"second"))
    assert (await answers.next_msg(PATIENCE_SECONDS)).data == b"first"
    assert answers.pending_msgs == 0


async def test_an_acknowledgement_steered_to_another_host_is_no_order(
    realm: Realm, connect: Connect, tmp_path: Path
) -> None:
    """The server checks no reply subject: this arrives, and only the signature tells it from an order."""
    (a, a_creds, _), (b, b_creds, _) = (enrol(realm, tmp_path) for _ in range(2))
    attacker, victim = await connect(a, a_creds), await connect(b, b_creds)
    orders = await victim.nc.subscribe(f"host.{b}.order")
    await settle(victim.nc)
    async with streams(("host",), connect):
        await attacker.nc.publish(f"fact.host.{a}.x", b"{}", reply=f"host.{b}.order")
        message = await orders.next_msg(PATIENCE_SECONDS)
        assert b"FACTS_HOST" in message.data
        header = (message.headers or {}).get("Volery-Signature", "")
        assert Verifier(realm.order_keys()).owner_of(message.subject, message.data, header) is None


async def test_an_agent_can_do_nothing_else(realm: Realm, connect: Connect, tmp_path: Path) -> None:
    host_id, creds, _ = enrol(realm, tmp_path)
    other = new_id()
    agent = await connect(host_id, creds)
    witness = await connect("witness", await witness_creds(realm, tmp_path))
    everything = await witness.nc.subscribe(">")
    await settle(witness.nc)
    async with streams(("host", "inventory"), connect):
        publishes = (
            f"fact.host.{other}.inventory.reported", "fact.host", f"beat.host.{other}",
            f"metrics.host.{other}", f"host.{host_id}.order", f"host.{other}.order",
            f"host.{other}.committed", "inventory.vm.start", "fact.inventory.vm.changed",
            "relay.inventory.wake", "$SRV.PING", "_INBOX.inventory.x", f"_INBOX.{other}.x",
            f"_INBOX.{host_id}.x", "$JS.API.INFO", "$JS.API.STREAM.INFO.FACTS_HOST",
            "$JS.API.STREAM.DELETE.FACTS_HOST", "$JS.API.STREAM.PURGE.FACTS_HOST",
            "$JS.API.CONSUMER.CREATE.FACTS_HOST", "$JS.API.CONSUMER.MSG.NEXT.FACTS_HOST.x",
            "$JS.API.STREAM.MSG.GET.FACTS_INVENTORY", "$JS.ACK.FACTS_HOST.x.1.1.1.1.1",
            "$SYS.REQ.SERVER.PING", "$SYS.REQ.CLAIMS.UPDATE", "$SYS.REQ.USER.INFO", "anything",
        )  # fmt: skip
        for subject in publishes:
            assert await agent.publish_refused(subject), f"published {subject}"
        subscriptions = (
            ">", "*", "host.>", "host.*.order", f"host.{other}.>", f"host.{other}.order", "fact.>",
            f"fact.host.{host_id}.>", f"beat.host.{host_id}", "beat.>", "metrics.>", "inventory.>",
            "inventory.vm.start", "_INBOX.>", "_INBOX.*.>", "_INBOX.inventory.>", f"_INBOX.{other}.>",
            "$SYS.>", "$SYS.ACCOUNT.*.DISCONNECT", "$JS.>", "$SRV.>", "relay.>",
        )  # fmt: skip
        for subject in subscriptions:
            assert await agent.subscribe_refused(subject), f"subscribed {subject}"
        await settle(witness.nc)
        heard = {(await everything.next_msg()).subject for _ in range(everything.pending_msgs)}
        assert not heard & set(publishes)
    assert agent.nc.is_connected


async def test_two_agents_stand_side_by_side(realm: Realm, connect: Connect, tmp_path: Path) -> None:
    (a, a_creds, _), (b, b_creds, _) = enrol(realm, tmp_path), enrol(realm, tmp_path)
    one, two = await connect(a, a_creds), await connect(b, b_creds)
    assert not await one.publish_refused(f"fact.host.{a}.x")
    assert await one.publish_refused(f"fact.host.{b}.x")
    assert not await two.publish_refused(f"fact.host.{b}.x")
    assert await two.publish_refused(f"fact.host.{a}.x")
    assert not await two.subscribe_refused(f"host.{b}.order")
    assert await two.subscribe_refused(f"host.{a}.order")


@pytest.mark.parametrize(
    "host_id", ["", "*", ">", "a.b", "inventory", "gateway", "{{name()}}", "h 1", new_id().upper()]
)
def test_a_host_id_that_could_widen_permissions_is_refused(host_id: str, realm: Realm) -> None:
    with pytest.raises(Refused, match="not a host id"):
        mint_agent(realm, host_id, Key.new("user").public)


def test_a_key_that_is_no_agents_is_refused(realm: Realm) -> None:
    for key in ("", "UABC", Key.new("account").public, Key.new("user").seed):
        with pytest.raises(Refused, match="nkey user"):
            mint_agent(realm, new_id(), key)
    with pytest.raises(Refused, match="belongs to a service"):
        mint_agent(realm, new_id(), realm.users["inventory"])


# --- services ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("owner", OWNERS)
async def test_an_owner_answers_calls_keeps_its_stream_and_reads_the_others(
    owner: str, realm: Realm, connect: Connect
) -> None:
    me, gateway = await connect(owner), await connect("gateway")
    neighbour = OWNERS[OWNERS.index(owner) - 1]

    async def answer(request: nats.micro.Request) -> None:
        await request.respond(b"answer to " + request.data)

    service = await nats.micro.add_service(me.nc, name=owner, version="1.0.0")
    await service.add_endpoint(name="start", subject=f"{owner}.thing.start", handler=answer)
    await settle(me.nc)
    for asker in (gateway, await connect(neighbour), await connect("setup")):
        reply = await asker.nc.request(f"{owner}.thing.start", b"x", timeout=PATIENCE_SECONDS)
        assert reply.data == b"answer to x"
        assert (await asker.nc.request(f"$SRV.PING.{owner}", b"", timeout=5)).data
    await service.stop()

    async with streams((owner, neighbour), connect) as users:
        js = users[owner].nc.jetstream()
        ack = await js.publish(f"fact.{owner}.thing.changed", b"{}")
        assert ack.seq == 1
        assert (await js.stream_info(stream_of(owner))).state.last_seq == 1
        for reader in (users[neighbour], gateway):
            pull = await reader.nc.jetstream().pull_subscribe(
                "", durable=f"{neighbour}-x", stream=stream_of(owner)
            )
            (fact,) = await pull.fetch(1, timeout=PATIENCE_SECONDS)
            await fact.nak()
        ordered = await gateway.nc.jetstream().subscribe(
            f"fact.{owner}.>", stream=stream_of(owner), ordered_consumer=True
        )
        assert (await ordered.next_msg(PATIENCE_SECONDS)).subject == f"fact.{owner}.thing.changed"
        await js.purge_stream(stream_of(owner))
        me_and_others = [me, gateway, *users.values()]
        assert [user.errors for user in me_and_others] == [[] for _ in me_and_others]


@pytest.mark.parametrize("service", SERVICES)
async def test_a_service_can_not_do_another_ones_work(service: str, connect: Connect) -> None:
    me = await connect(service)
    others = [owner for owner in OWNERS if owner != service]
    publishes = [f"fact.{o}.thing.changed" for o in (*others, "host.x")]
    publishes += [
        f"$JS.API.STREAM.{verb}.{stream_of(o)}"
        for o in (*others, *([] if service == "inventory" else ["host"]), "new")
        for verb in ("CREATE", "UPDATE", "DELETE", "PURGE", "SNAPSHOT", "RESTORE")
    ]
    publishes += ["$SYS.REQ.SERVER.PING", "$SYS.REQ.CLAIMS.UPDATE", "$JS.API.STREAM.CREATE.X"]
    publishes += ["beat.host.x", "metrics.host.x", "_INBOX.x.y", f"_INBOX.{new_id()}.y", "anything"]
    publishes += [f"relay.{o}.wake" for o in others]
    if service not in COMMANDERS:
        publishes += [f"host.x.{w}" for w in ("order", "cancel", "committed", "report", "ask.x")]
    for subject in publishes:
        assert await me.publish_refused(subject), f"{service} published {subject}"
    subscriptions = [">", "*", "host.>", "host.x.order", "host.*.order", "fact.>", "$SYS.>"]
    subscriptions += ["$SYS.ACCOUNT.*.CONNECT", "$JS.API.>", "$JS.ACK.>", "_INBOX.>", "_INBOX.x.>"]
    subscriptions += [f"{o}.>" for o in others] + [f"{o}.vm.start" for o in others]
    subscriptions += [f"_INBOX.{s}.>" for s in SERVICES if s != service] + ["$SRV.>"]
    subscriptions += [f"relay.{o}.wake" for o in others] + ["fact.host.>", "beat.>"]
    if service not in LISTENERS:
        subscriptions += ["beat.host.*", "metrics.host.*", "beat.host.x"]
    for subject in subscriptions:
        assert await me.subscribe_refused(subject), f"{service} subscribed {subject}"
    assert me.nc.is_connected


async def test_the_system_users_can_do_their_one_thing(
    realm: Realm, connect: Connect, tmp_path: Path
) -> None:
    watcher, claims = await connect("sys"), await connect("claims")
    for user in (watcher, claims):
        refused = ["$SYS.REQ.SERVER.PING.CONNZ", "$SYS.REQ.ACCOUNT.PING", "$SYS.DEBUG.SUBSCRIBERS"]
        refused += ["$SYS.REQ.CLAIMS.DELETE", "$SYS.REQ.CLAIMS.LIST", "$SYS.REQ.SERVER.RELOAD", "x"]
        refused += ["$SYS.REQ.CLAIMS.UPDATE"] if user is watcher else ["$SYS.REQ.SERVER.PING.JSZ"]
        for subject in refused:
            assert await user.publish_refused(subject), subject
        for subject in (">", "$SYS.>", "$SYS.SERVER.>", "_INBOX.>", "$SYS.REQ.>"):
            assert await user.subscribe_refused(subject), subject
    assert await claims.subscribe_refused("$SYS.ACCOUNT.*.DISCONNECT")
    varz = await watcher.nc.request("$SYS.REQ.SERVER.PING.VARZ", b"", timeout=PATIENCE_SECONDS)
    assert json.loads(varz.data)["data"]["version"] == "2.15.1"
    jsz = await watcher.nc.request("$SYS.REQ.SERVER.PING.JSZ", b"", timeout=PATIENCE_SECONDS)
    assert json.loads(jsz.data)["data"]["config"]["sync_always"] is True


async def test_the_watcher_learns_which_host_came_and_went(
    server: Server, realm: Realm, connect: Connect, tmp_path: Path
) -> None:
    watcher = await connect("sys")
    came = await watcher.nc.subscribe("$SYS.ACCOUNT.*.CONNECT")
    went = await watcher.nc.subscribe("$SYS.ACCOUNT.*.DISCONNECT")
    await settle(watcher.nc)
    host_id, creds, key = enrol(realm, tmp_path)
    liar = await open_user(server, creds, host_id, called="another host")
    await liar.nc.close()
    for subscription in (came, went):
        message = await subscription.next_msg(PATIENCE_SECONDS)
        assert message.subject.split(".")[2] == realm.accounts["VOLERY"]
        presence = read_presence(message.data)
        assert (presence.name, presence.public_key) == (host_id, key.public)
    assert presence.reason == "Client Closed"


# --- who is let in ----------------------------------------------------------------------------------


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
        await nats.connect(server.url, allow_reconnect=False, error_cb=_ignore)


async def test_a_token_that_expires_ends_the_connection(
    realm: Realm, connect: Connect, tmp_path: Path
) -> None:
    host_id, path, key = enrol(realm, tmp_path)
    path.write_text(format_creds(mint_agent(realm, host_id, key.public, 2), key.seed))
    agent = await connect(host_id, path)
    await asyncio.wait_for(agent.closed.wait(), PATIENCE_SECONDS)


# --- revocation -------------------------------------------------------------------------------------


async def test_a_revoked_agent_is_cut_at_once_and_nobody_else_notices(
    server: Server, realm: Realm, connect: Connect, tmp_path: Path
) -> None:
    (a, a_creds, a_key), (b, b_creds, _) = enrol(realm, tmp_path), enrol(realm, tmp_path)
    bad, good = await connect(a, a_creds), await connect(b, b_creds)
    inventory, claims = await connect("inventory"), await connect("claims")

    async def answer(message: Msg) -> None:
        await message.respond(b"here")

    await good.nc.subscribe(f"host.{b}.order", cb=answer)
    await settle(good.nc)
    began = time.monotonic()
    await revoke(realm, claims.nc, [a_key.public])
    await asyncio.wait_for(bad.closed.wait(), PATIENCE_SECONDS)
    assert time.monotonic() - began < 1.0
    assert (await inventory.nc.request(f"host.{b}.order", b"", timeout=5)).data == b"here"
    assert await is_turned_away(server, a_creds, a)
    for user in (good, inventory, claims):
        assert (user.disconnects, user.errors) == (0, [])
    assert a_key.public in realm.revoked("VOLERY")
    with pytest.raises(Refused, match="revoked"):
        mint_agent(realm, a, a_key.public)
    new_host, new_creds, _ = enrol(realm, tmp_path, a)
    assert not await is_turned_away(server, new_creds, new_host)


async def test_a_service_or_nonsense_can_not_be_revoked(realm: Realm, connect: Connect) -> None:
    claims = await connect("claims")
    with pytest.raises(Refused, match="belongs to a service"):
        await revoke(realm, claims.nc, [realm.users["inventory"]])
    with pytest.raises(Refused, match="not a user's public key"):
        await revoke(realm, claims.nc, ["*"])


async def test_repeating_a_revocation_signs_nothing_anew(
    realm: Realm, connect: Connect, tmp_path: Path
) -> None:
    _, _, key = enrol(realm, tmp_path)
    claims = await connect("claims")
    await revoke(realm, claims.nc, [key.public])
    signed = realm.account_jwt("VOLERY")
    await revoke(realm, claims.nc, [key.public])
    await push_accounts(realm, claims.nc)
    assert realm.account_jwt("VOLERY") == signed


async def test_quick_revocations_and_another_replicas_all_hold(
    own: Server, connect: Connect, tmp_path: Path
) -> None:
    """Claims count whole seconds, and a second replica has its own copy of the files."""
    own.start()
    shutil.copytree(own.realm.directory, tmp_path / "replica")
    replica = Realm.load(tmp_path / "replica")
    claims = await connect("claims", at=own)
    agents = [enrol(own.realm, tmp_path) for _ in range(6)]
    for number, (_, _, key) in enumerate(agents):
        await revoke(replica if number % 2 else own.realm, claims.nc, [key.public])
    for host_id, creds, _ in agents:
        assert await is_turned_away(own, creds, host_id)
    assert own.realm.revoked("VOLERY") | replica.revoked("VOLERY") == {k.public for _, _, k in agents}
    claims_served = read_jwt(replica.account_jwt("VOLERY"), own.realm.operator)
    assert len(claims_served["nats"]["revocations"]) == 6


async def test_a_revocation_outlives_the_server_and_its_store(
    own: Server, connect: Connect, tmp_path: Path
) -> None:
    own.start()
    (a, a_creds, a_key), (b, b_creds, _) = (enrol(own.realm, tmp_path) for _ in range(2))
    good = await connect(b, b_creds, at=own)
    claims = await connect("claims", at=own)
    await revoke(own.realm, claims.nc, [a_key.public])

    own.stop()
    own.start()  # with the preload from before the revocation, on the store from after it
    assert await is_turned_away(own, a_creds, a)
    await asyncio.wait_for(good.reconnected.wait(), PATIENCE_SECONDS)
    good.reconnected.clear()

    own.stop()
    shutil.rmtree(own.directory / "resolver")
    own.write_config()
    own.start()  # with an empty store, on a preload rendered anew
    assert await is_turned_away(own, a_creds, a)
    await asyncio.wait_for(good.reconnected.wait(), PATIENCE_SECONDS)
    assert not await good.publish_refused(f"beat.host.{b}")


async def test_a_server_that_went_back_in_time_is_healed(
    own: Server, connect: Connect, tmp_path: Path
) -> None:
    own.start()
    a, a_creds, a_key = enrol(own.realm, tmp_path)
    claims = await connect("claims", at=own)
    await revoke(own.realm, claims.nc, [a_key.public])
    own.stop()
    shutil.rmtree(own.directory / "resolver")
    own.start()  # with an empty store and the old preload: it doesn't know of the revocation
    assert not await is_turned_away(own, a_creds, a)
    await asyncio.wait_for(claims.reconnected.wait(), PATIENCE_SECONDS)
    await push_accounts(own.realm, claims.nc)
    assert await is_turned_away(own, a_creds, a)


async def test_a_revocation_that_no_server_confirms_is_kept_and_told(own: Server, tmp_path: Path) -> None:
    own.start()
    host_id, creds, key = enrol(own.realm, tmp_path)
    claims = await open_user(own, own.realm.creds_path("claims"), "claims")
    own.stop()
    with pytest.raises(Refused, match=r"no NATS server took.*repeat"):
        await revoke(own.realm, claims.nc, [key.public], timeout_seconds=0.3)
    own.start()
    await asyncio.wait_for(claims.reconnected.wait(), PATIENCE_SECONDS)
    await revoke(own.realm, claims.nc, [key.public])
    await claims.nc.close()
    assert await is_turned_away(own, creds, host_id)


async def test_new_permissions_reach_connected_users_and_only_those_concerned(
    own: Server, connect: Connect, tmp_path: Path
) -> None:
    """What an upgrade does: the table changed, the accounts are signed anew, credentials stay."""
    operator = Key((own.realm.directory / "keys" / "operator.seed").read_text())
    path = own.realm.directory / "accounts" / "VOLERY.jwt"
    old = read_jwt(path.read_text(), own.realm.operator)
    (agents,) = [scope for scope in old["nats"]["signing_keys"] if scope["role"] == "agent"]
    agents["template"]["pub"] = {"deny": [">"]}
    volery = own.realm.accounts["VOLERY"]
    path.write_text(sign_jwt(operator, volery, "VOLERY", old["nats"], old["iat"] - 100))
    own.write_config()
    own.start()
    host_id, creds, _ = enrol(own.realm, tmp_path)
    agent, inventory = await connect(host_id, creds, own), await connect("inventory", at=own)
    assert await agent.publish_refused(f"beat.host.{host_id}")
    upgraded = Realm.create(own.realm.directory)
    await push_accounts(upgraded, (await connect("claims", at=own)).nc)
    await asyncio.wait_for(agent.reconnected.wait(), PATIENCE_SECONDS)
    assert not await agent.publish_refused(f"beat.host.{host_id}")
    assert not await inventory.publish_refused("inventory.vm.get")
    assert inventory.disconnects == 0


async def test_a_cluster_cuts_an_agent_on_every_node_also_on_one_that_was_away(
    tmp_path: Path,
) -> None:
    realm = Realm.create(tmp_path / "bus")
    nodes: list[Server] = []
    async with AsyncExitStack() as stack:
        for number in range(3):
            node = Server(tmp_path / f"node{number}", realm)
            stack.callback(node.stop)
            routes = f'routes: ["{nodes[0].cluster_url}"]' if nodes else ""
            node.write_config(
                f'cluster: {{ name: "volery", listen: "127.0.0.1:-1", {routes} }}', jetstream=False
            )
            node.start()
            nodes.append(node)
        claims = await open_user(nodes[0], realm.creds_path("claims"), "claims")
        stack.push_async_callback(claims.nc.close)
        (a, a_creds, a_key), (b, b_creds, _) = (enrol(realm, tmp_path) for _ in range(2))
        bad, good = await open_user(nodes[1], a_creds, a), await open_user(nodes[1], b_creds, b)
        stack.push_async_callback(good.nc.close)
        nodes[2].stop()

        began = time.monotonic()
        await revoke(realm, claims.nc, [a_key.public])
        await asyncio.wait_for(bad.closed.wait(), PATIENCE_SECONDS)
        assert time.monotonic() - began < 1.0
        assert good.disconnects == 0
        for node in nodes[:2]:
            assert await is_turned_away(node, a_creds, a)

        nodes[2].start()  # on the store and the preload from before: it learns from its neighbours
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not await is_turned_away(nodes[2], a_creds, a):
            assert time.monotonic() < deadline
            await asyncio.sleep(0.1)  # nothing is announced to clients when servers have compared


# --- outside readers --------------------------------------------------------------------------------


async def test_a_reader_follows_its_own_consumer_and_nothing_else(
    server: Server, realm: Realm, connect: Connect, tmp_path: Path
) -> None:
    minted = mint_reader(realm, "billing")
    path = tmp_path / "billing.creds"
    path.write_text(minted.creds)
    async with streams(OWNERS, connect) as owners:
        inventory = owners["inventory"].nc.jetstream()
        for number in range(5):
            await inventory.publish("fact.inventory.vm.changed", str(number).encode())
        await owners["storage"].nc.jetstream().publish("fact.storage.disk.changed", b"{}")
        gateway = (await connect("gateway")).nc.jetstream()
        for system in ("billing", "rival"):
            assert await create_reader_consumers(gateway, system, OWNERS_STREAMS)
        info = await gateway.consumer_info("FACTS_INVENTORY", minted.name)
        assert info.config.inactive_threshold == 7 * 86_400

        reader = await connect(minted.name, path)
        js = reader.nc.jetstream(domain=READERS_DOMAIN)
        pull = await js.pull_subscribe_bind(minted.name, stream="FACTS_INVENTORY")
        facts = await pull.fetch(5, timeout=PATIENCE_SECONDS)
        assert [fact.data for fact in facts] == [b"0", b"1", b"2", b"3", b"4"]
        for fact in facts:
            await fact.ack_sync(timeout=PATIENCE_SECONDS)
        info = await js.consumer_info("FACTS_INVENTORY", minted.name)
        assert (info.ack_floor.stream_seq, info.num_ack_pending) == (5, 0)
        other = await js.pull_subscribe_bind(minted.name, stream="FACTS_STORAGE")
        (fact,) = await other.fetch(1, timeout=PATIENCE_SECONDS)
        await fact.ack()
        assert not reader.errors

        for subject in (
            "$JS.volery.API.CONSUMER.MSG.NEXT.FACTS_INVENTORY.reader-rival",
            "$JS.volery.API.CONSUMER.INFO.FACTS_INVENTORY.reader-rival",
            "$JS.volery.API.CONSUMER.MSG.NEXT.FACTS_INVENTORY.inventory",
            f"$JS.API.CONSUMER.MSG.NEXT.FACTS_INVENTORY.{minted.name}",
            f"$JS.API.CONSUMER.INFO.FACTS_INVENTORY.{minted.name}", "$JS.volery.API.INFO",
            "$JS.ACK.FACTS_INVENTORY.reader-rival.1.1.1.1.1",
            f"$JS.volery.API.CONSUMER.MSG.NEXT.FACTS_HOST.{minted.name}",
            "$JS.API.CONSUMER.CREATE.FACTS_INVENTORY", "$JS.API.INFO", "$JS.API.STREAM.NAMES",
            f"$JS.API.CONSUMER.CREATE.FACTS_INVENTORY.{minted.name}",
            f"$JS.API.CONSUMER.DURABLE.CREATE.FACTS_INVENTORY.{minted.name}",
            f"$JS.API.CONSUMER.DELETE.FACTS_INVENTORY.{minted.name}",
            "$JS.API.STREAM.INFO.FACTS_INVENTORY", "$JS.API.STREAM.MSG.GET.FACTS_INVENTORY",
            "$JS.API.STREAM.PURGE.FACTS_INVENTORY", "$JS.API.STREAM.DELETE.FACTS_INVENTORY",
            "fact.inventory.vm.changed", "inventory.vm.start", "host.x.order", "beat.host.x",
            "_INBOX.inventory.x", "_INBOX.reader-rival.x", "$SYS.REQ.SERVER.PING", "$SRV.PING", "x",
        ):  # fmt: skip
            assert await reader.publish_refused(subject), subject
        for subject in (
            ">", "fact.>", "fact.inventory.>", "inventory.>", "host.>", "beat.>", "_INBOX.>",
            "_INBOX.reader-rival.>", "$SYS.>", "$JS.>", "$JS.API.CONSUMER.MSG.NEXT.>",
        ):  # fmt: skip
            assert await reader.subscribe_refused(subject), subject

        # Its place is kept, and making it again doesn't move it.
        await create_reader_consumers(gateway, "billing", ["FACTS_INVENTORY"])
        await inventory.publish("fact.inventory.vm.changed", b"5")
        (fact,) = await pull.fetch(1, timeout=PATIENCE_SECONDS)
        assert fact.data == b"5"

        claims = await connect("claims")
        await revoke(realm, claims.nc, [minted.public_key], role="reader")
        await asyncio.wait_for(reader.closed.wait(), PATIENCE_SECONDS)
        assert await is_turned_away(server, path, minted.name)
        await delete_reader_consumers(gateway, "billing", OWNERS_STREAMS)
        await delete_reader_consumers(gateway, "billing", OWNERS_STREAMS)


async def test_a_reader_sees_the_chosen_streams_from_the_chosen_place(
    realm: Realm, connect: Connect, tmp_path: Path
) -> None:
    minted = mint_reader(realm, "audit")
    path = tmp_path / "audit.creds"
    path.write_text(minted.creds)
    async with streams(("inventory", "ha"), connect) as owners:
        for subject in ("vm.changed", "host.changed", "vm.changed", "host.changed"):
            await owners["inventory"].nc.jetstream().publish(f"fact.inventory.{subject}", b"{}")
        await create_reader_consumers(
            owners["ha"].nc.jetstream(), "audit", ["FACTS_INVENTORY"],
            after={"FACTS_INVENTORY": 2}, subjects=("fact.inventory.vm.>",),
        )  # fmt: skip
        reader = await connect(minted.name, path)
        pull = await reader.nc.jetstream(domain=READERS_DOMAIN).pull_subscribe_bind(
            minted.name, stream="FACTS_INVENTORY"
        )
        (fact,) = await pull.fetch(1, timeout=PATIENCE_SECONDS)
        assert (fact.metadata.sequence.stream, fact.metadata.num_pending) == (3, 0)
        subject = f"$JS.volery.API.CONSUMER.INFO.FACTS_HA.{minted.name}"
        answer = await _answer(reader.nc, subject)
        assert answer is None or "not found" in answer["error"]["description"]


async def _answer(nc: Client, subject: str) -> dict[str, Any] | None:
    try:
        return dict(json.loads((await nc.request(subject, b"", timeout=PATIENCE_SECONDS)).data))
    except NoRespondersError:
        return None


@pytest.mark.parametrize("system", ["", "Billing", "a.b", "*", "-a", "a-", "a b", "x" * 64])
def test_a_systems_name_is_checked(system: str, realm: Realm) -> None:
    with pytest.raises(Refused, match="outside system"):
        mint_reader(realm, system)


# --- connections ------------------------------------------------------------------------------------


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
    own.write_config(f'tls: {{ cert_file: "{tmp_path}/server.pem", key_file: "{tmp_path}/server.key" }}')
    own.start()
    url = own.url.replace("nats://", "tls://")
    creds = own.realm.creds_path("ha")
    options = connect_options(creds, "ha", [url], ca=tmp_path / "ca.pem")
    nc = await nats.connect(**options)
    await settle(nc)
    await nc.close()
    options = connect_options(creds, "ha", [url], ca=tmp_path / "stranger.pem")
    with pytest.raises(ssl.SSLCertVerificationError):
        await nats.connect(**options, allow_reconnect=False, error_cb=_ignore)
