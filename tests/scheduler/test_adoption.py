"""VMs that run without a claim get one, hundreds of them in a few commits, each exactly once."""

from __future__ import annotations

import asyncio

from services.scheduler.reconcile import adopt_vms
from services.scheduler.state import Scheduler
from tests.scheduler.fleets import (
    GIB,
    OVERHEAD,
    capacities,
    cluster,
    host,
    hosts_known,
    inventory,
    scheduler,
    until,
    vm,
)
from tests.scheduler.test_claims_settle import connected, eager
from tests.scheduler.test_placing import claims
from tests.support.runtime import running
from volery.contracts.cluster import CLUSTER_CHANGED
from volery.contracts.host import HOST_CHANGED
from volery.contracts.vm import VM_CHANGED
from volery.runtime.config import DatabaseConfig
from volery.runtime.programs import Settings

HOSTS, EACH = 3, 50


async def test_what_runs_without_claims_gets_them_in_few_commits_and_once(
    configured: Settings, database: DatabaseConfig
) -> None:
    """Also when two replicas, or two rounds, adopt at the same time."""
    owner, c = inventory(), cluster()
    hosts = [host(c.id, name=f"h{number}") for number in range(HOSTS)]
    opened: list[Scheduler] = []
    async with running(eager(configured), owner.service(), scheduler(opened)) as bus:
        await owner.says(CLUSTER_CHANGED, c)
        for each in hosts:
            await owner.says(HOST_CHANGED, each)
        await hosts_known(bus, HOSTS)
        vms = [
            vm(c.id, name=f"{h.name}-{number}", host_id=h.id, memory_bytes=2 * GIB, vcpus=2)
            for number in range(EACH)
            for h in hosts
        ]
        for each in vms:
            await owner.says(VM_CHANGED, each)
        async with connected(database) as connection:

            async def heard() -> bool:
                return await connection.fetchval("select count(*) from vm") == len(vms)

            await until(heard, 15)
            await connection.execute("update vm set heard_at = now() - interval '1 minute'")
            await asyncio.gather(adopt_vms(opened[0]), adopt_vms(opened[0]))
            commits = await connection.fetchval("select count(distinct xmin::text) from claim")

        held = [(claim.vm_id, claim.host_id) for claim in await claims(bus)]
        assert sorted(held) == sorted((each.id, each.host_id) for each in vms)
        assert commits <= 12
        used = await capacities(bus)
        assert {u.memory_used_bytes for u in used.values()} == {EACH * (2 * GIB + OVERHEAD)}
        assert {u.vcpus_used for u in used.values()} == {EACH * 2}
