"""Durable placements beside OpenStack Placement's: candidates and claim by its REST API, its database on the same PostgreSQL server."""

from __future__ import annotations

import asyncio
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.parse import quote
from uuid import uuid4

import asyncpg

from bench import load
from bench.claims_world import CLUSTER, CONFIG, SECRET, Alone, Size, overcommitted, scheduler_alone
from bench.peers.environments import environment, pinned
from bench.rows import PAIRS, Line, in_turn
from bench.world import World, free_port
from volery.contracts.ids import new_id
from volery.contracts.scheduling import PLACE, Need, Place
from volery.runtime.bus import Bus, Caller, open_bus

GOALS = {1_000: 100.0, 5_000: 400.0}
"""Hosts → how many times as many placements a second."""
CLIENTS, REQUESTS = 8, 30
OURS_MORE = 10
"""Ours are so many times as many requests a cell, since thirty would be over before they can be timed."""
VCPUS, MEMORY_MIB, DISK_GIB = 4, 8192, 40
CANDIDATES = 10
WORKERS = os.cpu_count() or 2
MICROVERSION = "placement 1.39"
DATABASE = "placement"
CONFIGURATION = """
[DEFAULT]
default_log_levels = placement=WARNING
[api]
auth_strategy = noauth2
[placement_database]
connection = postgresql+psycopg2://{database}:{secret}@/{database}?host={sockets}
max_pool_size = 10
"""
INVENTORY = f"""
    with provider as (
        insert into resource_providers (uuid, name, generation)
        select gen_random_uuid()::text, name, 0 from unnest($1::text[]) name returning id, name),
    host as (select * from unnest($1::text[], $2::int[], $3::int[]) as host (name, cpus, mib))
    insert into inventories (resource_provider_id, resource_class_id, total, reserved, min_unit, max_unit, step_size, allocation_ratio)
    select provider.id, class.id,
           case class.name when 'VCPU' then cpus when 'MEMORY_MB' then mib else 10000 end,
           case class.name when 'MEMORY_MB' then {CONFIG.host_reserve_mib} else 0 end,
           1, case class.name when 'VCPU' then cpus when 'MEMORY_MB' then mib else 10000 end, 1,
           case class.name when 'VCPU' then 10.0 else 1.0 end
    from provider join host using (name), resource_classes class where class.name in ('VCPU', 'MEMORY_MB', 'DISK_GB')"""
"""What its API writes for the same hosts, in one statement: by the API it takes a minute."""
ROOTS = "update resource_providers set root_provider_id = id"
PROMISED = """
    select count(*) from inventories i join (
        select resource_provider_id, resource_class_id, sum(used) as used from allocations group by 1, 2) a
    using (resource_provider_id, resource_class_id) where a.used > (i.total - i.reserved) * i.allocation_ratio"""


@dataclass
class Peer:
    """OpenStack Placement, running."""

    port: int
    dice: random.Random = field(default_factory=lambda: random.Random(4))
    conflicts: int = 0
    """Claims that another client's claim made it ask anew for."""

    async def ask(self, method: str, path: str, expected: int, body: object = None) -> bytes:
        """On a connection of its own: gunicorn's plain workers keep none."""
        http = await load.connect(f"http://127.0.0.1:{self.port}", None)
        document = None if body is None else json.dumps(body).encode()
        head = {"X_Auth_Token": "admin", "OpenStack_API_Version": MICROVERSION}
        try:
            return await http.ask(load.request(method, path, body=document, **head), expected)
        finally:
            http.close()

    async def place(self, _number: int) -> None:
        """As Nova does: candidates, then the claim of one of them, until nobody else's claim was in between."""
        wanted = f"VCPU:{VCPUS},MEMORY_MB:{MEMORY_MIB},DISK_GB:{DISK_GIB}"
        path = f"/allocation_candidates?limit={CANDIDATES}&resources={quote(wanted, safe='')}"
        while True:
            found = json.loads(await self.ask("GET", path, 200))["allocation_requests"]
            chosen = self.dice.choice(found)
            claim = {
                "allocations": chosen["allocations"],
                "project_id": "bench",
                "user_id": "bench",
                "consumer_generation": None,
                "consumer_type": "INSTANCE",
            }
            try:
                await self.ask("PUT", f"/allocations/{uuid4()}", 204, claim)
                return
            except RuntimeError as refused:
                if ": 409 " not in str(refused):
                    raise
                self.conflicts += 1


@dataclass
class Ours:
    bus: Bus

    async def place(self, _number: int) -> None:
        need = Need(vm_id=new_id(), cluster_id=CLUSTER, memory_bytes=MEMORY_MIB << 20, vcpus=VCPUS)
        ask = Place(need=need, epoch=1, operation_id=new_id())
        answer = await self.bus.ask(PLACE, ask, Caller("service:inventory", new_id(), "bench"))
        assert answer.claimed, answer.message


