"""Every replica of ha listens, so that whoever leads next goes on judging where the former one stood."""

from __future__ import annotations

from datetime import UTC, datetime

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
    """Listening anew would take it five seconds to settle and three to believe a silence."""
    owner, h1 = Inventory(), host("h1")
    settings = hurried(configured, VOLERY_HA_SETTLE_SECONDS="5", VOLERY_HA_SILENCE_SECONDS="3")
    async with running(settings, owner.service(), ha(), ha()) as bus:
        await owner.says(HOST_CHANGED, h1)
        async with hearts(bus.client, h1) as beating:
            await becomes(bus, h1.id, "up")
            beating[0].stop()
            await becomes(bus, h1.id, "connecting", 20)
            ended_at = datetime.now(UTC)
            await end_the_leader(configured)
            judged = await becomes(bus, h1.id, "non_responsive", 20)
    assert judged.since is not None
    assert (judged.since - ended_at).total_seconds() < 6
