"""Placements while PostgreSQL and NATS are killed: what was answered holds, and nothing more is promised."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator

import asyncpg
import pytest
from msgspec.structs import replace

from tests.scheduler.fleets import (
    GIB,
    MIB,
    OVERHEAD,
    RESERVE,
    cluster,
    host,
    hosts_known,
    inventory,
    placing,
    scheduler,
    until,
)
from tests.support.plane import Plane, plane_servers, running_plane
from volery.contracts.affinity_group import (
    CREATE_AFFINITY_GROUP,
    AffinityGroup,
    AffinityRule,
    CreateAffinityGroup,
)
from volery.contracts.cluster import CLUSTER_CHANGED
from volery.contracts.errors import Kind, Refused
from volery.contracts.host import HOST_CHANGED, HostStatus
from volery.contracts.protection import DESCRIBE_NEEDS, VmNeed, VmNeeds, VmNeedsAnswer
from volery.contracts.scheduling import PLACE, RELEASE_CLAIM, ClaimKey, Place, Placement
from volery.runtime.bus import Bus, Caller
from volery.setup import servers
from volery.setup.embedded import start_nats, start_postgres, stop


@pytest.fixture
def plane() -> Iterator[Plane]:
    with plane_servers() as made:
        made.environ.clear()  # they are the real inventory's; here it is one that says what the test tells it
        yield made


def restart_postgres(plane: Plane) -> None:
    os.kill(plane.postgres.pid, signal.SIGKILL)
    stop(plane.home, "postgres")
    plane.postgres = start_postgres(plane.home)


def restart_nats(plane: Plane) -> None:
    os.kill(plane.nats.pid, signal.SIGKILL)
    stop(plane.home, "nats")
    plane.nats = start_nats(plane.home, servers.nats_options(plane.home))


async def persist(bus: Bus, ask: Place) -> Placement:
    """As inventory asks: the same request until its outcome is known."""
    caller = Caller("service:inventory", f"place-{ask.need.vm_id}", "x")
    while True:
        try:
            return await bus.ask(PLACE, ask, caller)
        except Refused as refused:
            if refused.kind not in (Kind.TIMEOUT, Kind.UNAVAILABLE, Kind.INTERNAL, Kind.EXHAUSTED):
                raise
            await asyncio.sleep(0.1)


async def held(plane: Plane) -> dict[str, tuple[str, int]]:
    """VM → its host and memory, from the claims themselves."""
    password = (plane.home.postgres_passwords / "scheduler.password").read_text().strip()
    connection = await asyncpg.connect(
        plane.settings.database.dsn,
        user="scheduler",
        password=password,
        server_settings={"search_path": "scheduler"},
    )
    try:
        rows = await connection.fetch("select vm_id, host_id, memory_bytes from claim")
    finally:
        await connection.close()
    assert len({r["vm_id"] for r in rows}) == len(rows)
    return {r["vm_id"]: (r["host_id"], r["memory_bytes"]) for r in rows}


async def test_what_was_answered_survives_and_no_host_is_promised_twice(plane: Plane) -> None:
    owner, c = inventory(), cluster(cpu_overcommit_ratio=1000.0)
    room = RESERVE + 12 * (GIB + OVERHEAD) + 100 * MIB
    hosts = [host(c.id, name=f"h{n}", memory_bytes=room) for n in range(3)]
    async with running_plane(plane, owner.service(), scheduler(), scheduler()) as bus:
        await owner.says(CLUSTER_CHANGED, c)
        await owner.says(HOST_CHANGED, *hosts)
        await hosts_known(bus, 3)
        asks = [placing(c.id) for _ in range(60)]
        placements = [asyncio.create_task(persist(bus, ask)) for ask in asks]
        await asyncio.sleep(0.15)
        await asyncio.to_thread(restart_postgres, plane)
        await asyncio.sleep(0.3)
        await asyncio.to_thread(restart_nats, plane)
        answers = await asyncio.gather(*placements)
        claims = await held(plane)
        placed = {a.vm_id: a.host_id for a in answers if a.host_id}
        assert {vm: at for vm, (at, _) in claims.items()} == placed
        assert len(placed) == 36
        for one in hosts:
            taken = sum(memory for at, memory in claims.values() if at == one.id)
            assert taken <= room - RESERVE

        # The fleet in memory follows the tables again, in both replicas.
        freed = next(iter(placed))
        await bus.ask(RELEASE_CLAIM, ClaimKey(vm_id=freed, epoch=1))
        down = next(h for h in hosts if h.id == placed[freed])
        await owner.says(HOST_CHANGED, replace(down, revision=2, status=HostStatus.MAINTENANCE))

        async def nowhere() -> bool:
            ask = placing(c.id, place={"dry_run": True})
            messages = [(await bus.ask(PLACE, ask)).message for _ in range(6)]
            return all(f"{down.name} is maintenance, not up" in message for message in messages)

        await until(nowhere, 20)


async def test_affinity_groups_are_kept_while_postgresql_and_nats_are_killed(plane: Plane) -> None:
    owner, c = inventory(), cluster(cpu_overcommit_ratio=1000.0)
    asks = [placing(c.id) for _ in range(50)]
    apart, together = asks[:25], asks[25:]

    async def needs(_: object, ask: VmNeeds, caller: Caller) -> VmNeedsAnswer:
        return VmNeedsAnswer(vms=tuple(VmNeed(need=a.need) for a in asks if a.need.vm_id in ask.vm_ids))

    owner.answers = [(DESCRIBE_NEEDS, needs)]
    hosts = [host(c.id, name=f"h{n}", memory_bytes=40 * (GIB + OVERHEAD)) for n in range(10)]
    async with running_plane(plane, owner.service(), scheduler(), scheduler()) as bus:
        await owner.says(CLUSTER_CHANGED, c)
        await owner.says(HOST_CHANGED, *hosts)
        await hosts_known(bus, 10)

        async def group(name: str, rule: AffinityRule, members: list[Place]) -> AffinityGroup:
            vm_ids = tuple(a.need.vm_id for a in members)
            ask = CreateAffinityGroup(name=name, cluster_id=c.id, vm_ids=vm_ids, vm_rule=rule)
            return await bus.ask(CREATE_AFFINITY_GROUP, ask, Caller("user:ann", name, "x"))

        await group("spread", AffinityRule.NEGATIVE, apart)
        await group("some", AffinityRule.POSITIVE, together[:13])
        await group("more", AffinityRule.POSITIVE, together[12:])
        placements = [asyncio.create_task(persist(bus, ask)) for ask in asks]
        await asyncio.sleep(0.1)
        await asyncio.to_thread(restart_postgres, plane)
        await asyncio.sleep(0.2)
        await asyncio.to_thread(restart_nats, plane)
        answers = await asyncio.gather(*placements)
        at = {vm_id: host_id for vm_id, (host_id, _) in (await held(plane)).items()}
        assert at == {a.vm_id: a.host_id for a in answers if a.host_id}
        spread = [at[a.need.vm_id] for a in apart if a.need.vm_id in at]
        assert len(spread) == len(set(spread)) == 10
        assert len({at[a.need.vm_id] for a in together}) == 1
