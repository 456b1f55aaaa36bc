"""Embedded servers: adopted, restarted, never two on one directory; roles that can't meet."""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
import signal
import socket
import ssl
import subprocess
import sys
import time
from pathlib import Path

import asyncpg
import nats
import nats.errors
import pytest
from nats.aio.client import Client
from nats.aio.transport import TcpTransport

from volery.runtime.config import DatabaseConfig
from volery.runtime.connection import connect_options
from volery.runtime.identity import Realm
from volery.setup import embedded, nats_server, postgres_server, processes
from volery.setup.database import bootstrap_database, scram_verifier, verifies
from volery.setup.embedded import Embedded, NatsOperator, NatsOptions, NatsTls, PostgresOptions
from volery.setup.errors import SetupError
from volery.setup.home import Home
from volery.setup.pki import Authority
from volery.setup.postgres_server import Cluster

QUICK = PostgresOptions(sync_after_creation=False)


def children_with(directory: Path) -> list[int]:
    """Every process whose command line names this directory's configuration."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                command = (entry / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if str(directory).encode() in b" ".join(command[:3]):
                found.append(int(entry.name))
    return found


def test_nats_is_adopted_restarted_after_a_kill_and_keeps_its_port(home: Home) -> None:
    first = embedded.start_nats(home, NatsOptions(preferred_port=None))
    again = embedded.start_nats(home)
    assert again.adopted
    assert again == first
    assert embedded.status(home, "nats") == first.process
    os.kill(first.pid, signal.SIGKILL)
    assert processes.wait_for_exit(first.process, 5)
    assert embedded.status(home, "nats") is None
    third = embedded.start_nats(home)
    assert not third.adopted
    assert third.url == first.url
    assert third.process != first.process
    assert embedded.stop(home, "nats")
    assert not embedded.stop(home, "nats")
    assert not first.process.alive()


async def test_what_jetstream_acknowledged_survives_a_kill(home: Home) -> None:
    server = embedded.start_nats(home, NatsOptions(preferred_port=None))
    client = await nats.connect(server.url)
    stream = client.jetstream()
    await stream.add_stream(name="S", subjects=["s"])
    for number in range(20):
        await stream.publish("s", str(number).encode())
    os.kill(server.pid, signal.SIGKILL)
    processes.wait_for_exit(server.process, 5)
    await client.close()
    client = await nats.connect(embedded.start_nats(home).url)
    assert (await client.jetstream().stream_info("S")).state.messages == 20
    await client.close()


def _start_both(path: Path, answers: multiprocessing.Queue[tuple[int, int]]) -> None:
    place = Home(path)
    answers.put((embedded.start_nats(place).pid, embedded.start_postgres(place, QUICK).pid))


def test_starters_at_once_make_one_server_of_each(home: Home) -> None:
    context = multiprocessing.get_context("spawn")
    answers: multiprocessing.Queue[tuple[int, int]] = context.Queue()
    starters = [context.Process(target=_start_both, args=(home.path, answers)) for _ in range(4)]
    for starter in starters:
        starter.start()
    found = {answers.get(timeout=60) for _ in starters}
    for starter in starters:
        starter.join()
    assert len(found) == 1
    assert children_with(home.nats) == [found.copy().pop()[0]]
    assert len(children_with(home.postgres / "data")) == 1


def test_a_lost_record_does_not_lead_to_a_second_server(home: Home) -> None:
    first = embedded.start_nats(home, NatsOptions(preferred_port=None))
    (home.run / "nats.json").unlink()
    assert embedded.start_nats(home).process == first.process
    (home.run / "nats.json").write_text('{"pid": 1, "start_time": 0, "boot": "x"}')
    assert embedded.start_nats(home).process == first.process


def test_a_pid_that_another_program_got_is_not_taken_for_the_server(home: Home) -> None:
    mine = processes.ProcessId.of(os.getpid())
    assert mine is not None
    stale = processes.ProcessId(mine.pid, mine.start_time - 1, mine.boot)
    assert not stale.alive()
    assert not processes.signal_process(stale, signal.SIGKILL)
    processes.write_record(home.run / "nats.json", stale)
    (home.nats / "server.lock").touch()
    assert embedded.status(home, "nats") is None


def test_a_taken_port_is_named(home: Home) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        home.change_settings({"VOLERY_SETUP_NATS_PORT": str(port)})
        with pytest.raises(SetupError, match=f"TCP port {port}: another program"):
            embedded.start_nats(home)


def test_a_server_that_can_t_start_shows_its_log(home: Home) -> None:
    (home.nats / "jetstream").write_text("a file where a directory belongs")
    with pytest.raises(SetupError, match="nats-server ended while it started"):
        embedded.start_nats(home, NatsOptions(preferred_port=None))


async def test_postgres_is_unprivileged_durable_adopted_and_recovers(home: Home) -> None:
    first = embedded.start_postgres(home, QUICK)
    assert Path(f"/proc/{first.pid}").stat().st_uid != 0
    connection = await asyncpg.connect(first.dsn)
    assert await connection.fetchval("show fsync") == "on"
    assert await connection.fetchval("show synchronous_commit") == "on"
    assert await connection.fetchval("show max_connections") == "200"
    assert await connection.fetchval("show listen_addresses") == ""
    await connection.execute("create table t (n int); insert into t values (7)")
    assert embedded.start_postgres(home, QUICK).adopted
    os.kill(first.pid, signal.SIGKILL)
    assert processes.wait_for_exit(first.process, 5)
    again = embedded.start_postgres(home, QUICK)
    assert again.process != first.process
    assert again.dsn == first.dsn
    connection = await asyncpg.connect(again.dsn)
    assert await connection.fetchval("select n from t") == 7
    await connection.close()


async def test_a_pid_file_that_survived_a_reboot_does_not_stop_postgres(home: Home) -> None:
    server = embedded.start_postgres(home, QUICK)
    pid_file = home.postgres / "data" / "postmaster.pid"
    os.kill(server.pid, signal.SIGKILL)
    processes.wait_for_exit(server.process, 5)
    for path in (pid_file, home.run / "postgres" / ".s.PGSQL.5432.lock"):
        lines = path.read_text().splitlines()
        path.write_text("\n".join([str(os.getpid()), *lines[1:]]) + "\n")
    assert embedded.start_postgres(home, QUICK).process.alive()


def test_a_long_home_gets_a_shortsocket_directory(home: Home) -> None:
    deep = home.path / ("d" * 90)
    place = postgres_server.socket_directory(deep)
    assert len(str(place / ".s.PGSQL.5432")) <= 107
    assert place == postgres_server.socket_directory(deep)
    assert place != postgres_server.socket_directory(home.path / ("e" * 90))


def test_a_home_that_the_database_s_user_can_t_reach_says_so(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    home = Home(tmp_path / "home")
    home.create()
    if os.geteuid() == 0:
        with pytest.raises(SetupError, match="chmod o\\+x"):
            embedded.start_postgres(home, QUICK)
    else:
        assert embedded.start_postgres(home, QUICK).process.alive()
        embedded.stop(home, "postgres")


def test_data_of_a_version_that_is_missing_says_which(home: Home) -> None:
    (home.postgres / "data").mkdir()
    (home.postgres / "data" / "PG_VERSION").write_text("9\n")
    with pytest.raises(SetupError, match="PostgreSQL 9, which isn't installed"):
        embedded.start_postgres(home, QUICK)


@pytest.fixture(scope="module")
def postgres() -> object:
    with embedded.temporary_postgres() as server:
        asyncio.run(
            bootstrap_database(server.dsn, ["inventory", "ha"], {"inventory": "secret-i", "ha": "secret-h"})
        )
        yield server


REFUSED = (
    "select * from inventory.vm",
    "insert into inventory.vm values (1)",
    "create table inventory.mine (n int)",
    "create table public.mine (n int)",
    "create schema mine",
    "create temporary table mine (n int)",
    "drop schema inventory cascade",
    "create role mine",
    "alter role inventory password 'x'",
    "select rolpassword from pg_authid",
    "set role inventory",
    "set session authorization postgres",
    "select pg_read_file('/etc/passwd')",
    "copy (select 1) to program 'true'",
    "create database mine",
)


@pytest.mark.parametrize("statement", REFUSED)
async def test_a_service_s_role_is_refused_outside_its_schema(postgres: Embedded, statement: str) -> None:
    owner = await asyncpg.connect(postgres.service_dsn("inventory", "secret-i"))
    await owner.execute("create table if not exists vm (n int)")
    await owner.close()
    other = await asyncpg.connect(postgres.service_dsn("ha", "secret-h"))
    with pytest.raises(asyncpg.InsufficientPrivilegeError):
        await other.execute(statement)
    await other.close()


async def test_a_role_needs_its_password_and_stays_in_its_database(postgres: Embedded) -> None:
    with pytest.raises(asyncpg.InvalidPasswordError):
        await asyncpg.connect(postgres.service_dsn("ha", "wrong"))
    with pytest.raises(asyncpg.InsufficientPrivilegeError):
        await asyncpg.connect(postgres.service_dsn("ha", "secret-h", database="postgres"))


async def test_bootstrapping_again_changes_a_password_and_keeps_data(postgres: Embedded) -> None:
    names = ["inventory", "ha"]
    owner = await asyncpg.connect(postgres.service_dsn("inventory", "secret-i"))
    await owner.execute("create table kept (n int)")
    await bootstrap_database(postgres.dsn, names, {"inventory": "new", "ha": "secret-h"})
    fresh = await asyncpg.connect(postgres.service_dsn("inventory", "new"))
    assert await fresh.fetchval("select count(*) from kept") == 0
    with pytest.raises(asyncpg.InvalidPasswordError):
        await asyncpg.connect(postgres.service_dsn("inventory", "secret-i"))
    await bootstrap_database(postgres.dsn, names, {"inventory": "secret-i", "ha": "secret-h"})
    await owner.close()
    await fresh.close()


async def test_names_that_could_break_out_of_sql_are_refused(postgres: Embedded) -> None:
    for name in ('a"; drop schema ha; --', "Ha", "1a", "", "a-b"):
        with pytest.raises(SetupError):
            await bootstrap_database(postgres.dsn, [name], {name: "x"})


def test_the_verifier_tells_its_password_from_others() -> None:
    stored = scram_verifier("right")
    assert verifies(stored, "right")
    assert not verifies(stored, "wrong")
    assert not verifies(None, "right")
    assert not verifies("md5abcdef", "right")


def encrypted(client: Client) -> bool:
    assert isinstance(client._transport, TcpTransport)
    writer = client._transport._io_writer
    assert writer is not None
    return writer.get_extra_info("ssl_object") is not None


async def test_a_tls_server_takes_only_clients_that_begin_with_it(home: Home) -> None:
    server = embedded.start_nats(home, tls_options(home))
    trust = ssl.create_default_context(cafile=str(home.ca_certificate))
    for url in (server.url, server.url.replace("tls:", "nats:")):
        client = await nats.connect(url, tls=trust, tls_handshake_first=True)
        assert encrypted(client)
        await client.close()
    with pytest.raises(ssl.SSLCertVerificationError):
        await nats.connect(
            server.url,
            tls=ssl.create_default_context(),
            tls_handshake_first=True,
            allow_reconnect=False,
            error_cb=_quiet,
        )
    with pytest.raises(TimeoutError):  # it waits for a greeting, and there is none
        await nats.connect(server.url, tls=trust, connect_timeout=0.5, allow_reconnect=False, error_cb=_quiet)


async def _quiet(_: Exception) -> None:
    return


async def test_a_server_that_used_to_greet_stops_it_without_a_restart(home: Home) -> None:
    """As an installation of before: its server reads the new configuration, its connections stay."""
    path = home.nats / "nats.conf"
    embedded.start_nats(home, tls_options(home))
    embedded.stop(home, "nats")
    path.write_text(path.read_text().replace("handshake_first: true", "handshake_first: false"))
    process = processes.spawn(nats_server.command(home.nats), lock=home.nats / "server.lock",
                              record=home.run / "nats.json", log=home.log / "nats.log")  # fmt: skip
    trust = ssl.create_default_context(cafile=str(home.ca_certificate))
    port = int(home.settings()["VOLERY_SETUP_NATS_PORT"])
    while not nats_server.ports_file(home.nats, process.pid).exists():
        await asyncio.sleep(0.01)
    old = await nats.connect(f"tls://127.0.0.1:{port}", tls=trust)
    assert await greets(port)
    server = embedded.start_nats(home, tls_options(home))
    assert server.process == process
    deadline = time.monotonic() + 10
    while await greets(port):
        assert time.monotonic() < deadline
    await old.flush()
    assert old.stats["reconnects"] == 0
    await old.close()


async def greets(port: int) -> bool:
    """Whether the server speaks first, in clear text."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        return bool(await asyncio.wait_for(reader.read(1), 0.3))
    except TimeoutError:
        return False
    finally:
        writer.close()


