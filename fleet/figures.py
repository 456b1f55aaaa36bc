"""What a fleet costs and whether it is kept: looked at from outside, in the services' own tables and in /proc."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field

from bench.memory import held_mb
from bench.processor import processor_seconds
from bench.world import Installation, Pool
from volery.runtime.database import open_pool

LOOK_SECONDS = 5.0
OWNERS = ("inventory", "scheduler", "storage", "network", "ha", "dwh")
SPEAKERS = ("inventory", "scheduler", "storage", "network", "ha")
"""Owners with facts of their own."""


@dataclass
class Tables:
    """A look into each owner's tables, as that owner."""

    pools: dict[str, Pool]

    async def count(self, owner: str, query: str, *values: object) -> int:
        return int(await self.pools[owner].fetchval(query, *values) or 0)

    async def hosts_up(self) -> int:
        return await self.count("inventory", "select count(*) from host where status = 'up'")

    async def claims(self) -> int:
        return await self.count("scheduler", "select count(*) from claim")

    async def suspects(self) -> int:
        return await self.count("ha", "select count(*) from liveness where state not in ('up', 'unknown')")

    async def waiting_facts(self) -> int:
        return sum([await self.count(owner, "select count(*) from outbox") for owner in SPEAKERS])

    async def stored_minutes(self) -> int:
        """Rows of VMs of the last minute that was written."""
        return await self.count(
            "dwh", "select count(*) from vm_minute where at = (select max(at) from vm_minute)"
        )

    async def states(self, ids: list[str]) -> dict[str, int]:
        rows = await self.pools["ha"].fetch(
            "select state, count(*) as hosts from liveness where id = any($1) group by state", ids
        )
        return {row["state"]: row["hosts"] for row in rows}

    async def suspects_beside(self, ids: list[str]) -> int:
        return await self.count(
            "ha",
            "select count(*) from liveness where state not in ('up', 'unknown') and not id = any($1)",
            ids,
        )


@asynccontextmanager
async def tables(there: Installation) -> AsyncIterator[Tables]:
    async with AsyncExitStack() as stack:
        pools = {
            owner: await stack.enter_async_context(open_pool(there.database(pool_max=2), owner))
            for owner in OWNERS
        }
        yield Tables(pools)


@dataclass
class Steady:
    """What was seen of a fleet in which nothing happens."""

    seconds: float = 0.0
    cores: dict[str, float] = field(default_factory=dict)
    """Part of the installation → processors that it used."""
    fleet_cores: float = 0.0
    most_mb: float = 0.0
    """Of the services; PostgreSQL and NATS are beside it."""
    suspects: int = 0
    """The most hosts that were suspected at once."""
    waiting: int = 0
    """The most facts that waited to be moved to the bus."""
    returns: int = 0
    """Connections of hosts that were lost and made again."""
    minutes: int = 0
    """VMs of which the last minute was stored."""


async def watch(there: Installation, look: Tables, seconds: float) -> Steady:
    seen = Steady()
    before, own, begun = processor_seconds(there), time.process_time(), time.monotonic()
    while time.monotonic() - begun < seconds:
        await asyncio.sleep(LOOK_SECONDS)
        seen.most_mb = max(seen.most_mb, held_mb(there.process)[0])
        seen.suspects = max(seen.suspects, await look.suspects())
        seen.waiting = max(seen.waiting, await look.waiting_facts())
    seen.seconds = time.monotonic() - begun
    after = processor_seconds(there)
    seen.cores = {part: (after[part] - before[part]) / seen.seconds for part in after}
    seen.fleet_cores = (time.process_time() - own) / seen.seconds
    seen.minutes = await look.stored_minutes()
    return seen


@dataclass
class Killed:
    """How hosts that were cut off at once were noticed, in seconds after it."""

    suspected: float = 0.0
    """Until the last of them was."""
    given_up: float = 0.0
    others: int = 0
    """The most hosts that still beat and were suspected."""


async def watch_killed(look: Tables, ids: list[str], patience: float) -> Killed:
    """Raises TimeoutError when ha doesn't notice all of them."""
    seen, begun = Killed(), time.monotonic()
    async with asyncio.timeout(patience):
        while not seen.given_up:
            states = await look.states(ids)
            seen.others = max(seen.others, await look.suspects_beside(ids))
            now = time.monotonic() - begun
            if not seen.suspected and states.get("up", 0) == 0:
                seen.suspected = now
            if states.get("non_responsive", 0) == len(ids):
                seen.given_up = now
            await asyncio.sleep(0.1)  # ha's own times are what is measured
    return seen
