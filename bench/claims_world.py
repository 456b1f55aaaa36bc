"""A scheduler by itself at full size: its own process, PostgreSQL and NATS on disk, and tables as a large fleet fills them."""

from __future__ import annotations

import asyncio
import json
import os
import random
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import asyncpg

from bench.memory import family
from bench.processor import used
from services.scheduler.config import SchedulerConfig
from services.scheduler.model import CONFIRMED, ClusterPolicy, limits, memory_taken
from volery.contracts.affinity_group import AffinityGroup, AffinityRule
from volery.contracts.base import Owner, encode
from volery.contracts.ids import new_id
from volery.contracts.operation import ListQuery
from volery.contracts.scheduling import LIST_CAPACITY, Claim
from volery.runtime.bus import open_bus
from volery.runtime.config import BusConfig, DatabaseConfig
from volery.runtime.database import migrate
from volery.setup import embedded
from volery.setup.database import bootstrap_database
from volery.setup.embedded import NatsOptions, temporary_home
from volery.setup.home import Home
from volery.setup.programs import REPOSITORY

GIB = 1024**3
CLUSTER, NETWORKS = "c-bench", ("lan", "backup")
CONFIG = SchedulerConfig()
POLICY = ClusterPolicy(CLUSTER, "Default", cpu_model="Westmere", machine="q35")
MODELS = (["Nehalem", "Westmere"], ["Nehalem", "Westmere", "Skylake-Server"])
GROUP_SIZE = 5
SECRET = "bench"
LONG_AGO = timedelta(hours=1)

if TYPE_CHECKING:
    Connection: TypeAlias = "asyncpg.Connection[asyncpg.Record]"
    Filled: TypeAlias = Callable[[Connection], Awaitable[list[str]]]


@dataclass
class Alone:
    """The scheduler's process and its servers."""

    home: Home
    process: subprocess.Popen[bytes]
    bus: BusConfig
    database: str
    """As the superuser."""
    host_ids: list[str]
    services: DatabaseConfig
    """As a service."""

    def processor_seconds(self) -> dict[str, float]:
        """Part → seconds of a processor until now, user and system."""
        roots = {"scheduler": self.process.pid}
        for name in ("postgres", "nats"):
            server = embedded.status(self.home, name)
            assert server is not None, f"{name} does not run"
            roots[name] = server.pid
        found = {part: sum(used(pid) for pid in family(root)) for part, root in roots.items()}
        return found | {"load": used(os.getpid())}


@dataclass(frozen=True)
class Size:
    hosts: int
    vms: int
    grouped: list[str]
    """VMs that the load will place and that affinity groups have, so many to a group; half of the groups enforce."""


@asynccontextmanager
async def scheduler_alone(
    size: Size,
    profile: Path | None = None,
    *,
    filled: Filled | None = None,
    settings: Mapping[str, str] = {},
    beside: Sequence[str] = (),
) -> AsyncIterator[Alone]:
    """Servers without TLS and identities, everything synced; the real service in a process of its own. `filled` fills the
    tables instead of `_fill_tables` and returns the hosts' ids; `beside`: other services that run, too."""
    with ExitStack() as stack:
        home = stack.enter_context(temporary_home("volery-bench-"))
        home.path.chmod(0o755)  # PostgreSQL's own user passes through
        postgres = embedded.start_postgres(home)
        stack.callback(embedded.stop, home, "postgres")
        nats = embedded.start_nats(home, NatsOptions(preferred_port=None))
        stack.callback(embedded.stop, home, "nats")
        database = await _database(home, postgres)
        host_ids = await _fill(postgres.dsn, size, filled)
        bus = BusConfig(servers=nats.url, require_sync_always=False)
        process = stack.enter_context(_process("scheduler", bus, database, profile, settings))
        for name in beside:
            await migrate(database, name)
            stack.enter_context(_process(name, bus, database, None, {}))
        async with open_bus(bus, "gateway") as asking:
            async with asyncio.timeout(120):
                await asking.ask_raw(LIST_CAPACITY.subject, encode(ListQuery(limit=1)), None, 110.0)
        yield Alone(home, process, bus, postgres.dsn, host_ids, database)


