"""Claims that contradict what inventory says are put right; nothing that may still be true is given back."""

from __future__ import annotations

import contextlib
import dataclasses
from datetime import UTC, datetime, timedelta

import asyncpg
import pytest
from msgspec.structs import replace

from services.scheduler.config import SchedulerConfig
from services.scheduler.model import SeenVm, Settling, settle
from services.scheduler.reconcile import adopt_vms, check_counters, settle_claims
from services.scheduler.state import Scheduler
from tests.scheduler.fleets import (
    GIB,
    OVERHEAD,
    capacities,
    cluster,
    host,
    hosts_known,
    inventory,
    placing,
    scheduler,
    until,
    vm,
)
from tests.scheduler.test_placing import claims
from tests.support.runtime import running
from volery.contracts.cluster import CLUSTER_CHANGED
from volery.contracts.host import HOST_CHANGED
from volery.contracts.scheduling import CONFIRM_CLAIM, PLACE, Claim, ClaimKey
from volery.contracts.vm import VM_CHANGED, VM_DELETED, VmStatus
from volery.runtime.config import DatabaseConfig
from volery.runtime.programs import Settings

CONFIG = SchedulerConfig()
NOW = datetime.now(UTC)
LONG_AGO = NOW - timedelta(seconds=CONFIG.claim_seconds + 60)
BEFORE = NOW - timedelta(seconds=CONFIG.settled_seconds + 1)
JUST_NOW = NOW - timedelta(seconds=1)


def claim(state: str, epoch: int = 2, at: datetime = BEFORE) -> Claim:
    return Claim(
        id="c", revision=1, created_at=at, updated_at=at, vm_id="vm", epoch=epoch, host_id="here",
        memory_bytes=1, vcpus=1, state=state,
    )  # fmt: skip


def seen(
    status: str, host_id: str = "here", epoch: int = 2, at: datetime = BEFORE, deleted: bool = False
) -> SeenVm:
    return SeenVm("vm", epoch, status, host_id, 1, 1, "vm", deleted, at)


KEEP, RELEASE, CONFIRM = Settling.KEEP, Settling.RELEASE, Settling.CONFIRM


@pytest.mark.parametrize(
    ("held", "heard", "verdict"),
    [
        # A confirmed claim follows its VM.
        (claim("confirmed"), seen("up"), KEEP),
        (claim("confirmed"), seen("down", ""), RELEASE),
        (claim("confirmed"), seen("down", "", at=JUST_NOW), KEEP),
        (claim("confirmed"), seen("suspended", ""), RELEASE),
        (claim("confirmed"), seen("up", "there"), RELEASE),
        (claim("confirmed"), seen("up", "there", epoch=1), KEEP),
        (claim("confirmed"), seen("down", "", epoch=1), KEEP),
        (claim("confirmed"), seen("up", deleted=True), RELEASE),
        # Where a VM may be moving, or nobody knows, nothing is given back.
        (claim("confirmed"), seen("migrating", "there"), KEEP),
        (claim("confirmed"), seen("unknown", "there"), KEEP),
        (claim("confirmed"), seen("not_responding", "there"), KEEP),
        (claim("confirmed"), seen("powering_down", "there"), KEEP),
        (claim("confirmed"), None, KEEP),
        # A tentative claim waits for its VM until it expires.
        (claim("tentative"), seen("down", "", epoch=1), KEEP),
        (claim("tentative"), seen("wait_for_launch"), KEEP),
        (claim("tentative"), seen("up"), CONFIRM),
        (claim("tentative", at=LONG_AGO), seen("wait_for_launch"), KEEP),
        (claim("tentative", at=LONG_AGO), seen("migrating", "there"), KEEP),
        (claim("tentative", at=LONG_AGO), seen("down", ""), RELEASE),
        (claim("tentative", at=LONG_AGO), seen("up", "there", epoch=3), RELEASE),
        (claim("tentative", at=LONG_AGO), None, RELEASE),
        (claim("tentative"), None, KEEP),
        # A higher epoch overtakes it, except on the same host: a failed move writes a new epoch at the source.
        (claim("tentative"), seen("up", "there", epoch=3), RELEASE),
        (claim("confirmed"), seen("up", epoch=3), KEEP),
    ],
)
def test_what_the_facts_say_of_a_claim(held: Claim, heard: SeenVm | None, verdict: Settling) -> None:
    assert settle(held, heard, NOW, CONFIG)[0] is verdict


def eager(configured: Settings) -> Settings:
    """Settings of a scheduler that believes at once, so that the test need not wait."""
    environ = {"VOLERY_SCHEDULER_SETTLED_SECONDS": "0", "VOLERY_SCHEDULER_CLAIM_SECONDS": "0.5"}
    return dataclasses.replace(configured, environ=environ)


def test_of_two_claims_on_one_host_the_later_holds_the_place() -> None:
    """And an only one stays, however old: a move that failed gives its VM a new epoch at the source."""
    vm_again, old = seen("up", epoch=3), claim("confirmed")
    assert settle(old, vm_again, NOW, CONFIG, replaced=True)[0] is RELEASE
    assert settle(old, vm_again, NOW, CONFIG, replaced=False)[0] is KEEP
    assert settle(old, seen("migrating", epoch=3), NOW, CONFIG, replaced=True)[0] is KEEP


