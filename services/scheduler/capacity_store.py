"""What is read of hosts: for people what they have and which have promised more, for decisions what claims hold of them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from services.scheduler.store import ClaimPrivate, Pool
from volery.contracts.base import Message
from volery.contracts.operation import ListQuery
from volery.contracts.scheduling import Claim, HostCapacity
from volery.runtime.pages import plain_page
from volery.runtime.tables import Table

CAPACITY: Table[Any, Any] = Table(
    "capacity_of_host",
    Claim,
    ClaimPrivate,
    columns={"name": "name", "cluster_id": "cluster_id", "status": "status"},
)
"""A view; only its documents are read."""


async def page_of_hosts(pool: Pool, query: ListQuery) -> tuple[list[HostCapacity], str]:
    """Hosts without what no table has of them, and the token of the next page."""
    raw = await plain_page(pool, CAPACITY, query)
    answer = msgspec.json.decode(raw, type=CapacityPage)
    return answer.items, answer.next


async def short_hosts(pool: Pool) -> list[HostCapacity]:
    """Those that have promised more than they have."""
    records = await pool.fetch(
        """select v.doc from capacity_of_host v join host_capacity h on h.id = v.id
           where h.memory_used_bytes > h.memory_limit_bytes or h.vcpus_used > h.vcpus_limit
              or h.pages_2m_used > h.pages_2m or h.pages_1g_used > h.pages_1g
           order by h.id"""
    )
    return [msgspec.json.decode(r["doc"], type=HostCapacity) for r in records]


class CapacityPage(Message):
    items: list[HostCapacity] = []
    next: str = ""


@dataclass(frozen=True, slots=True)
class Used:
    """What claims hold of hosts."""

    hosts: Sequence[tuple[str, *tuple[int, ...]]]
    """Host, bytes, vCPUs, VMs that hold them, highly available ones among these, huge pages, and vCPUs of the largest VM that
    shares CPUs."""
    as_of: int
    """The oldest transaction that was still under way just before."""


XIDS = 1 << 32
"""Numbers of transactions, as rows have them, begin anew after so many."""


async def used(pool: Pool, since: int = 0, besides: Collection[str] = ()) -> Used:
    """Of these hosts and those whose rows were written by that transaction or later ones; of all when it is 0. Of thousands of
    hosts only some get or lose a VM within a second, and reading the others took most of it."""
    as_of = await pool.fetchval("select pg_snapshot_xmin(pg_current_snapshot())::text::bigint")
    # Both ages count from the next number to be given away; a snapshot ends before those of transactions under way.
    records = await pool.fetch(
        """select id, memory_used_bytes, vcpus_used, guests, ha_guests, pages_2m_used, pages_1g_used, largest_shared
           from host_capacity
           where not gone and (id = any($2::text[]) or age(xmin) <= age($1::xid))""",
        since % XIDS,
        list(besides),
    )
    return Used([tuple(r) for r in records], as_of)
