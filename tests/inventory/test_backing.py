"""A VM on huge pages: settled while it is down, asked of the scheduler, told to its host."""

from __future__ import annotations

import pytest

from services.inventory import numa
from services.inventory.specs import need
from tests.inventory.world import MIB, until, world_of
from volery.contracts.agent import DOMAIN_CHANGED, DomainReport
from volery.contracts.cluster import GET_CLUSTER, GetById
from volery.contracts.domain import DomainState, NumaMode, NumaNode
from volery.contracts.domain_orders import RUN_DOMAIN
from volery.contracts.errors import Kind, Refused
from volery.contracts.ids import new_id
from volery.contracts.operation import ListQuery
from volery.contracts.storage import DiskReach
from volery.contracts.vm import LIST_VMS, UPDATE_VM, UpdateVm
from volery.runtime.programs import Settings


async def test_huge_pages_are_set_while_it_is_down_and_its_host_is_told(configured: Settings) -> None:
    async with world_of(configured, hosts=1) as (world, (host,)):
        down = await world.vm(start=False)
        edited = await world.bus.ask(UPDATE_VM, UpdateVm(id=down.id, hugepage_kib=2048))
        assert (edited.hugepage_kib, edited.next_run) == (2048, False)
        with pytest.raises(Refused, match="whole pages only") as refused:
            await world.bus.ask(UPDATE_VM, UpdateVm(id=down.id, memory_bytes=65 * MIB))
        assert (refused.value.kind, refused.value.details["field"]) == (Kind.INVALID, "memory_bytes")

        runs = await world.vm(hugepage_kib=2048)
        (order,) = host.agent.begun(RUN_DOMAIN.kind)
        assert (order.spec.hugepage_kib, order.spec.memory_bytes) == (2048, 64 * MIB)
        for size in (0, 1048576):
            with pytest.raises(Refused) as refused:
                await world.bus.ask(UPDATE_VM, UpdateVm(id=runs.id, hugepage_kib=size))
        assert (await world.get(runs.id)).hugepage_kib == 2048
        with pytest.raises(Refused, match="can't be changed while it is up") as refused:
            await world.bus.ask(UPDATE_VM, UpdateVm(id=runs.id, hugepage_kib=0))
        assert refused.value.kind is Kind.CONFLICT
        same = await world.bus.ask(UPDATE_VM, UpdateVm(id=runs.id, hugepage_kib=2048, memory_bytes=128 * MIB))
        assert same.next_run, "more memory waits for the next start"

        cluster = await world.bus.ask(GET_CLUSTER, GetById(id=runs.cluster_id))
        asked = need(same, cluster, DiskReach(any_host=True))
        assert (asked.hugepage_kib, asked.memory_bytes) == (2048, 128 * MIB)


async def test_a_strangers_vm_shows_what_backs_it(configured: Settings) -> None:
    async with world_of(configured, hosts=1) as (world, (host,)):
        report = DomainReport(
            vm_id=new_id(), epoch=0, order_seq=0, name="stranger", state=DomainState.RUNNING,
            memory_bytes=1 << 30, vcpus=1, hugepage_kib=1048576,
        )  # fmt: skip
        await host.agent.say("inventory", DOMAIN_CHANGED, domain=report)

        async def shown() -> bool:
            return bool((await world.bus.ask(LIST_VMS, ListQuery())).items)

        await until(shown)
        found = await world.get(report.vm_id)
        assert (found.external, found.hugepage_kib) == (True, 1048576)


def node(mib: int, *vcpus: int, cells: tuple[int, ...] = (), mode: NumaMode = NumaMode.STRICT) -> NumaNode:
    return NumaNode(memory_bytes=mib * MIB, vcpus=vcpus, host_cells=cells, mode=mode)


@pytest.mark.parametrize(
    ("nodes", "hugepage_kib", "words"),
    [
        ((node(32, 0), node(31, 1)), 0, "66060288 bytes of memory together and the VM has 67108864"),
        ((node(32, 0), node(32, 0)), 0, "the nodes name 0, 0"),
        ((node(64, 0),), 0, "each of the vCPUs 0 to 1 belongs to one NUMA node"),
        ((node(64, 0, 2),), 0, "the nodes name 0, 2"),
        ((node(32, 0, 1), node(32)), 0, "NUMA node 1 has no vCPUs"),
        (
            (node(33, 0), node(31, 1)),
            2048,
            "NUMA node 0 has 34603008 bytes of memory; give it a multiple of 2097152",
        ),
        ((node(0, 0), node(64, 1)), 0, "NUMA node 0 has 0 bytes"),
        ((node(64, 0, 1, cells=(16,)),), 0, "name cells of 0 to 15"),
        ((node(64, 0, 1, cells=(1, 1), mode=NumaMode.INTERLEAVE),), 0, "each once"),
        ((node(64, 0, 1, cells=(0, 1)),), 0, "pin it to one, or let it interleave"),
        ((node(64, 0, 1, cells=(0, 1), mode=NumaMode.PREFERRED),), 0, "pin it to one, or let it interleave"),
        (tuple(node(4, n) for n in range(17)), 0, "numa_nodes"),
    ],
)
def test_nodes_that_make_no_sense_are_refused(
    nodes: tuple[NumaNode, ...], hugepage_kib: int, words: str
) -> None:
    with pytest.raises(Refused) as refused:
        numa.check(nodes, 64 * MIB, 2, hugepage_kib)
    assert refused.value.kind is Kind.INVALID
    assert words in refused.value.message


async def test_nodes_share_out_the_vm_and_are_settled_while_it_is_down(configured: Settings) -> None:
    halves = (node(32, 0, cells=(0,)), node(32, 1, cells=(0, 1), mode=NumaMode.INTERLEAVE))
    async with world_of(configured, hosts=1) as (world, (host,)):
        vm = await world.vm(vcpus=2, numa_nodes=halves)
        (order,) = host.agent.begun(RUN_DOMAIN.kind)
        assert order.spec.numa_nodes == halves
        assert world.scheduler.asked[-1].need.numa_nodes == halves
        with pytest.raises(Refused, match="NUMA nodes of VM vm1 can't be changed while it is up"):
            await world.bus.ask(UPDATE_VM, UpdateVm(id=vm.id, numa_nodes=()))
        with pytest.raises(Refused, match="the VM has 134217728; make them equal"):
            await world.bus.ask(UPDATE_VM, UpdateVm(id=vm.id, memory_bytes=128 * MIB))
        down = await world.vm(start=False)
        with pytest.raises(Refused, match="the nodes name 0, 1"):
            await world.bus.ask(UPDATE_VM, UpdateVm(id=down.id, numa_nodes=halves))
        edited = await world.bus.ask(UPDATE_VM, UpdateVm(id=down.id, vcpus=2, numa_nodes=halves))
        assert (edited.numa_nodes, edited.next_run) == (halves, False)
