"""NUMA cells through the service: claims of pinned nodes hold them, no race exceeds them, and what is given back is free."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import asyncpg
from msgspec.structs import replace

from services.scheduler.cells import CellNeed, Taken, needs_of
from services.scheduler.reconcile import adopt_vms, check_counters
from services.scheduler.state import Scheduler
from tests.scheduler.fleets import (
    GIB,
    MIB,
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
from volery.contracts.domain import NumaMode, NumaNode
from volery.contracts.host import HOST_CHANGED, Host
from volery.contracts.scheduling import PLACE, RELEASE_VM_CLAIMS, CellClaim, Place, ReleaseVm
from volery.contracts.vm import VM_CHANGED
from volery.runtime.config import DatabaseConfig
from volery.runtime.programs import Settings


def host_of(cluster_id: str, name: str, *gib: int, pages: int = 0) -> Host:
    """Cells of so many GiB each with 8 CPUs, the first with huge pages of 2 MiB."""
    cells = tuple(
        NumaCell(
            cell=number, memory_bytes=size * GIB, cpus=tuple(range(8 * number, 8 * number + 8)),
            huge_pages=(HugePages(page_kib=2048, count=pages),) if pages and not number else (),
        )
        for number, size in enumerate(gib)
    )  # fmt: skip
    capabilities = HostCapabilities(memory_bytes=64 * GIB, cpus=64, machines=("q35",), numa=cells)
    return host(cluster_id, name=name, capabilities=capabilities)


def pinned(
    gib: int, *cells: int, mode: NumaMode = NumaMode.STRICT, vcpus: tuple[int, ...] = (0,)
) -> NumaNode:
    return NumaNode(memory_bytes=gib * GIB, vcpus=vcpus, host_cells=cells, mode=mode)


def asking(cluster_id: str, *nodes: NumaNode, **need: Any) -> Place:
    memory = sum(node.memory_bytes for node in nodes)
    return placing(cluster_id, memory_bytes=memory, vcpus=len(nodes), numa_nodes=nodes, **need)


@asynccontextmanager
async def connected(database: DatabaseConfig) -> AsyncIterator[asyncpg.Connection]:
    connection = await asyncpg.connect(
        database.dsn, user="scheduler", password="secret", server_settings={"search_path": "scheduler"}
    )
    try:
        yield connection
    finally:
        await connection.close()


async def used(database: DatabaseConfig) -> list[tuple[int, int]]:
    """GiB and huge pages that are used, cell by cell."""
    async with connected(database) as connection:
        records = await connection.fetch(
            "select memory_used_bytes, pages_2m_used from host_cell order by host_id, cell"
        )
    return [(r[0] // GIB, r[1]) for r in records]


def test_what_nodes_take_of_cells() -> None:
    """A strict one all from its cell, an interleaved one whole pages from each; others nothing."""
    nodes = (
        pinned(2, 1, vcpus=(0, 1, 2)),
        pinned(1, 1, vcpus=(3,)),
        pinned(3, 0, 1, mode=NumaMode.INTERLEAVE, vcpus=(4,)),
        pinned(5, 0, mode=NumaMode.PREFERRED, vcpus=(5,)),
        pinned(7, vcpus=(6,)),
    )
    half = 3 * GIB // 2
    assert needs_of(nodes, 0) == (CellNeed(0, Taken(half), 0), CellNeed(1, Taken(3 * GIB + half), 3))
    assert needs_of(nodes[:1], 2048) == (CellNeed(1, Taken(0, 1024, 0), 3),)
    odd = NumaNode(memory_bytes=3 * 2 * MIB, vcpus=(0,), host_cells=(0, 1), mode=NumaMode.INTERLEAVE)
    assert needs_of([odd], 2048) == (CellNeed(0, Taken(0, 2, 0)), CellNeed(1, Taken(0, 2, 0)))
    byte = NumaNode(memory_bytes=MIB, vcpus=(0,), host_cells=(0, 1, 2), mode=NumaMode.INTERLEAVE)
    assert needs_of([byte], 0)[0].taken.memory_bytes == 86 * 4096


async def test_parallel_starts_through_two_replicas_never_take_more_of_a_cell_than_it_has(
    configured: Settings, database: DatabaseConfig
) -> None:
    owner, c = inventory(), cluster()
    async with running(configured, owner.service(), scheduler(), scheduler()) as bus:
        await owner.says(CLUSTER_CHANGED, c)
        await owner.says(HOST_CHANGED, *(host_of(c.id, f"h{n}", 8, 5, pages=1024) for n in range(2)))
        await hosts_known(bus, 2)
        asks = [asking(c.id, pinned(2, 0)) for _ in range(12)]
        asks += [asking(c.id, pinned(1, 0), pinned(2, 1, vcpus=(1,))) for _ in range(12)]
        asks += [asking(c.id, pinned(1, 0), hugepage_kib=2048) for _ in range(8)]
        placed = await asyncio.gather(*(bus.ask(PLACE, ask) for ask in asks))
        for memory, pages in (await used(database))[::2]:
            assert memory <= 6, "of 8 GiB two are in huge pages"
            assert pages <= 1024
        assert all(memory <= 5 for memory, _ in (await used(database))[1::2])
        assert sum(p.claimed for p in placed[24:]) == 4
        refused = next(p for p in placed if not p.claimed)
        assert "numa" in refused.excluded_by
        assert "nodes pinned to NUMA cell" in refused.message
        held = [claim for claim in await claims(bus) if len(claim.cells) == 2]
        assert all(
            claim.cells == (CellClaim(cell=0, memory_bytes=GIB), CellClaim(cell=1, memory_bytes=2 * GIB))
            for claim in held
        )
        for ask in asks:
            await bus.ask(RELEASE_VM_CLAIMS, ReleaseVm(vm_id=ask.need.vm_id))
        assert await used(database) == [(0, 0)] * 4
        again = await asyncio.gather(*(bus.ask(PLACE, asking(c.id, pinned(5, 1))) for _ in range(4)))
        assert sum(p.claimed for p in again) == 2
        other = await bus.ask(PLACE, asking(c.id, pinned(2, 0)))
        assert other.claimed, "what is strange to a cell doesn't fill it"
        missing = await bus.ask(PLACE, asking(c.id, pinned(1, 3)))
        assert "has no NUMA cell 3" in missing.message


async def test_nodes_of_their_own_prefer_hosts_whose_cells_hold_them_whole(configured: Settings) -> None:
    """Six cells of 4 GiB are as much as two of 12, but not for nodes of 6."""
    owner, c = inventory(), cluster()
    small, large = host_of(c.id, "a", 4, 4, 4, 4, 4, 4), host_of(c.id, "b", 12, 12)
    async with running(configured, owner.service(), scheduler()) as bus:
        await owner.says(CLUSTER_CHANGED, c)
        await owner.says(HOST_CHANGED, small, large)
        await hosts_known(bus, 2)
        for _ in range(2):
            placed = await bus.ask(PLACE, asking(c.id, pinned(6), pinned(6, vcpus=(1,))))
            assert placed.host_id == large.id, "also when it is the fuller one"
        assert placed.hosts[0].weights["numa_match"] == 5
        assert placed.hosts[1].weights["numa_match"] == 0


async def test_cells_that_go_and_counters_that_drift_are_seen(
    configured: Settings, database: DatabaseConfig
) -> None:
    owner, c = inventory(), cluster()
    h1 = host_of(c.id, "h1", 8, 8)
    opened: list[Scheduler] = []
    async with running(configured, owner.service(), scheduler(opened)) as bus:
        await owner.says(CLUSTER_CHANGED, c)
        await owner.says(HOST_CHANGED, h1)
        await hosts_known(bus, 1)
        ask = asking(c.id, pinned(4, 1))
        assert (await bus.ask(PLACE, ask)).claimed
        async with connected(database) as connection:
            await connection.execute("update host_cell set memory_used_bytes = 7 where cell = 1")
            await connection.execute(
                "insert into claim_cell (claim_id, host_id, cell, memory_bytes, pages_2m, pages_1g)"
                f" values ('gone', '{h1.id}', 0, 5, 5, 5)"
            )
            await check_counters(opened[0])
            assert await used(database) == [(0, 0), (4, 0)]
            assert await connection.fetchval("select count(*) from claim_cell") == 1

        async def refused(words: str) -> bool:
            return words in (await bus.ask(PLACE, asking(c.id, pinned(5, 1)))).message

        await until(lambda: refused("leave 4.0 GiB of memory"))
        await owner.says(HOST_CHANGED, replace(host_of(c.id, "h1", 8), id=h1.id, revision=2))
        await until(lambda: refused("has no NUMA cell 1"))
        await owner.says(
            HOST_CHANGED, h1, host(c.id, name="h2")
        )  # an older word, and one to see that it was heard
        await hosts_known(bus, 2)
        assert await refused("has no NUMA cell 1")
        await owner.says(HOST_CHANGED, replace(host_of(c.id, "h1", 8, 1), id=h1.id, revision=3))
        await until(lambda: refused("leave 1.0 GiB of memory"))
        await check_counters(opened[0])
        await until(lambda: refused("leave 0 MiB of memory"))


async def test_who_runs_without_a_claim_gets_one_with_its_cells(
    configured: Settings, database: DatabaseConfig
) -> None:
    """Also beyond what a cell has: what is used is used."""
    owner, c = inventory(), cluster()
    h1 = host_of(c.id, "h1", 8, 2)
    opened: list[Scheduler] = []
    async with running(configured, owner.service(), scheduler(opened)) as bus:
        await owner.says(CLUSTER_CHANGED, c)
        await owner.says(HOST_CHANGED, h1)
        await hosts_known(bus, 1)
        nodes = (pinned(1, 0), pinned(3, 1, vcpus=(1,)))
        await owner.says(VM_CHANGED, vm(c.id, host_id=h1.id, memory_bytes=4 * GIB, vcpus=2, numa_nodes=nodes))
        async with connected(database) as connection:
            await until(lambda: connection.fetchval("select count(*) from vm"))
            await connection.execute("update vm set heard_at = heard_at - interval '60 seconds'")
        await adopt_vms(opened[0])
        assert await used(database) == [(1, 0), (3, 0)]
        (claim,) = await claims(bus)
        assert [cell.memory_bytes for cell in claim.cells] == [GIB, 3 * GIB]


async def test_a_start_that_takes_the_cell_of_a_promise_is_refused(configured: Settings) -> None:
    owner = inventory()
    c = cluster(reserve_host_failures=1, admission_control=AdmissionControl.ENFORCE)
    async with running(configured, owner.service(), scheduler()) as bus:
        await owner.says(CLUSTER_CHANGED, c)
        await owner.says(HOST_CHANGED, *(host_of(c.id, f"h{n}", 8, 8) for n in range(2)))
        await hosts_known(bus, 2)
        first, second = (
            asking(c.id, pinned(6, 0), name=name, high_availability=True) for name in ("db", "web")
        )
        assert (await bus.ask(PLACE, first)).claimed
        for available in (True, False):
            need = replace(second.need, high_availability=available)
            refused = await bus.ask(PLACE, replace(second, need=need))
            assert not refused.claimed
            assert "would break a promise" in refused.message
            assert "nodes pinned to NUMA cell 0" in refused.message
        assert (await bus.ask(PLACE, asking(c.id, pinned(6, 1), name="app", high_availability=True))).claimed
