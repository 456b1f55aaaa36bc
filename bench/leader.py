"""How long after the death of the ha that leads the next one decides: real services, scripted hosts."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from datetime import UTC, datetime

import asyncpg

from bench.fleet import FleetHost, fleet
from bench.rows import Line, below
from bench.world import Installation, World, installed
from lab.plane import make_cluster
from volery.client import api
from volery.contracts.liveness import HostLiveness, LivenessState
from volery.runtime.service import LEADER_LOCK
from volery.setup import servers
from volery.setup.programs import REPOSITORY, load_environment

HOSTS, ROUNDS = 7, 3
SILENCE_SECONDS = 10.0
"""VOLERY_HA_SILENCE_SECONDS as it is by default: a host that was not heard for so long is non-responsive."""
BEFORE_SECONDS = 0.5
"""The leader is killed so long before it would have decided."""
PATIENCE_SECONDS = 60.0

_LOCKS = """select a.pid, l.granted from pg_locks l join pg_stat_activity a on a.pid = l.pid
            where l.locktype = 'advisory' and a.usename = 'ha' and l.objid = (hashtext($1)::bigint & 4294967295)::oid"""


async def killed(world: World) -> list[Line]:
    """From `kill -9` of the ha that leads, in the middle of judging a silent host, until the next one has judged it."""
    with ExitStack() as stack:
        there = await asyncio.to_thread(stack.enter_context, installed())
        cluster = await asyncio.to_thread(make_cluster, there.client)
        async with fleet(there, cluster.id, HOSTS) as hosts:
            took = [await _round(there, host) for host in hosts[:ROUNDS]]
        await asyncio.to_thread(stack.close)
    note = (
        f"the slowest of {ROUNDS}: {', '.join(f'{seconds:.2f}' for seconds in took)} s; two replicas, of which one is a "
        f"process of its own that leads and is killed {BEFORE_SECONDS} s before a host's silence says non-responsive"
    )
    return [below("ha's leader killed: until the next decides", max(took), 5.0, "s", note)]


async def _round(there: Installation, host: FleetHost) -> float:
    """Seconds from the kill to the judgement, by the clock of this machine."""
    await _becomes(there, host, LivenessState.UP)
    async with _leading_replica(there) as leader:
        await host.leave()
        silent_at = time.monotonic()
        await _becomes(there, host, LivenessState.CONNECTING)  # the one that leads is at it
        await asyncio.sleep(silent_at + SILENCE_SECONDS - BEFORE_SECONDS - time.monotonic())
        killed_at = datetime.now(UTC)
        leader.kill()
        judged = await _becomes(there, host, LivenessState.NON_RESPONSIVE)
    assert judged.since is not None
    assert judged.since > killed_at, "the one that was killed had decided already"
    return (judged.since - killed_at).total_seconds()


async def _becomes(there: Installation, host: FleetHost, state: LivenessState) -> HostLiveness:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        found = await asyncio.to_thread(there.client.send, api.LIVENESS.get(host.host_id))
        if found.state is state:
            return found
        assert time.monotonic() < deadline, found
        await asyncio.sleep(0.1)  # what is measured are ha's own times, not when this looks


@asynccontextmanager
async def _leading_replica(there: Installation) -> AsyncIterator[asyncio.subprocess.Process]:
    """ha as a process of its own, beside the one in the control plane, which has lost its leadership to it."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "services.ha",
        env=load_environment(there.home),
        cwd=REPOSITORY,
        stderr=asyncio.subprocess.DEVNULL,
    )
    server = await asyncio.to_thread(servers.start_postgres, there.home)  # it runs: this only says where
    database = await asyncpg.connect(server.dsn, database="volery")
    try:
        former = await _leads_before_another(database)
        await database.execute("select pg_terminate_backend($1)", former)
        await _leads_before_another(database, former)
        yield process
    finally:
        await database.close()
        if process.returncode is None:
            process.kill()
        await process.wait()


async def _leads_before_another(database: asyncpg.Connection[asyncpg.Record], former: int = 0) -> int:
    """Once another than the former leads and one waits to follow it: the session of the one that leads."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        locks = await database.fetch(_LOCKS, LEADER_LOCK + "ha")
        leading = [lock["pid"] for lock in locks if lock["granted"]]
        if len(locks) == 2 and len(leading) == 1 and leading != [former]:
            return int(leading[0])
        assert time.monotonic() < deadline, locks
        await asyncio.sleep(0.1)