@asynccontextmanager
async def openstack_placement(alone: Alone) -> AsyncIterator[Peer]:
    """With the scheduler's own hosts, as many workers as there are processors, and its defaults otherwise."""
    place = await asyncio.to_thread(environment, "placement")
    superuser = await asyncpg.connect(alone.database)
    try:
        sockets = str(await superuser.fetchval("show unix_socket_directories"))
        await superuser.execute(f"create role {DATABASE} login password '{SECRET}'")
        await superuser.execute(f"create database {DATABASE} owner {DATABASE} template template0")
    finally:
        await superuser.close()
    with TemporaryDirectory(prefix="volery-bench-placement-") as directory:
        said = CONFIGURATION.format(database=DATABASE, secret=SECRET, sockets=sockets)
        Path(directory, "placement.conf").write_text(said)
        environ = {"PATH": os.environ["PATH"], "OS_PLACEMENT_CONFIG_DIR": directory}
        sync = [str(place / "bin" / "placement-manage"), "--config-dir", directory, "db", "sync"]
        await asyncio.to_thread(subprocess.run, sync, env=environ, check=True, capture_output=True)
        with _served(place, environ) as port:
            peer = Peer(port)
            await _answers(peer)
            await _fill(alone)
            yield peer


@contextmanager
def _served(place: Path, environ: dict[str, str]) -> Iterator[int]:
    port = free_port()
    command = [
        str(place / "bin" / "gunicorn"), "--bind", f"127.0.0.1:{port}", "--workers", str(WORKERS), "--timeout", "300",
        "--log-level", "error", "placement.wsgi.api:application",
    ]  # fmt: skip
    process = subprocess.Popen(command, env=environ, stderr=subprocess.DEVNULL)
    try:
        yield port
    finally:
        process.terminate()
        process.wait(30)


async def _answers(peer: Peer) -> None:
    """Its first answer also writes its resource classes."""
    async with asyncio.timeout(60):
        while True:
            try:
                await peer.ask("GET", "/resource_classes", 200)
                return
            except OSError:
                await asyncio.sleep(0.2)


async def _fill(alone: Alone) -> None:
    ours = await asyncpg.connect(
        alone.database, database="volery", server_settings={"search_path": "scheduler"}
    )
    theirs = await asyncpg.connect(alone.database, database=DATABASE)
    try:
        hosts = await ours.fetch(
            "select name, cpus, memory_bytes / 1048576 as mib from host_capacity where status = 'up'"
        )
        names, cpus, mib = ([host[column] for host in hosts] for column in ("name", "cpus", "mib"))
        await theirs.execute(INVENTORY, names, cpus, mib)
        await theirs.execute(ROOTS)
        await theirs.execute("analyze")
    finally:
        await ours.close()
        await theirs.close()


async def _promised_twice(alone: Alone) -> int:
    connection = await asyncpg.connect(alone.database, database=DATABASE)
    try:
        return int(await connection.fetchval(PROMISED))
    finally:
        await connection.close()


async def _rate(place: Callable[[int], Awaitable[None]], requests: int) -> float:
    """Placements a second of all clients until so many are made."""
    left = iter(range(requests))

    async def client() -> None:
        for number in left:
            await place(number)

    began = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(CLIENTS)))
    return requests / (time.perf_counter() - began)


async def beside_placement(hosts: int, pairs: int = PAIRS, requests: int = REQUESTS) -> list[Line]:
    async with (
        scheduler_alone(Size(hosts, 0, [])) as alone,
        openstack_placement(alone) as peer,
        open_bus(alone.bus, "inventory") as bus,
    ):
        ours = Ours(bus)
        found = await in_turn(
            lambda: _rate(ours.place, requests * OURS_MORE), lambda: _rate(peer.place, requests), pairs
        )
        over, over_there = len(await overcommitted(alone)), await _promised_twice(alone)
    goal = GOALS.get(hosts, 0.0)
    mine, others = found.medians
    note = (
        f"theirs: openstack-placement {pinned('placement', 'openstack-placement')} under gunicorn with {WORKERS} workers (processors), "
        f"its defaults, {CANDIDATES} candidates asked for and one of them claimed, {requests} requests a cell, {peer.conflicts} asked "
        f"anew after another's claim; ours {requests * OURS_MORE} a cell, asyncpg {version('asyncpg')}. {CLIENTS} clients, empty hosts, "
        f"{VCPUS} vCPUs and {MEMORY_MIB // 1024} GiB, the same PostgreSQL server. Hosts promised more than they have: ours {over}, "
        f"theirs {over_there}. Loads and servers share the cores"
    )
    return [
        Line(
            name=f"durable placements beside OpenStack Placement, {hosts:,} hosts", ours=mine, theirs=others,
            unit="placements/s", ratio=found.ratio, goal=f">= {goal:g} x, no host promised twice",
            met=found.ratio >= goal and not over, note=note,
        )
    ]  # fmt: skip


async def placement(world: World) -> list[Line]:
    lines: list[Line] = []
    for hosts in GOALS:
        lines += await beside_placement(hosts)
        print(f"  {lines[-1].ours:,.0f} / {lines[-1].theirs:.3g}: {lines[-1].ratio:.1f} x", file=sys.stderr)
    return lines
