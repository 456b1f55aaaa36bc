"""All claims are compared with all VMs now and then; in between only those of which something was heard lately."""

from __future__ import annotations

import asyncio
from datetime import timedelta

import pytest
from msgspec.structs import replace

from services.scheduler import adoption_store, store
from services.scheduler.looks import MOST_SECONDS, Looks
from services.scheduler.model import CONFIRMED, TENTATIVE
from volery.contracts.scheduling import Claim
from volery.contracts.vm import VmStatus
from volery.runtime.clock import utc_now
from volery.runtime.database import migrate, open_pool
from volery.runtime.programs import Settings
from volery.runtime.tables import commit

BEFORE, LONG_BEFORE = 30.0, store.RECENT_SECONDS + 60
AN_HOUR_AGO = utc_now() - timedelta(hours=1)
CLAIM = Claim(
    id="", revision=1, created_at=AN_HOUR_AGO, updated_at=AN_HOUR_AGO, vm_id="", epoch=1, host_id="h1", memory_bytes=1, vcpus=1
)  # fmt: skip


async def test_a_look_at_everything_takes_a_hundredth_of_the_time() -> None:
    looks = Looks()
    async with looks.one("claims") as recent:
        assert not recent
        await asyncio.sleep(0.05)
    async with looks.one("claims") as recent:
        assert recent, "for five seconds"
    async with looks.one("other") as recent:
        assert not recent, "each has its own time"
    looks.due_at["claims"] = 0.0
    with pytest.raises(OSError, match="away"):
        async with looks.one("claims") as recent:
            raise OSError("the database is away")
    async with looks.one("claims") as recent:
        assert not recent, "what failed has seen nothing"


def test_what_is_heard_between_two_looks_at_everything_is_recent() -> None:
    assert store.RECENT_SECONDS > MOST_SECONDS + 30


async def test_in_between_those_are_found_that_were_heard_of_lately(configured: Settings) -> None:
    await migrate(configured.database, "scheduler")
    async with open_pool(configured.database, "scheduler") as pool:
        await pool.execute(
            """insert into host_capacity (id, revision, name, cluster_id, status, cpus, memory_bytes, cpu_models, machines,
                                          memory_limit_bytes, vcpus_limit)
               values ('h1', 1, 'h1', 'c', 'up', 8, 1, '{}', '{}', 1, 80)"""
        )
        for vm_id, status, state in (
            ("running", VmStatus.UP, ""),
            ("down", VmStatus.DOWN, CONFIRMED),
            ("begun", VmStatus.DOWN, TENTATIVE),
            ("well", VmStatus.UP, CONFIRMED),
        ):
            await pool.execute(
                """insert into vm (id, revision, name, epoch, status, host_id, memory_bytes, vcpus, deleted)
                   values ($1, 1, $1, 1, $2, $3, 1, 1, false)""",
                vm_id,
                status,
                "h1" if status is VmStatus.UP else "",
            )
            if state:
                held = replace(CLAIM, id=vm_id, vm_id=vm_id, state=state)
                await commit(pool, [store.CLAIMS.insert(held, store.ClaimPrivate())])
        found = {}
        for seconds in (BEFORE, LONG_BEFORE):
            await pool.execute("update vm set heard_at = now() - make_interval(secs => $1)", seconds)
            for recent in (False, True):
                claims = await store.suspicious_claims(pool, 300.0, 5.0, recent=recent)
                vms = await adoption_store.unclaimed_vms(pool, 15.0, 10, recent=recent)
                found[seconds, recent] = {row.id for row, *_ in claims} | {vm.id for vm in vms}
    everything = {"running", "down", "begun"}
    assert found == {
        (BEFORE, False): everything,
        (BEFORE, True): everything,
        (LONG_BEFORE, False): everything,
        (LONG_BEFORE, True): {"begun"},
    }
