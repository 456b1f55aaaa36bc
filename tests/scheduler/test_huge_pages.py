"""Huge pages through the service: claims hold them, no race exceeds them, and what is given back is free again."""

from __future__ import annotations

import asyncio

import asyncpg
import pytest
from msgspec.structs import replace

from services.scheduler.pages import NO_PAGES, Pages, pages_taken, too_many, total
from services.scheduler.reconcile import adopt_vms, check_counters
from services.scheduler.state import Scheduler
from tests.scheduler.fleets import (
    GIB,
    MIB,
    OVERHEAD,
    RESERVE,
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
from volery.contracts.agent import HostCapabilities, HugePages, NumaCell
from volery.contracts.cluster import CLUSTER_CHANGED, AdmissionControl
from volery.contracts.errors import Kind, Refused
from volery.contracts.host import HOST_CHANGED, Host
from volery.contracts.scheduling import PLACE, RELEASE_VM_CLAIMS, ReleaseVm
from volery.contracts.vm import VM_CHANGED
from volery.runtime.config import DatabaseConfig
from volery.runtime.programs import Settings


def backed_host(cluster_id: str, name: str, small: int, large: int = 0) -> Host:
    """16 GiB in two cells, with pages in both."""
    cells = (
        NumaCell(cell=0, memory_bytes=8 * GIB, huge_pages=(HugePages(page_kib=2048, count=small // 2),)),
        NumaCell(
            cell=1,
            memory_bytes=8 * GIB,
            huge_pages=(
                HugePages(page_kib=2048, count=small - small // 2),
                HugePages(page_kib=1048576, count=large),
                HugePages(page_kib=65536, count=5),
            ),
        ),
    )
    capabilities = HostCapabilities(memory_bytes=16 * GIB, cpus=64, machines=("q35",), numa=cells)
    return host(cluster_id, name=name, capabilities=capabilities)


def test_pages_are_whole_and_of_one_size() -> None:
    assert pages_taken(GIB, 0) == NO_PAGES
    assert pages_taken(GIB, 2048) == Pages(512, 0)
    assert pages_taken(GIB + 1, 1048576) == Pages(0, 2)
    assert Pages(3, 2).memory_bytes == 6 * MIB + 2 * GIB
    assert (Pages(3).page_kib, Pages(0, 1).page_kib, NO_PAGES.page_kib) == (2048, 1048576, 0)
    assert total([Pages(1, 2), Pages(3, 4)]) == Pages(4, 6)
    assert total([]) == NO_PAGES
    assert not too_many(Pages(0, 2), Pages(-5, 2))
    assert too_many(Pages(1, 0), Pages(0, 9))


async def test_parallel_starts_through_two_replicas_never_take_more_pages_than_there_are(
    configured: Settings, database: DatabaseConfig
) -> None:
    owner, c = inventory(), cluster()
    hosts = [backed_host(c.id, f"h{n}", 1024, 2) for n in range(2)]
    async with running(configured, owner.service(), scheduler(), scheduler()) as bus:
        await owner.says(CLUSTER_CHANGED, c)
        await owner.says(HOST_CHANGED, *hosts)
        known = await hosts_known(bus, 2)
        ordinary = 16 * GIB - 4 * GIB
        assert {(k.memory_bytes, k.pages_2m, k.pages_1g) for k in known.values()} == {
            (ordinary - RESERVE, 1024, 2)
        }
        asks = [placing(c.id, memory_bytes=512 * MIB, hugepage_kib=2048) for _ in range(40)]
        asks += [placing(c.id, memory_bytes=GIB, hugepage_kib=1048576) for _ in range(20)]
        placed = await asyncio.gather(*(bus.ask(PLACE, ask) for ask in asks))
        assert sum(p.claimed for p in placed[:40]) == 8
        assert sum(p.claimed for p in placed[40:]) == 4
        refused = next(p for p in placed if not p.claimed)
        assert refused.excluded_by == {"huge_pages": 2}
        assert "1024 of the 1024 huge pages of 2 MiB of h0 are taken, VM web needs 256" in refused.message

        async with asyncpg.create_pool(
            database.dsn, user="scheduler", password="secret", server_settings={"search_path": "scheduler"}
        ) as pool:
            held = await pool.fetch(
                """select sum((doc::json ->> 'pages_2m')::int) as small, sum((doc::json ->> 'pages_1g')::int) as large,
                          sum((doc::json ->> 'memory_bytes')::bigint) as memory from claim group by host_id"""
            )
        assert [(r["small"], r["large"]) for r in held] == [(1024, 2)] * 2
        assert sum(r["memory"] for r in held) == 12 * OVERHEAD
        used = await capacities(bus)
        assert [(u.pages_2m_used, u.pages_1g_used) for u in used.values()] == [(1024, 2)] * 2
        assert (await bus.ask(PLACE, placing(c.id))).claimed, "ordinary memory is left"

        first = next(ask for ask, answer in zip(asks, placed, strict=True) if answer.claimed)
        await bus.ask(RELEASE_VM_CLAIMS, ReleaseVm(vm_id=first.need.vm_id))
        assert (await bus.ask(PLACE, placing(c.id, memory_bytes=512 * MIB, hugepage_kib=2048))).claimed
        with pytest.raises(Refused, match="pages of 4 KiB") as bad:
            await bus.ask(PLACE, placing(c.id, hugepage_kib=4))
        assert bad.value.kind is Kind.INVALID


async def test_what_a_host_sets_aside_later_or_has_lost_since_counts_from_then_on(
    configured: Settings, database: DatabaseConfig
) -> None:
    owner, c = inventory(), cluster()
    h1 = backed_host(c.id, "h1", 512)
    async with running(configured, owner.service(), scheduler()) as bus:
        await owner.says(CLUSTER_CHANGED, c)
        await owner.says(HOST_CHANGED, h1)
        await hosts_known(bus, 1)
        assert (await bus.ask(PLACE, placing(c.id, memory_bytes=GIB, hugepage_kib=2048))).claimed
        fewer = replace(backed_host(c.id, "h1", 100), id=h1.id, revision=2)
        await owner.says(HOST_CHANGED, fewer)

        async def counted(pages: int) -> bool:
            return (await capacities(bus))[h1.id].pages_2m == pages

        await until(lambda: counted(100))
        refused = await bus.ask(PLACE, placing(c.id, memory_bytes=2 * MIB, hugepage_kib=2048))
        assert "512 of the 100 huge pages of 2 MiB of h1 are taken" in refused.message
        assert (await bus.ask(PLACE, placing(c.id))).claimed, "who asks for none isn't refused for them"

        # As the previous release would have left it, which knows no pages: the same revision says it again.
        connection = await asyncpg.connect(
            database.dsn, user="scheduler", password="secret", server_settings={"search_path": "scheduler"}
        )
        await connection.execute("update host_capacity set pages_2m = 0, memory_bytes = 1")
        await connection.close()
        await until(lambda: counted(0))
        await owner.says(HOST_CHANGED, fewer)
        await until(lambda: counted(100))


async def test_who_runs_without_a_claim_gets_one_with_its_pages_and_drifted_counters_are_set_right(
    configured: Settings, database: DatabaseConfig
) -> None:
    owner, c = inventory(), cluster()
    h1 = backed_host(c.id, "h1", 1024)
    opened: list[Scheduler] = []
    async with running(configured, owner.service(), scheduler(opened)) as bus:
        await owner.says(CLUSTER_CHANGED, c)
        await owner.says(HOST_CHANGED, h1)
        await hosts_known(bus, 1)
        stranger = vm(c.id, host_id=h1.id, external=True, hugepage_kib=2048)
        await owner.says(VM_CHANGED, stranger)
        connection = await asyncpg.connect(
            database.dsn, user="scheduler", password="secret", server_settings={"search_path": "scheduler"}
        )
        try:
            await until(lambda: connection.fetchval("select count(*) from vm"))
            await connection.execute("update vm set heard_at = heard_at - interval '60 seconds'")
            await adopt_vms(opened[0])
            (claim,) = await claims(bus)
            assert (claim.pages_2m, claim.memory_bytes) == (512, OVERHEAD)
            assert (await capacities(bus))[h1.id].pages_2m_used == 512
            await connection.execute("update host_capacity set pages_2m_used = 7, pages_1g_used = 9")
        finally:
            await connection.close()
        await check_counters(opened[0])
        used = (await capacities(bus))[h1.id]
        assert (used.pages_2m_used, used.pages_1g_used) == (512, 0)


async def test_a_start_that_takes_the_pages_of_a_promise_is_refused(configured: Settings) -> None:
    """Memory is there for both on either host; pages for one only."""
    owner = inventory()
    c = cluster(reserve_host_failures=1, admission_control=AdmissionControl.ENFORCE)
    hosts = [backed_host(c.id, f"h{n}", 512) for n in range(2)]
    async with running(configured, owner.service(), scheduler()) as bus:
        await owner.says(CLUSTER_CHANGED, c)
        await owner.says(HOST_CHANGED, *hosts)
        await hosts_known(bus, 2)
        asks = [
            placing(c.id, name=name, high_availability=True, memory_bytes=GIB, hugepage_kib=2048)
            for name in ("db", "web")
        ]
        assert (await bus.ask(PLACE, asks[0])).claimed
        second = await bus.ask(PLACE, asks[1])
        assert not second.claimed
        assert "would break a promise" in second.message
        assert "huge pages of 2 MiB" in second.message
        assert (await bus.ask(PLACE, placing(c.id, high_availability=True))).claimed
