"""Every replica of ha listens, so that whoever leads next goes on judging where the former one stood."""

from __future__ import annotations

from datetime import UTC, datetime

from services.ha.policies.evidence import Kind
from tests.ha.world import Inventory, becomes, ha, hearts, host, hurried
from tests.support.runtime import running
from volery.contracts.host import HOST_CHANGED
from volery.runtime.database import open_direct
from volery.runtime.programs import Settings


async def end_the_leader(configured: Settings) -> None:
    """PostgreSQL ends its session, as it does when its process is killed."""
    async with open_direct(configured.database, "ha") as connection:
        ended = await connection.fetchval(
            """select count(pg_terminate_backend(pid)) from pg_locks
               where locktype = 'advisory' and granted and pid <> pg_backend_pid()
                 and objid = hashtext('volery-leader-ha')::bigint::bit(32)::bigint::oid"""
        )
    assert ended == 1


async def test_whoever_leads_next_has_heard_the_silence_itself(configured: Settings) -> None:
    owner, h1 = Inventory(), host("h1")
    async with running(
        hurried(configured, VOLERY_HA_SILENCE_SECONDS="3"), owner.service(), ha(), ha()
    ) as bus:
        await owner.says(HOST_CHANGED, h1)
        async with hearts(bus.client, h1) as beating:
            await becomes(bus, h1.id, "up", 20)
            beating[0].stop()
            await becomes(bus, h1.id, "connecting", 20)
            ended_at = datetime.now(UTC)
            await end_the_leader(configured)
            judged = await becomes(bus, h1.id, "non_responsive", 20)
    listened_since = next(e.at for e in judged.evidence if e.kind == Kind.LISTENING)
    assert listened_since < ended_at
