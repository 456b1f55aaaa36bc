"""The SQL of hosts that are switched off to save power, and on again: the newest order of each."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

from services.ha.store import Pool
from volery.runtime.tables import Stale


class Ordered(StrEnum):
    DOWN = "down"
    """It was ordered off, and that may still come true."""
    UP = "up"
    """It was ordered on."""
    SETTLED = "settled"
    """What came of an order to switch it off is certain."""


@dataclass(frozen=True, slots=True)
class PowerOrder:
    revision: int
    action: Ordered
    at: datetime


async def newest(pool: Pool, host_id: str) -> PowerOrder | None:
    found = await pool.fetchrow("select revision, action, at from power_order where host_id = $1", host_id)
    return None if found is None else PowerOrder(found["revision"], Ordered(found["action"]), found["at"])


async def book(pool: Pool, token: int, host_id: str, revision: int, action: Ordered, now: datetime) -> bool:
    """Whether this is the newest that was decided about the host; then it is noted, before anything is done. The leader's
    row is locked: a former leader's token books nothing. Raises Stale for a token that leads no more."""
    async with pool.acquire() as connection, connection.transaction():
        if not await connection.fetchval("select 1 from leader where token = $1 for update", token):
            raise Stale
        booked = await connection.fetchval(
            """insert into power_order (host_id, revision, action, at) values ($1, $2, $3, $4)
               on conflict (host_id) do update set revision = excluded.revision, action = excluded.action,
                   at = excluded.at
               where power_order.revision <= excluded.revision returning 1""",
            host_id,
            revision,
            str(action),
            now,
        )
    return bool(booked)


async def settle(pool: Pool, host_id: str, revision: int) -> None:
    await pool.execute(
        "update power_order set action = 'settled' where host_id = $1 and revision = $2 and action = 'down'",
        host_id,
        revision,
    )


async def forget(pool: Pool) -> None:
    """Orders of hosts that are no more."""
    await pool.execute(
        "delete from power_order o where not exists (select 1 from host h where h.id = o.host_id)"
    )
