"""VMs that are resized to their hosts, on a real bus and database: what claims hold, give back, and refuse to others."""

from __future__ import annotations

import asyncio
from typing import Any

import asyncpg
import msgspec
from msgspec.structs import replace

from services.scheduler.reconcile import adopt_vms
from services.scheduler.state import Scheduler
from tests.scheduler.fleets import (
    GIB,
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
from tests.scheduler.test_claims_settle import connected, eager
from tests.scheduler.test_cpu_claims import DEDICATED, built, fleet, given_twice
from tests.scheduler.test_cpus import machine
from tests.scheduler.test_placing import claims
from tests.scheduler.test_promise_story import promising
from tests.support.runtime import running
from volery.contracts.agent import HostCapabilities, NumaCell
from volery.contracts.cluster import CLUSTER_CHANGED, Cluster
from volery.contracts.cpus import CpuPinning, PinningPolicy
from volery.contracts.domain import NumaNode
from volery.contracts.errors import Refused
from volery.contracts.host import HOST_CHANGED, Host
from volery.contracts.licence import LICENCE_REPORT, AskLicenceReport
from volery.contracts.resizing import VmShape
from volery.contracts.scheduling import PLACE, RELEASE_VM_CLAIMS, Need, Place, Purpose, ReleaseVm
from volery.contracts.vm import VM_CHANGED
from volery.runtime.config import DatabaseConfig
from volery.runtime.programs import Settings

RESIZE = CpuPinning(policy=PinningPolicy.RESIZE_AND_PIN)


def with_cells(c: Cluster, name: str, cores: int = 4) -> Host:
    """Two sockets, each a cell of eight CPUs and 8 GiB."""
    capabilities = HostCapabilities(
        memory_bytes=64 * GIB, cpus=4 * cores, machines=("q35",), cores=machine(2, cores, 2),
        numa=tuple(
            NumaCell(cell=n, cpus=tuple(range(n * 2 * cores, (n + 1) * 2 * cores)), memory_bytes=8 * GIB) for n in range(2)
        ),
    )  # fmt: skip
    return host(c.id, name=name, capabilities=capabilities)


async def of_cells(database: DatabaseConfig) -> list[tuple[int, int]]:
    connection = await asyncpg.connect(
        database.dsn, user="scheduler", password="secret", server_settings={"search_path": "scheduler"}
    )
    rows = await connection.fetch("select cell, memory_used_bytes from host_cell order by host_id, cell")
    await connection.close()
    return [tuple(row) for row in rows]


async def test_a_claim_holds_what_the_host_gives_and_gives_it_back(
    configured: Settings, database: DatabaseConfig
) -> None:
    c = cluster()
    async with fleet(configured, c, with_cells(c, "h1")) as bus:
        ask = placing(c.id, vcpus=1, memory_bytes=4 * GIB, cpu_pinning=RESIZE)
        placed = await bus.ask(PLACE, ask)
        assert placed.cpus is not None, placed.message
        assert placed.shape is not None
        assert (placed.shape.vcpus, placed.shape.sockets, placed.shape.cores, placed.shape.threads) == (
            12,
            2,
            3,
            2,
        )
        left = {0, 8, 4, 12}  # the first core of each socket
        assert {cpu for (cpu,) in placed.cpus.pins} == set(range(16)) - left
        (claim,) = await claims(bus)
        assert (claim.vcpus, claim.shape, claim.cpus) == (12, placed.shape, placed.cpus)
        assert [(cell.cell, cell.memory_bytes) for cell in claim.cells] == [(0, 2 * GIB), (1, 2 * GIB)]
        (capacity,) = (await capacities(bus)).values()
        assert capacity.vcpus_used == 12
        assert await of_cells(database) == [(0, 2 * GIB), (1, 2 * GIB)]

        repeat = await bus.ask(PLACE, ask)
        assert (repeat.shape, repeat.cpus) == (placed.shape, placed.cpus)
        (use,) = (await bus.ask(LICENCE_REPORT, AskLicenceReport())).items
        assert (use.policy, set(use.cpus), use.exclusive, use.cores, use.sockets) == (
            "resize_and_pin", set(range(16)) - left, (), 6, 2,
        )  # fmt: skip

        other = await bus.ask(PLACE, placing(c.id, vcpus=4, cpu_pinning=DEDICATED))
        assert other.cpus is not None
        assert set(other.cpus.exclusive) == left, "nobody gets a CPU alone that it is pinned to"
        assert await given_twice(database) == []
        await bus.ask(RELEASE_VM_CLAIMS, ReleaseVm(vm_id=ask.need.vm_id))
        (capacity,) = (await capacities(bus)).values()
        assert capacity.vcpus_used == 4
        assert await of_cells(database) == [(0, 0), (1, 0)]
        (use, _) = (await bus.ask(LICENCE_REPORT, AskLicenceReport())).items
        assert use.until is not None


async def test_it_moves_to_a_host_that_is_built_the_same_and_to_no_other(configured: Settings) -> None:
    c = cluster()
    hosts = {name: with_cells(c, name, cores) for name, cores in (("h1", 4), ("h2", 4), ("h3", 6))}
    async with fleet(configured, c, *hosts.values()) as bus:
        ask = placing(c.id, vcpus=1, cpu_pinning=RESIZE, place={"target_host_id": hosts["h1"].id})
        placed = await bus.ask(PLACE, ask)

        def moved(epoch: int, **place: Any) -> Any:
            return placing(
                c.id, epoch=epoch, vm_id=ask.need.vm_id, vcpus=1, cpu_pinning=RESIZE, shape=placed.shape,
                place={"purpose": Purpose.MIGRATE, "excluded_host_ids": (hosts["h1"].id,), **place},
            )  # fmt: skip

        refused = await bus.ask(PLACE, moved(2, target_host_id=hosts["h3"].id))
        assert not refused.host_id
        assert (
            "h3 would give VM web 20 vCPUs (2 x 5 x 2, in NUMA cells 0, 1), and VM web runs with 12 vCPUs "
            "(2 x 3 x 2, in NUMA cells 0, 1), which can't change while it runs"
        ) in refused.message
        there = await bus.ask(PLACE, moved(3))
        assert there.host_id == hosts["h2"].id
        assert there.shape == placed.shape


async def test_many_at_once_never_get_more_than_a_host_may_promise(configured: Settings) -> None:
    """Of twenty that start together on three replicas, each with six vCPUs and one of its own, as many are placed as fit."""
    c = cluster(cpu_overcommit_ratio=3.0)
    async with fleet(configured, c, built(c, "h1"), built(c, "h2"), replicas=3) as bus:
        asks = [placing(c.id, vcpus=1, cpu_pinning=RESIZE) for _ in range(20)]
        answers = await asyncio.gather(*(bus.ask(PLACE, ask) for ask in asks), return_exceptions=True)
        given = [a for a in answers if not isinstance(a, BaseException) and a.host_id]
        assert all(isinstance(a, Refused) or a in given or "needs 6" in a.message for a in answers)
        for capacity in (await capacities(bus)).values():
            assert capacity.vcpus_used == 24 == capacity.vcpus_limit
        assert len(given) == 8


async def test_a_promise_counts_what_it_gets_elsewhere_and_lets_it_take_any_shape_there(
    configured: Settings, database: DatabaseConfig
) -> None:
    """Each host may promise eight vCPUs and gives six to one VM that is resized, whose own one would always fit."""
    c = promising(cpu_overcommit_ratio=1.0)
    first, second = built(c, "h1"), built(c, "h2")
    async with fleet(configured, c, first, second) as bus:
        ask = placing(
            c.id, vcpus=1, cpu_pinning=RESIZE, high_availability=True, place={"target_host_id": first.id}
        )
        placed = await bus.ask(PLACE, ask)
        assert placed.host_id == first.id, placed.message
        other = placing(c.id, vcpus=1, cpu_pinning=RESIZE, high_availability=True)
        refused = await bus.ask(PLACE, other)
        assert not refused.host_id
        assert "needs 6" in refused.message

        need = replace(ask.need, shape=placed.shape)
        moved = Place(need=need, epoch=2, purpose=Purpose.MIGRATE, excluded_host_ids=(first.id,))
        there = await bus.ask(PLACE, moved)
        assert there.host_id == second.id, there.message
        async with connected(database) as connection:
            (kept,) = await connection.fetch("select need from promised_vm")
        assert msgspec.json.decode(kept["need"], type=Need).shape is None


async def test_what_it_runs_with_does_not_bind_where_it_is_brought_back(configured: Settings) -> None:
    """It moves to the twin of its host, and its refuge is another kind of host."""
    c = promising(cpu_overcommit_ratio=1.0)
    first, twin, other = built(c, "h1"), built(c, "h2"), built(c, "h3", cores=6)
    async with fleet(configured, c, first, twin, other) as bus:
        ask = placing(
            c.id, vcpus=1, cpu_pinning=RESIZE, high_availability=True, place={"target_host_id": first.id}
        )
        placed = await bus.ask(PLACE, ask)
        assert placed.host_id, placed.message
        need = replace(ask.need, shape=placed.shape, host_ids=(twin.id, other.id))
        there = await bus.ask(PLACE, Place(need=need, epoch=2, purpose=Purpose.MIGRATE))
        assert there.host_id == twin.id, there.message


async def test_one_that_runs_without_a_claim_is_counted_with_what_it_runs_with(
    configured: Settings, database: DatabaseConfig
) -> None:
    owner, c, opened = inventory(), cluster(), list[Scheduler]()
    h = with_cells(c, "h1")
    nodes = tuple(
        NumaNode(memory_bytes=GIB // 2, vcpus=tuple(range(6 * n, 6 * n + 6)), host_cells=(n,))
        for n in range(2)
    )
    shape = VmShape(vcpus=12, sockets=2, cores=3, threads=2, numa_nodes=nodes)
    async with running(eager(configured), owner.service(), scheduler(opened)) as bus:
        await owner.says(CLUSTER_CHANGED, c)
        await owner.says(HOST_CHANGED, h)
        await hosts_known(bus, 1)
        await owner.says(VM_CHANGED, vm(c.id, host_id=h.id, vcpus=1, cpu_pinning=RESIZE, runs_with=shape))
        async with connected(database) as connection:

            async def heard() -> bool:
                return await connection.fetchval("select count(*) from vm") == 1

            await until(heard, 15)
            await connection.execute("update vm set heard_at = now() - interval '1 minute'")
        await adopt_vms(opened[0])
        (claim,) = await claims(bus)
        assert claim.vcpus == 12
        assert await of_cells(database) == [(0, GIB // 2), (1, GIB // 2)]
