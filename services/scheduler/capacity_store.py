"""What is read of hosts for people: what they have, and which have promised more than that."""

from __future__ import annotations

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
