"""VMs that are resized to their hosts, on a real bus and database: what claims hold, give back, and refuse to others."""

from __future__ import annotations

from typing import Any

import asyncpg

from tests.scheduler.fleets import GIB, capacities, cluster, host, placing
from tests.scheduler.test_cpu_claims import DEDICATED, built, fleet, given_twice
from tests.scheduler.test_cpus import machine
from tests.scheduler.test_placing import claims
from volery.contracts.agent import HostCapabilities, NumaCell
from volery.contracts.cluster import Cluster
from volery.contracts.cpus import CpuPinning, PinningPolicy
from volery.contracts.errors import Refused
from volery.contracts.host import Host
from volery.contracts.licence import LICENCE_REPORT, AskLicenceReport
from volery.contracts.scheduling import PLACE, RELEASE_VM_CLAIMS, Purpose, ReleaseVm
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
    import asyncio

    c = cluster(cpu_overcommit_ratio=3.0)
    async with fleet(configured, c, built(c, "h1"), built(c, "h2"), replicas=3) as bus:
        asks = [placing(c.id, vcpus=1, cpu_pinning=RESIZE) for _ in range(20)]
        answers = await asyncio.gather(*(bus.ask(PLACE, ask) for ask in asks), return_exceptions=True)
        given = [a for a in answers if not isinstance(a, BaseException) and a.host_id]
        assert all(isinstance(a, Refused) or a in given or "needs 6" in a.message for a in answers)
        for capacity in (await capacities(bus)).values():
            assert capacity.vcpus_used == 24 == capacity.vcpus_limit
        assert len(given) == 8