async def test_a_renewed_certificate_is_served_without_a_restart(home: Home) -> None:
    server = embedded.start_nats(home, tls_options(home))
    before = await served_certificate(server)
    (home.pki / "nats.pem").unlink()
    again = embedded.start_nats(home, tls_options(home))
    assert again == server
    deadline = time.monotonic() + 10
    while await served_certificate(server) == before:
        assert time.monotonic() < deadline


async def served_certificate(server: Embedded) -> bytes | None:
    host, _, port = server.url.removeprefix("tls://").rpartition(":")
    trust = ssl._create_unverified_context()
    _, writer = await asyncio.open_connection(host, int(port), ssl=trust)
    certificate = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
    writer.close()
    return certificate


def tls_options(home: Home) -> NatsOptions:
    issued = Authority.open(home.pki).ensure("nats", addresses=["127.0.0.1"])
    tls = NatsTls(issued.certificate, issued.key, home.ca_certificate)
    return NatsOptions(preferred_port=None, tls=tls)


async def test_the_server_takes_the_realm_s_identities_and_syncs_always(home: Home) -> None:
    realm = Realm.create(home.bus_credentials)
    operator = NatsOperator(realm.operator_jwt, realm.system_account, realm.resolver_preload())
    server = embedded.start_nats(home, NatsOptions(preferred_port=None, operator=operator))
    sys = await nats.connect(**connect_options(realm.creds_path("sys"), "sys", [server.url]))
    answer = await sys.request("$SYS.REQ.SERVER.PING.JSZ", b"{}", timeout=5)
    assert json.loads(answer.data)["data"]["config"]["sync_always"] is True
    await sys.close()
    with pytest.raises(nats.errors.Error):
        await nats.connect(server.url, allow_reconnect=False, error_cb=_quiet)