async def test_claims_of_vms_that_ended_moved_or_vanished_are_given_back(configured: Settings) -> None:
    owner, c = inventory(), cluster()
    h1, h2 = host(c.id, name="h1"), host(c.id, name="h2")
    opened: list[Scheduler] = []
    async with running(eager(configured), owner.service(), scheduler(opened)) as bus:
        await owner.says(CLUSTER_CHANGED, c)
        await owner.says(HOST_CHANGED, h1, h2)
        await hosts_known(bus, 2)
        vms = [vm(c.id, name=f"vm{n}", epoch=1) for n in range(5)]
        places = {}
        for each in vms:
            placed = await bus.ask(PLACE, placing(c.id, vm_id=each.id))
            places[each.id] = placed.host_id
            await bus.ask(CONFIRM_CLAIM, ClaimKey(vm_id=each.id, epoch=1))
        ended, moved, vanished, stays, twice = vms
        other = h2.id if places[moved.id] == h1.id else h1.id
        await owner.says(VM_CHANGED, replace(ended, status=VmStatus.DOWN))
        await owner.says(VM_CHANGED, replace(moved, host_id=other, epoch=1))
        await owner.says(VM_CHANGED, replace(vanished, host_id=places[vanished.id]))
        await owner.says(VM_DELETED, replace(vanished, revision=2))
        await owner.says(VM_CHANGED, replace(stays, host_id=places[stays.id]))
        again = placing(c.id, vm_id=twice.id, epoch=2, place={"target_host_id": places[twice.id]})
        assert (await bus.ask(PLACE, again)).claimed
        await owner.says(VM_CHANGED, replace(twice, host_id=places[twice.id], epoch=2))

        async def only_what_is_true() -> bool:
            await settle_claims(opened[0])
            held = {(c.vm_id, c.host_id, c.epoch) for c in await claims(bus)}
            return held == {(stays.id, places[stays.id], 1), (twice.id, places[twice.id], 2)}

        await until(only_what_is_true, 15)
        used = await capacities(bus)
        assert sum(u.memory_used_bytes for u in used.values()) == 2 * (GIB + OVERHEAD)


async def test_an_unconfirmed_claim_expires_and_a_running_vm_without_one_gets_one(
    configured: Settings, database: DatabaseConfig
) -> None:
    owner, c = inventory(), cluster()
    h1 = host(c.id, name="h1")
    opened: list[Scheduler] = []
    async with running(eager(configured), owner.service(), scheduler(opened)) as bus:
        await owner.says(CLUSTER_CHANGED, c)
        await owner.says(HOST_CHANGED, h1)
        await hosts_known(bus, 1)
        await bus.ask(PLACE, placing(c.id))

        async def none() -> bool:
            await settle_claims(opened[0])
            return await claims(bus) == []

        await until(none, 15)
        external = vm(c.id, name="foreign", host_id=h1.id, external=True, memory_bytes=2 * GIB, vcpus=2)
        await owner.says(VM_CHANGED, external)

        async def heard() -> bool:
            async with connected(database) as connection:
                return await connection.fetchval("select count(*) from vm") == 1

        await until(heard)
        async with connected(database) as connection:
            await connection.execute("update vm set heard_at = now() - interval '1 minute'")

        async def adopted() -> bool:
            await adopt_vms(opened[0])
            return [(x.vm_id, x.state) for x in await claims(bus)] == [(external.id, "confirmed")]

        await until(adopted, 15)
        assert (await capacities(bus))[h1.id].memory_used_bytes == 2 * GIB + OVERHEAD


def connected(database: DatabaseConfig) -> contextlib.AbstractAsyncContextManager:
    @contextlib.asynccontextmanager
    async def opened():
        connection = await asyncpg.connect(
            database.dsn, user="scheduler", password="secret", server_settings={"search_path": "scheduler"}
        )
        try:
            yield connection
        finally:
            await connection.close()

    return opened()


async def test_counters_that_drifted_are_set_to_the_sum_of_the_claims(
    configured: Settings, database: DatabaseConfig
) -> None:
    owner, c = inventory(), cluster()
    h1 = host(c.id, name="h1")
    opened: list[Scheduler] = []
    async with running(configured, owner.service(), scheduler(opened)) as bus:
        await owner.says(CLUSTER_CHANGED, c)
        await owner.says(HOST_CHANGED, h1)
        await hosts_known(bus, 1)
        await bus.ask(PLACE, placing(c.id))
        async with connected(database) as connection:
            await connection.execute("update host_capacity set memory_used_bytes = 7, vcpus_used = 70")
        await check_counters(opened[0])
        used = (await capacities(bus))[h1.id]
        assert (used.memory_used_bytes, used.vcpus_used) == (GIB + OVERHEAD, 1)
        await settle_claims(opened[0])
        assert len(await claims(bus)) == 1
