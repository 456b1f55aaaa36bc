"""The SQL of past decisions."""

from __future__ import annotations

import zlib

from services.scheduler.store import ClaimPrivate, Pool
from volery.contracts.base import encode
from volery.contracts.operation import ListQuery
from volery.contracts.scheduling import PastDecision
from volery.runtime.pages import page
from volery.runtime.tables import Change, Table

DECISIONS: Table[PastDecision, ClaimPrivate] = Table(
    "decision", PastDecision, ClaimPrivate, columns={"vm_id": "vm_id", "host_id": "host_id"}
)
"""Only its documents are read this way."""


def keep_decision(placement: bytes, short: PastDecision) -> Change:
    """The placement as JSON."""
    return Change(
        "insert into decision (id, vm_id, host_id, doc, body) values ({0}, {1}, {2}, {3}, {4}::bytea) returning 1",
        (
            short.id,
            short.vm_id,
            short.host_id,
            encode(short).decode(),
            zlib.compress(placement, level=1),
        ),
    )


async def decisions(pool: Pool, query: ListQuery) -> bytes:
    """A page of those that the previous release didn't write."""
    return await page(pool, DECISIONS, query, "doc <> ''")


async def decision(pool: Pool, decision_id: str) -> bytes | None:
    body = await pool.fetchval("select body from decision where id = $1", decision_id)
    return None if body is None else zlib.decompress(body)


async def forget_decisions(pool: Pool, days: int) -> None:
    await pool.execute("delete from decision where created_at < now() - make_interval(days => $1)", days)