def test_throw_away_servers_are_quick_and_leave_nothing() -> None:
    started = time.monotonic()
    with embedded.temporary_nats() as bus, embedded.temporary_postgres() as database:
        took = time.monotonic() - started
        places = [bus.log.parent.parent, database.log.parent.parent]
        assert all(place.exists() for place in places)
    assert not any(place.exists() for place in places)
    assert not bus.process.alive()
    assert not database.process.alive()
    assert took < 10


def test_throw_away_servers_are_in_memory_only_where_it_has_room(tmp_path: Path) -> None:
    assert embedded.throw_away_place(tmp_path, least_bytes=1) == tmp_path
    assert embedded.throw_away_place(tmp_path, least_bytes=2**62) == Path("/tmp")
    assert embedded.throw_away_place(tmp_path / "none") == Path("/tmp")


ABANDON = """
import os, signal
from volery.setup.embedded import temporary_nats, temporary_postgres
with temporary_nats() as bus, temporary_postgres() as database:
    print(bus.pid, database.pid, bus.log.parent.parent, database.log.parent.parent, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_throw_away_servers_end_with_a_killed_test() -> None:
    killed = subprocess.run([sys.executable, "-c", ABANDON], capture_output=True, text=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    bus, database, *places = killed.stdout.split()
    for pid in (bus, database):
        process = processes.ProcessId.of(int(pid))
        assert process is None or processes.wait_for_exit(process, 10)
    deadline = time.monotonic() + 10
    while any(Path(place).exists() for place in places):
        assert time.monotonic() < deadline
        time.sleep(0.02)


async def test_postgres_leaves_huge_pages_to_vms(database: DatabaseConfig) -> None:
    """By itself it takes them where a machine has some free at the moment at which it starts."""
    connection = await asyncpg.connect(database.dsn, user="scheduler", password="secret")
    try:
        assert await connection.fetchval("show huge_pages") == "off"
    finally:
        await connection.close()


def test_cluster_paths_with_quotes_are_escaped() -> None:
    cluster = Cluster(Path("/p"), Path("/d"), Path("/it's"), None, None, "me")
    text = postgres_server._render(cluster, QUICK)["postgresql.conf"]
    assert "unix_socket_directories = '/it''s'" in text
