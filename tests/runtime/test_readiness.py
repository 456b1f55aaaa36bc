"""Programs begin only on a bus that keeps what it acknowledges: rules, then real servers and real clusters."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.nats_realm import Server
from tests.support.ports import free_ports
from volery.runtime import readiness
from volery.runtime.bus import connect
from volery.runtime.config import BusConfig, DatabaseConfig, TelemetryConfig
from volery.runtime.identity import Realm
from volery.runtime.programs import Settings, run_programs
from volery.runtime.readiness import ServerState, problems, read_state

ALONE = ServerState("n", "2.15.1", jetstream=True, sync_always=True, cluster_size=0)
OF_THREE = ServerState("n1", "2.15.1", jetstream=True, sync_always=True, cluster_size=3)


def changed(state: ServerState, **fields: object) -> ServerState:
    return ServerState(**{**{name: getattr(state, name) for name in state.__slots__}, **fields})


@pytest.mark.parametrize(
    ("states", "replicas", "said"),
    [
        ([ALONE], 1, []),
        ([changed(ALONE, version="2.16.0-preview.1")], 1, []),
        ([OF_THREE, OF_THREE, OF_THREE], 3, []),
        ([OF_THREE, OF_THREE], 3, []),
        ([], 1, ["no NATS server said"]),
        ([changed(ALONE, sync_always=False)], 1, ["sync_interval: always"]),
        ([changed(ALONE, version="2.15.0")], 1, ["upgrade it to 2.15.1"]),
        ([changed(ALONE, version="2.9.25")], 1, ["upgrade it to 2.15.1"]),
        ([changed(ALONE, version="?")], 1, ["upgrade it to 2.15.1"]),
        ([changed(ALONE, jetstream=False)], 1, ["without JetStream", "0 of 0"]),
        ([ALONE], 3, ["is alone"]),
        ([OF_THREE, OF_THREE, OF_THREE], 1, ["VOLERY_BUS_REPLICAS=3"]),
        ([OF_THREE, OF_THREE, changed(OF_THREE, sync_always=False)], 3, ["sync_interval: always"]),
        ([OF_THREE], 3, ["1 of 3"]),
    ],
)
def test_what_is_refused(states: list[ServerState], replicas: int, said: list[str]) -> None:
    found = problems(states, replicas)
    assert len(found) == len(said), found
    assert all(words in problem for words, problem in zip(said, found, strict=True)), found


@pytest.mark.parametrize("answer", [b"", b"{}", b"[]", b'{"server": {"name": "n"}}', b'{"server": null}'])
def test_nonsense_is_no_state(answer: bytes) -> None:
    with pytest.raises(ValueError):
        read_state(answer)


def test_a_server_without_jetstream_is_seen_as_one() -> None:
    answer = json.dumps({"server": {"name": "n", "ver": "2.15.1"}, "data": {"disabled": True, "config": {}}})
    assert read_state(answer.encode()) == changed(ALONE, jetstream=False, sync_always=False)


@contextmanager
def servers(directory: Path, sync_always: list[bool]) -> Iterator[tuple[list[Server], BusConfig]]:
    """Real servers of one realm, a cluster if they are several, each with or without `sync_interval: always`."""
    realm = Realm.create(directory / "bus")
    started: list[Server] = []
    # A JetStream cluster must know its routes beforehand, so the servers can't choose their own ports.
    ports = free_ports(len(sync_always))
    routes = ", ".join(f'"nats-route://127.0.0.1:{port}"' for port in ports)
    try:
        for number, (synced, port) in enumerate(zip(sync_always, ports, strict=True), 1):
            server = Server(directory / f"n{number}", realm)
            cluster = f"cluster {{ name: c, listen: 127.0.0.1:{port}, routes: [{routes}] }}"
            server.write_config(cluster if len(sync_always) > 1 else "")
            config = server.directory / "nats.conf"
            if not synced:
                config.write_text(config.read_text().replace(", sync_interval: always", ""))
            server.start()
            started.append(server)
        urls = ",".join(server.url for server in started)
        replicas = 3 if len(sync_always) > 1 else 1
        yield started, BusConfig(servers=urls, credentials_dir=str(directory / "bus"), replicas=replicas)
    finally:
        for server in started:
            server.stop()


async def looked(config: BusConfig, wanted: str, seconds: float = 15.0) -> list[str]:
    """The problems, once one of them says `wanted`, or once there are none for an empty one."""
    system = await connect(config, "sys")
    found: list[str] = ["not asked"]
    try:
        async with asyncio.timeout(seconds):
            while not (any(wanted in problem for problem in found) if wanted else not found):
                found = await readiness.look(system, config.replicas)
    except TimeoutError:
        pytest.fail(f"expected {wanted or 'no problem'}, found {found}")
    finally:
        await system.close()
    return found


async def test_a_server_that_syncs_always_is_taken_at_once(tmp_path: Path) -> None:
    with servers(tmp_path, [True]) as (_, config):
        async with asyncio.timeout(5):
            await readiness.until_synced(config, asyncio.Event())


async def test_a_server_that_doesnt_is_refused_until_it_does(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with servers(tmp_path, [False]) as ((server,), config):
        waiting = asyncio.create_task(readiness.until_synced(config, asyncio.Event()))
        await asyncio.wait((waiting,), timeout=1.0)
        assert not waiting.done()
        assert "sync_interval: always" in caplog.text
        server.stop()
        server.write_config()
        server.start()
        async with asyncio.timeout(15):
            await waiting


class Beginner:
    """A program that says when it was let go."""

    name = "beginner"

    def __init__(self) -> None:
        self.began = asyncio.Event()

    async def main(self, settings: Settings, stop: asyncio.Event) -> None:
        self.began.set()
        await stop.wait()


async def test_no_program_begins_before(tmp_path: Path) -> None:
    with servers(tmp_path, [False]) as ((server,), config):
        program, stop = Beginner(), asyncio.Event()
        settings = Settings(config, DatabaseConfig(), TelemetryConfig())
        running = asyncio.create_task(run_programs([program], settings, stop))
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(program.began.wait(), 1.0)
        server.stop()
        server.write_config()
        server.start()
        await asyncio.wait_for(program.began.wait(), 15)
        stop.set()
        await running


async def test_a_program_that_waits_for_the_bus_can_be_stopped(tmp_path: Path) -> None:
    with servers(tmp_path, [False]) as (_, config):
        stop = asyncio.Event()
        waiting = asyncio.create_task(readiness.until_synced(config, stop))
        stop.set()
        async with asyncio.timeout(5):
            await waiting


async def test_who_has_no_system_credentials_or_doesnt_insist_goes_on(tmp_path: Path) -> None:
    with servers(tmp_path, [False]) as (_, config):
        unconcerned = BusConfig(
            servers=config.servers, credentials_dir=config.credentials_dir, require_sync_always=False
        )
        (tmp_path / "alone").mkdir()
        others = BusConfig(servers=config.servers, credentials_dir=str(tmp_path / "alone"))
        async with asyncio.timeout(2):
            await readiness.until_synced(unconcerned, asyncio.Event())
            await readiness.until_synced(others, asyncio.Event())


async def test_a_cluster_with_a_member_away(tmp_path: Path) -> None:
    with servers(tmp_path, [True, True, True]) as (started, config):
        await looked(config, "")
        once = BusConfig(servers=config.servers, credentials_dir=config.credentials_dir, replicas=1)
        await looked(once, "VOLERY_BUS_REPLICAS=3")
        started[2].stop()
        await looked(config, "")
        started[1].stop()
        await looked(config, "1 of 3")


async def test_one_member_that_doesnt_sync_spoils_the_cluster(tmp_path: Path) -> None:
    with servers(tmp_path, [True, False, True]) as (_, config):
        (problem,) = await looked(config, "sync_interval: always")
        assert "NATS server n2 " in problem