async def _database(home: Home, postgres: embedded.Embedded) -> DatabaseConfig:
    owners = [str(owner) for owner in Owner]
    await bootstrap_database(postgres.dsn, owners, dict.fromkeys(owners, SECRET), connection_limit=60)
    passwords = home.path / "passwords"
    passwords.mkdir()
    for owner in owners:
        (passwords / f"{owner}.password").write_text(SECRET)
    dsn = f"postgresql:///volery?host={postgres.socket_directory}"
    config = DatabaseConfig(dsn=dsn, passwords_dir=str(passwords))
    await migrate(config, "scheduler")
    return config


@contextmanager
def _process(
    service: str, bus: BusConfig, database: DatabaseConfig, profile: Path | None, settings: Mapping[str, str]
) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-m", f"services.{service}"]
    if profile is not None:
        command = [sys.executable, "-m", "bench.profiled", str(profile)]
    environ = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": str(REPOSITORY),
        "VOLERY_BUS_SERVERS": bus.servers,
        "VOLERY_BUS_REQUIRE_SYNC_ALWAYS": "false",
        "VOLERY_DATABASE_DSN": database.dsn,
        "VOLERY_DATABASE_PASSWORDS_DIR": database.passwords_dir,
        "VOLERY_TELEMETRY_LOG_LEVEL": "WARNING",
        **settings,
    }
    process = subprocess.Popen(command, env=environ)
    try:
        yield process
    finally:
        process.terminate()
        process.wait(40)


async def _fill(dsn: str, size: Size, filled: Filled | None) -> list[str]:
    """Hosts, and VMs that run on them with their claims, as facts and placements would have left them."""
    dice = random.Random(4)
    connection = await asyncpg.connect(dsn, database="volery", server_settings={"search_path": "scheduler"})
    try:
        return await (_fill_tables(connection, size, dice) if filled is None else filled(connection))
    finally:
        await connection.close()


def _hosts(size: Size, dice: random.Random) -> Iterator[tuple[Any, ...]]:
    for number in range(size.hosts):
        memory, cpus = dice.choice((256, 512, 1024)) * GIB, dice.choice((32, 64, 128))
        allowed = limits(memory, cpus, POLICY, CONFIG)
        yield (
            new_id(), 1, f"host{number:05}", CLUSTER, "maintenance" if number % 50 == 0 else "up", cpus, memory,
            dice.choice(MODELS), ["q35", "pc"], allowed.memory_bytes, allowed.vcpus,
        )  # fmt: skip


HOST_COLUMNS = (
    "id", "revision", "name", "cluster_id", "status", "cpus", "memory_bytes", "cpu_models", "machines",
    "memory_limit_bytes", "vcpus_limit",
)  # fmt: skip
CLAIM_COLUMNS = (
    "id", "revision", "doc", "private", "vm_id", "epoch", "host_id", "state", "memory_bytes", "vcpus", "created_at",
    "updated_at",
)  # fmt: skip
VM_COLUMNS = (
    "id", "revision", "name", "epoch", "status", "host_id", "memory_bytes", "vcpus", "deleted", "heard_at",
)  # fmt: skip


