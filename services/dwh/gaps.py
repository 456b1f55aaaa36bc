"""Gaps: when facts were lost for good, the owner's objects are listed again and the gap is marked."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import msgspec

from services.dwh import store
from services.dwh.state import Dwh
from services.dwh.versions import version_of
from volery.contracts.account import LIST_EVENT_READERS, LIST_TOKENS, LIST_USERS
from volery.contracts.affinity_group import LIST_AFFINITY_GROUPS
from volery.contracts.base import Call
from volery.contracts.cluster import LIST_CLUSTERS, LIST_DATA_CENTERS
from volery.contracts.errors import Refused
from volery.contracts.history import LIST_GAPS, AskGaps, Gap, Gaps
from volery.contracts.host import LIST_HOSTS
from volery.contracts.liveness import LIST_LIVENESS, LIST_RESTARTS
from volery.contracts.network import LIST_ATTACHMENTS, LIST_MAC_POOLS, LIST_NETWORKS
from volery.contracts.operation import ListQuery
from volery.contracts.plan import LIST_PLANS
from volery.contracts.power import (
    LIST_FENCE_RECORDS,
    LIST_FENCING_PAUSES,
    LIST_FENCING_POLICIES,
    LIST_POWER_MANAGEMENT,
)
from volery.contracts.promise import LIST_PROMISES
from volery.contracts.protection import LIST_PROTECTION, LIST_RESERVES
from volery.contracts.scheduling import LIST_CLAIMS
from volery.contracts.scheduling_policy import LIST_SCHEDULING_POLICIES
from volery.contracts.snapshot import LIST_SNAPSHOTS
from volery.contracts.soft_fence import LIST_SOFT_FENCES
from volery.contracts.start_group import LIST_START_GROUPS
from volery.contracts.storage import LIST_DISKS, LIST_STORAGE_DOMAINS, LIST_TRANSFERS
from volery.contracts.template import LIST_TEMPLATES
from volery.contracts.vm import LIST_VMS
from volery.runtime.bus import Caller
from volery.runtime.listing import pages
from volery.runtime.relay import stream_name
from volery.runtime.service import Part
from volery.runtime.tables import Stale, commit

log = logging.getLogger(__name__)

part = Part()

LIST_SECONDS = 2.0

LISTS: dict[str, Call[ListQuery, Any]] = {
    "data_center": LIST_DATA_CENTERS,
    "cluster": LIST_CLUSTERS,
    "host": LIST_HOSTS,
    "vm": LIST_VMS,
    "template": LIST_TEMPLATES,
    "snapshot": LIST_SNAPSHOTS,
    "user": LIST_USERS,
    "token": LIST_TOKENS,
    "reader": LIST_EVENT_READERS,
    "storage_domain": LIST_STORAGE_DOMAINS,
    "disk": LIST_DISKS,
    "transfer": LIST_TRANSFERS,
    "network": LIST_NETWORKS,
    "mac_pool": LIST_MAC_POOLS,
    "attachment": LIST_ATTACHMENTS,
    "liveness": LIST_LIVENESS,
    "restart": LIST_RESTARTS,
    "power_management": LIST_POWER_MANAGEMENT,
    "fencing_pause": LIST_FENCING_PAUSES,
    "fencing_policy": LIST_FENCING_POLICIES,
    "soft_fence": LIST_SOFT_FENCES,
    "fence_record": LIST_FENCE_RECORDS,
    "protection": LIST_PROTECTION,
    "reserve": LIST_RESERVES,
    "promise": LIST_PROMISES,
    "start_group": LIST_START_GROUPS,
    "claim": LIST_CLAIMS,
    "affinity_group": LIST_AFFINITY_GROUPS,
    "scheduling_policy": LIST_SCHEDULING_POLICIES,
    "plan": LIST_PLANS,
}
"""How each noun is listed."""


async def notice(dwh: Dwh, stream: str) -> None:
    """Facts of this stream were lost: listed again as soon as its owner answers."""
    log.warning("facts of %s were lost; its owner is listed again", stream)
    await store.notice_gap(dwh.core.pool, stream)


@part.every(LIST_SECONDS)
async def fill(dwh: Dwh) -> None:
    """Owners that were never listed, or not since their last gap; one that is down holds up no other."""
    done = await store.listed(dwh.core.pool)
    async with asyncio.TaskGroup() as group:
        for stream in sorted({stream_name(call.owner) for call in LISTS.values()} - done):
            group.create_task(_fill(dwh, stream))


async def _fill(dwh: Dwh, stream: str) -> None:
    try:
        for noun, call in LISTS.items():
            if stream_name(call.owner) == stream:
                await list_noun(dwh, noun, call)
    except Refused as refused:
        log.info("%s can't be listed yet: %s", stream, refused.message)
    except Stale:
        return
    else:
        await store.was_listed(dwh.core.pool, stream)


async def list_noun(dwh: Dwh, noun: str, call: Call[ListQuery, Any]) -> None:
    """Every object as it is now; what was known before and is no more has ended."""
    before = await store.current(dwh.core.pool, noun)
    async for docs in pages(dwh.core.bus, call, msgspec.Raw):
        rows = [version_of(noun, doc) for doc in docs]
        await commit(dwh.core.pool, store.versions_said(rows))
        for row in rows:
            before.pop(row.id, None)
    for object_id, revision in before.items():
        await commit(dwh.core.pool, store.ended(noun, object_id, revision))


@part.answers(LIST_GAPS)
async def list_gaps(dwh: Dwh, ask: AskGaps, caller: Caller) -> Gaps:
    return Gaps(items=tuple(Gap(**dict(record)) for record in await store.gaps(dwh.core.pool)))
