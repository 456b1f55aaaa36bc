"""Rules about what hosts and clusters can bear: guests, load, swapping, maintenance of a cluster."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import asyncpg
from msgspec.structs import replace

from services.scheduler.config import SchedulerConfig
from services.scheduler.figures import HostFigures, Measured
from services.scheduler.fleet import Fleet
from services.scheduler.model import ClusterPolicy
from services.scheduler.policies.decision import decide, explain
from services.scheduler.policies.request import request
from services.scheduler.reconcile import check_counters
from services.scheduler.state import Scheduler
from tests.scheduler.fleets import (
    GIB,
    cluster,
    host,
    hosts_known,
    inventory,
    placing,
    scheduler,
    until,
)
from tests.support.runtime import running
from volery.contracts.base import encode
from volery.contracts.cluster import CLUSTER_CHANGED, Balance
from volery.contracts.host import HOST_CHANGED
from volery.contracts.metrics import HostSample
from volery.contracts.scheduling import PLACE, RELEASE_CLAIM, ClaimKey, Need, Place, Placement, Purpose
from volery.runtime.bus import Bus
from volery.runtime.config import DatabaseConfig
from volery.runtime.programs import Settings

OVERLOADING = SchedulerConfig(overload_seconds=120.0)
MIB = 1024**2


def fleet_of(**changed: dict[str, Any]) -> Fleet:
    fleet = Fleet()
    for name, fields in changed.items():
        made: dict[str, Any] = {
            "id": name, "name": name, "cluster_id": "a", "status": "up", "cpus": 8, "memory_bytes": 16 * GIB,
            "memory_limit_bytes": 16 * GIB, "memory_used_bytes": 0, "vcpus_limit": 80, "vcpus_used": 0,
        }  # fmt: skip
        fleet.put(HostFigures(**(made | fields)))
    return fleet


def asking(purpose: Purpose = Purpose.START, **need: Any) -> Place:
    made: dict[str, Any] = {"vm_id": "vm", "cluster_id": "a", "memory_bytes": GIB, "vcpus": 1, "name": "web"}
    return Place(need=Need(**(made | need)), epoch=1, purpose=purpose)


def against(
    fleet: Fleet, place: Place, policy: ClusterPolicy | None = None, *, now: float = 0.0,
    config: SchedulerConfig = OVERLOADING,
) -> dict[str, str]:  # fmt: skip
    """Rule → what it says, of the first host."""
    asked = request(place, policy or ClusterPolicy("a", "Default"), config, now=now)
    first = explain(fleet, asked, decide(fleet, asked))[0]
    return {v.rule: v.message for v in first.verdicts}


def best(fleet: Fleet, place: Place, policy: ClusterPolicy) -> str:
    row = decide(fleet, request(place, policy, SchedulerConfig())).best
    assert row is not None
    return fleet.ids[row]


def test_a_host_is_overloaded_once_every_sample_of_two_minutes_was_high() -> None:
    fleet = fleet_of(h1={})
    for at in (10.0, 70.0, 130.0):
        fleet.sample("h1", Measured(90.0, busy=True, at=at))
    assert against(fleet, asking(), now=129.9) == {}
    said = against(fleet, asking(), now=130.0)
    assert said == {"cpu_overload": "the CPUs of h1 have been 80% busy or more for 120 s (now 90 %)"}
    assert against(fleet, asking(Purpose.RESTART), now=130.0) == {}
    assert against(fleet, asking(), now=130.0, config=SchedulerConfig()) == {}
    fleet.sample("h1", Measured(20.0, busy=False, at=140.0))
    fleet.sample("h1", Measured(90.0, busy=True, at=150.0))
    assert against(fleet, asking(), now=200.0) == {}


def test_a_host_that_swaps_beyond_its_memory_gets_no_vm() -> None:
    fleet = fleet_of(h1={})
    fleet.sample("h1", Measured(0.0, swapped_bytes=100 * MIB))
    assert against(fleet, asking()) == {"swap": "h1 has swapped out 100 MiB more than it has memory for"}
    assert against(fleet, asking(), config=SchedulerConfig(swap_percent=1.0)) == {}


def test_a_cluster_in_maintenance_starts_only_highly_available_vms() -> None:
    fleet, closed = fleet_of(h1={}), ClusterPolicy("a", "Default", balance=Balance.CLUSTER_MAINTENANCE)
    assert against(fleet, asking(), closed).keys() == {"cluster_maintenance"}
    assert against(fleet, asking(high_availability=True), closed) == {}
    assert against(fleet, asking(Purpose.MIGRATE), closed) == {}
    assert against(fleet, asking(Purpose.RESTART), closed) == {}


def test_guests_are_spread_by_their_number_and_highly_available_ones_among_themselves() -> None:
    fleet = fleet_of(
        few={"guests": 2, "ha_guests": 2, "memory_used_bytes": 8 * GIB}, many={"guests": 3, "ha_guests": 0}
    )
    evenly = ClusterPolicy("a", balance=Balance.VM_EVENLY_DISTRIBUTED)
    assert best(fleet, asking(), evenly) == "few"
    assert best(fleet, asking(), ClusterPolicy("a")) == "many"
    reserving = ClusterPolicy("a", balance=Balance.POWER_SAVING, reserve_host_failures=1)
    assert best(fleet, asking(), reserving) == "few"
    assert best(fleet, asking(high_availability=True), reserving) == "many"
    assert best(fleet, asking(high_availability=True), replace_reserve(reserving, 0)) == "few"


def replace_reserve(policy: ClusterPolicy, failures: int) -> ClusterPolicy:
    return ClusterPolicy(policy.id, balance=policy.balance, reserve_host_failures=failures)


async def test_guests_are_counted_where_capacity_is_taken_and_given_back(
    configured: Settings, database: DatabaseConfig
) -> None:
    owner = inventory()
    c = cluster(balance=Balance.VM_EVENLY_DISTRIBUTED, reserve_host_failures=1)
    hosts = [host(c.id, name=f"h{n}", memory_bytes=(8 << n) * GIB) for n in range(3)]
    opened: list[Scheduler] = []
    async with running(configured, owner.service(), scheduler(opened)) as bus:
        await owner.says(CLUSTER_CHANGED, c)
        await owner.says(HOST_CHANGED, *hosts)
        await hosts_known(bus, 3)
        asks = [placing(c.id, high_availability=n % 2 == 0) for n in range(6)]
        placed = [await bus.ask(PLACE, ask) for ask in asks]
        assert sorted(p.host_id for p in placed) == sorted([h.id for h in hosts] * 2)

        connection = await asyncpg.connect(
            database.dsn, user="scheduler", password="secret", server_settings={"search_path": "scheduler"}
        )

        async def counted() -> dict[str, tuple[int, int]]:
            rows = await connection.fetch("select id, guests, ha_guests from host_capacity")
            return {r["id"]: (r["guests"], r["ha_guests"]) for r in rows}

        def expected(left: list[int]) -> dict[str, tuple[int, int]]:
            there = {h.id: [n for n in left if placed[n].host_id == h.id] for h in hosts}
            return {h: (len(ns), sum(n % 2 == 0 for n in ns)) for h, ns in there.items()}

        assert await counted() == expected(list(range(6)))
        await bus.ask(RELEASE_CLAIM, ClaimKey(vm_id=asks[0].need.vm_id, epoch=1))
        moved = replace(asks[1], epoch=2, purpose=Purpose.RESTART, target_host_id=placed[1].host_id)
        assert (await bus.ask(PLACE, moved)).claimed
        assert await counted() == expected([1, 2, 3, 4, 5])

        # As the previous release would have left them.
        await connection.execute("update host_capacity set guests = 0, ha_guests = 9")
        await check_counters(opened[0])
        assert await counted() == expected([1, 2, 3, 4, 5])
        await connection.close()
        await opened[0].read_used()
        figures = opened[0].fleet
        assert {h: (int(figures.ints("guests")[r]), int(figures.ints("ha_guests")[r])) for h, r in figures.rows.items()} \
            == expected([1, 2, 3, 4, 5])  # fmt: skip


async def test_a_measured_host_that_swaps_is_left_out_and_the_refusal_says_what_would_help(
    configured: Settings,
) -> None:
    owner, c = inventory(), cluster()
    h1 = host(c.id, name="h1")
    async with running(configured, owner.service(), scheduler()) as bus:
        await owner.says(CLUSTER_CHANGED, c)
        await owner.says(HOST_CHANGED, h1)
        await hosts_known(bus, 1)
        sample = HostSample(
            host_id=h1.id, boot_id="b", at=datetime.now(UTC), memory_bytes=16 * GIB,
            memory_used_bytes=15 * GIB, swap_used_bytes=3 * GIB,
        )  # fmt: skip
        await bus.client.publish(f"metrics.host.{h1.id}", encode(sample))

        async def refused() -> Placement | None:
            answer = await bus.ask(PLACE, placing(c.id, place={"dry_run": True}))
            return None if answer.host_id else answer

        said: Placement = await until(refused)
        assert said.excluded_by == {"swap": 1}
        assert [(r.kind, r.changes[0].field, r.changes[0].amount) for r in said.remedies] == [
            ("host", "swapped_bytes", 2 * GIB)
        ]
        await _relieved(bus, replace(sample, swap_used_bytes=GIB), c.id)


async def _relieved(bus: Bus, sample: HostSample, cluster_id: str) -> None:
    await bus.client.publish(f"metrics.host.{sample.host_id}", encode(sample))

    async def placed() -> bool:
        return bool((await bus.ask(PLACE, placing(cluster_id, place={"dry_run": True}))).host_id)

    await until(placed)