async def _fill_tables(connection: Connection, size: Size, dice: random.Random) -> list[str]:
    await connection.execute(
        """insert into cluster (id, revision, name, cpu_model, machine, memory_overcommit_percent,
               cpu_overcommit_ratio, balance) values ($1, 1, 'Default', 'Westmere', 'q35', 100, 10, 'evenly_distributed')""",
        CLUSTER,
    )
    hosts = list(_hosts(size, dice))
    ids = [host[0] for host in hosts]
    await connection.copy_records_to_table("host_capacity", records=hosts, columns=HOST_COLUMNS)
    for name in NETWORKS:
        reach = [host_id for host_id in ids if dice.random() < 0.9]
        await connection.execute("insert into network values ($1, 1, $1, $2)", name, reach)
    claims, vms = _running(size, ids, dice)
    await connection.copy_records_to_table("vm", records=vms, columns=VM_COLUMNS)
    await connection.copy_records_to_table("claim", records=claims, columns=CLAIM_COLUMNS)
    await connection.execute(
        """update host_capacity h set memory_used_bytes = c.memory, vcpus_used = c.vcpus, guests = c.guests
           from (select host_id, sum(memory_bytes) as memory, sum(vcpus) as vcpus, count(*) as guests
                 from claim group by host_id) c where c.host_id = h.id"""
    )
    await _groups(connection, size)
    await connection.execute("analyze")
    return ids


def _running(size: Size, host_ids: list[str], dice: random.Random) -> tuple[list[Any], list[Any]]:
    then = datetime.now(UTC) - LONG_AGO
    claims, vms = [], []
    for number in range(size.vms):
        host_id, vm_id = host_ids[number % size.hosts], new_id()
        memory, vcpus = dice.choice((1, 2, 4, 8)) * GIB, dice.choice((1, 2, 4))
        claim = Claim(
            id=new_id(), revision=2, created_at=then, updated_at=then, vm_id=vm_id, epoch=1, host_id=host_id,
            memory_bytes=memory_taken(memory, CONFIG), vcpus=vcpus, state=CONFIRMED,
        )  # fmt: skip
        claims.append(
            (claim.id, 2, encode(claim).decode(), "{}", vm_id, 1, host_id, CONFIRMED, claim.memory_bytes, vcpus, then, then)
        )  # fmt: skip
        vms.append((vm_id, 3, f"vm{number}", 1, "up", host_id, memory, vcpus, False, then))
    return claims, vms


async def _groups(connection: Connection, size: Size) -> None:
    now = datetime.now(UTC)
    records = []
    for number, start in enumerate(range(0, len(size.grouped), GROUP_SIZE)):
        group = AffinityGroup(
            id=new_id(), revision=1, created_at=now, updated_at=now, name=f"group{number}", cluster_id=CLUSTER,
            vm_rule=AffinityRule.POSITIVE if number % 4 < 2 else AffinityRule.NEGATIVE, vm_enforcing=number % 2 == 0,
            vm_ids=tuple(size.grouped[start : start + GROUP_SIZE]),
        )  # fmt: skip
        doc = encode(group).decode()
        records.append(
            (
                group.id,
                1,
                doc,
                "{}",
                group.name,
                CLUSTER,
                json.dumps(group.vm_ids),
                json.dumps(group.host_ids),
            )
        )
    columns = ("id", "revision", "doc", "private", "name", "cluster_id", "vm_ids", "host_ids")
    await connection.copy_records_to_table("affinity_group", records=records, columns=columns)


OVERCOMMITTED = """
    select h.name from host_capacity h
    join (select doc::json ->> 'host_id' as host_id, sum((doc::json ->> 'memory_bytes')::bigint) as memory,
                 sum((doc::json ->> 'vcpus')::bigint) as vcpus from claim group by 1) c on c.host_id = h.id
    where c.memory > h.memory_bytes - $1::bigint or c.vcpus > h.cpus * 10"""
"""Hosts that are promised more than they physically have, from the claims' documents: neither the counters nor the limits that
claims are made by are asked."""


async def overcommitted(alone: Alone) -> list[str]:
    connection = await asyncpg.connect(
        alone.database, database="volery", server_settings={"search_path": "scheduler"}
    )
    try:
        return [r["name"] for r in await connection.fetch(OVERCOMMITTED, CONFIG.host_reserve_mib * 2**20)]
    finally:
        await connection.close()
