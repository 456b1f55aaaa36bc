"""Physical CPUs: in domains' XML, and who leaves them when one guest gets them alone."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from host_agent import cell_pins, cpus, pins, runningxml
from host_agent.action import Host
from host_agent.cpu_room import CpuSeat
from host_agent.domxml import Machine, Placement, domain_xml, written
from host_agent.hypervisor import Hypervisor
from tests.support.libvirt_host import LibvirtHost
from tests.support.vms import VmHost, tiny_spec, vm_host
from volery.contracts.cpus import CpuCore, GivenCpus
from volery.contracts.domain import DomainSpec, DomainState, NumaMode, NumaNode
from volery.contracts.domain_orders import (
    ADMIT_MIGRATION,
    FORGET_DOMAIN,
    AdmitMigration,
    ForgetDomain,
)
from volery.contracts.errors import Kind, Refused

pytestmark = pytest.mark.timeout(180)

TOPOLOGY = """<capabilities><host><topology><cells num='2'>
 <cell id='0'><cpus num='2'><cpu id='0' socket_id='0' core_id='0' siblings='0,2'/>
  <cpu id='2' socket_id='0' core_id='0' siblings='0,2'/></cpus></cell>
 <cell id='1'><cpus num='2'><cpu id='1' socket_id='1' core_id='0' siblings='1,3'/>
  <cpu id='3' socket_id='1' core_id='0' siblings='1,3'/></cpus></cell>
</cells></topology></host></capabilities>"""


def test_cores_are_read_from_libvirts_topology() -> None:
    assert pins.cores(runningxml.parsed(TOPOLOGY)) == (
        CpuCore(cell=0, socket=0, cpus=(0, 2)),
        CpuCore(cell=1, socket=1, cpus=(1, 3)),
    )
    assert pins.cores(runningxml.parsed(TOPOLOGY.replace("siblings='1,3'", ""))) == ()
    assert pins.read("0-3,^2,8") == {0, 1, 3, 8}


def test_a_domain_says_which_cpus_it_has_and_another_host_gives_it_others() -> None:
    given = GivenCpus(pins=((2,), (3,)), exclusive=(2, 3, 6, 7))
    spec = tiny_spec(vcpus=2, cpus=given)
    placement = Placement(1, 1).on(given)
    root = runningxml.parsed(domain_xml(spec, placement, Machine()))
    assert [(p.get("vcpu"), p.get("cpuset")) for p in root.findall("cputune/vcpupin")] == [
        ("0", "2"),
        ("1", "3"),
    ]
    assert [p.get("cpuset") for p in root.findall("cputune/emulatorpin")] == ["2,3"]
    seat = runningxml.cpu_seat(written(root), spec.vm_id)
    assert (seat.pinned, seat.exclusive, seat.allowed) == (True, {2, 3, 6, 7}, {2, 3})

    pins.put(root, GivenCpus(pins=((0,), (1,), (5,))), {7})
    moved = runningxml.parsed(runningxml.with_placement(root, Placement(2, 1, pinned=True)))
    seat = runningxml.cpu_seat(written(moved), spec.vm_id)
    assert (seat.pinned, seat.exclusive, seat.allowed) == (True, frozenset(), {0, 1, 5})

    pins.put(moved, None, {4, 5})
    assert runningxml.cpu_seat(written(moved), spec.vm_id).allowed == {4, 5}
    pins.put(moved, None, None)
    assert runningxml.cpu_seat(written(moved), spec.vm_id).allowed == frozenset()


def test_a_domain_that_is_not_pinned_says_nothing_of_cpus() -> None:
    xml = domain_xml(tiny_spec(), Placement(1, 1).on(None), Machine())
    assert "pinned" not in xml
    assert "cpuset" not in xml


@pytest.fixture
async def eight(driver: VmHost) -> AsyncIterator[VmHost]:
    """libvirt's test driver and the agent's watch. It has 16 CPUs, and binds domains to the first 8."""
    await cpus.learn(driver.host)
    driver.hypervisor.cpus.every = ALL
    watching = asyncio.create_task(cpus.watch(driver.host))
    yield driver
    watching.cancel()
    await asyncio.gather(watching, return_exceptions=True)


async def allowed(host: VmHost, spec: DomainSpec) -> frozenset[int]:
    return runningxml.cpu_seat(await host.hypervisor.domain_xml(spec.vm_id), spec.vm_id).allowed


async def becomes(host: VmHost, spec: DomainSpec, wanted: frozenset[int]) -> None:
    async with asyncio.timeout(20):
        while await allowed(host, spec) != wanted:
            await asyncio.sleep(0.05)


ALL = frozenset(range(8))
ALONE = GivenCpus(pins=((0,), (1,)), exclusive=(0, 1, 6, 7))
REST = ALL - {0, 1, 6, 7}


async def test_others_leave_before_and_come_back_after(eight: VmHost) -> None:
    before, pinned = tiny_spec(), tiny_spec(vcpus=1, cpus=GivenCpus(pins=((4, 5),)))
    await eight.run(before)
    await eight.run(pinned)
    assert await allowed(eight, before) == frozenset()
    owner = tiny_spec(vcpus=2, cpus=ALONE)
    await eight.run(owner)
    assert await allowed(eight, before) == REST
    assert await allowed(eight, pinned) == {4, 5}
    assert await allowed(eight, owner) == {0, 1}
    after = tiny_spec()
    await eight.run(after)
    assert await allowed(eight, after) == REST
    await eight.run(owner, epoch=2)  # the same domain under another epoch keeps what it has
    await cpus.settle(eight.host)
    assert eight.hypervisor.cpus.held == {owner.vm_id: frozenset(ALONE.exclusive)}

    await eight.power_off(owner.vm_id)
    await becomes(eight, before, ALL)
    await becomes(eight, after, ALL)
    assert await allowed(eight, pinned) == {4, 5}
    assert not eight.hypervisor.cpus.given


async def test_a_new_agent_finds_out_who_has_what(eight: VmHost) -> None:
    shared, owner = tiny_spec(), tiny_spec(vcpus=2, cpus=ALONE)
    await eight.run(shared)
    await eight.run(owner)
    room = eight.hypervisor.cpus
    room.held, room.every = {}, frozenset()
    await eight.hypervisor.pin(shared.vm_id, {3})
    await cpus.learn(eight.host)
    assert room.held == {owner.vm_id: frozenset(ALONE.exclusive)}
    assert await allowed(eight, shared) == REST


async def test_two_never_have_one_cpu_alone(eight: VmHost) -> None:
    owner, rival = tiny_spec(vcpus=2, cpus=ALONE), tiny_spec(cpus=GivenCpus(pins=((7,),), exclusive=(7,)))
    await eight.run(owner)
    with pytest.raises(Refused) as refused:
        await eight.run(rival)
    assert refused.value.kind is Kind.CONFLICT
    assert owner.vm_id in refused.value.message
    assert (await eight.hypervisor.domain(rival.vm_id)).state is DomainState.GONE
    await eight.power_off(owner.vm_id)
    await eight.run(rival)  # at once, whatever was heard of the end
    assert await allowed(eight, rival) == {7}


async def test_who_cannot_be_moved_keeps_the_guest_from_starting(eight: VmHost) -> None:
    """One whose calls hang. Nothing of the guest is left, and whoever was moved may use all CPUs again."""
    stuck, free, owner = tiny_spec(), tiny_spec(), tiny_spec(vcpus=2, cpus=ALONE)
    await eight.run(stuck)
    await eight.run(free)
    eight.hypervisor._late[stuck.vm_id] = 1
    with pytest.raises(Refused) as refused:
        await eight.run(owner)
    assert refused.value.kind is Kind.UNAVAILABLE
    assert "can't be cleared" in refused.value.message
    assert (await eight.hypervisor.domain(owner.vm_id)).state is DomainState.GONE
    assert not eight.hypervisor.cpus.given
    del eight.hypervisor._late[stuck.vm_id]
    await cpus.settle(eight.host)
    assert await allowed(eight, free) | await allowed(eight, stuck) in (frozenset(), ALL)


async def test_room_is_made_for_one_who_arrives_and_given_back_when_it_will_not_come(eight: VmHost) -> None:
    shared, coming = tiny_spec(), tiny_spec(vcpus=2, cpus=ALONE)
    await eight.run(shared)
    other = tiny_spec()
    nobody = await eight.order(ADMIT_MIGRATION, AdmitMigration(vm_id=other.vm_id, spec=other))
    assert nobody.shared_cpus is None
    admitted = await eight.order(ADMIT_MIGRATION, AdmitMigration(vm_id=coming.vm_id, spec=coming))
    assert admitted.shared_cpus == tuple(sorted(REST))
    assert await allowed(eight, shared) == REST
    await eight.order(FORGET_DOMAIN, ForgetDomain(vm_id=coming.vm_id), epoch=2)
    assert await allowed(eight, shared) == ALL


async def test_it_waits_for_a_guest_that_was_told_otherwise_before(eight: VmHost) -> None:
    """One whose domain isn't there yet when the CPUs are given away: it can't be moved before it is."""
    owner, late = tiny_spec(vcpus=2, cpus=ALONE), tiny_spec()
    async with cpus.placed(eight.host, late.vm_id, None) as shared:
        assert shared is None
        starting = asyncio.create_task(eight.run(owner))
        await asyncio.sleep(0.3)
        assert (await eight.hypervisor.domain(owner.vm_id)).state is DomainState.GONE
        assert not starting.done()
        await eight.hypervisor.create(domain_xml(late, Placement(1, 1), eight.hypervisor.machine, shared))
    await starting
    assert await allowed(eight, late) == REST


async def test_guests_that_start_at_the_same_time_are_off_them_too(eight: VmHost) -> None:
    for _ in range(5):
        owner = tiny_spec(vcpus=2, cpus=ALONE)
        others = [tiny_spec() for _ in range(6)]
        await asyncio.gather(*(eight.run(spec) for spec in (*others[:3], owner, *others[3:])))
        for spec in others:
            await becomes(eight, spec, REST)
        await eight.power_off(owner.vm_id)
        await asyncio.gather(*(becomes(eight, spec, ALL) for spec in others))
        for spec in others:
            await eight.power_off(spec.vm_id)


class Slow(Hypervisor):
    """While a domain is made somebody looks who can use the CPUs, and takes long over it."""

    looking: asyncio.Task[None] | None = None
    host: Host | None = None
    looks_long = False

    async def cpu_seats(self) -> list[CpuSeat]:
        found = await super().cpu_seats()
        if self.looks_long:
            self.looks_long = False
            await asyncio.sleep(0.3)
        return found

    async def create(self, xml: str, *, paused: bool = False) -> None:
        if self.host is not None:
            self.looks_long = True
            self.looking = asyncio.create_task(cpus.settle(self.host))
            while self.looks_long:
                await asyncio.sleep(0.01)
        await super().create(xml, paused=paused)


async def test_who_looked_before_it_was_there_does_not_let_others_back(tmp_path: Path) -> None:
    async with vm_host("test:///default", tmp_path, Slow) as made:
        hypervisor = made.hypervisor
        assert isinstance(hypervisor, Slow)
        hypervisor.cpus.every = ALL
        shared, owner = tiny_spec(), tiny_spec(vcpus=2, cpus=ALONE)
        await made.run(shared)
        hypervisor.host = made.host
        await made.run(owner)
        hypervisor.host = None
        assert hypervisor.looking is not None
        await hypervisor.looking
        assert hypervisor.cpus.held == {owner.vm_id: frozenset(ALONE.exclusive)}
        assert await allowed(made, shared) == REST


def threads_on(libvirt_host: LibvirtHost, spec: DomainSpec) -> set[frozenset[int]]:
    """On which CPUs the kernel may run each thread of its QEMU."""
    pid, found = libvirt_host.qemu(spec.vm_id), set()
    for status in Path(f"/proc/{pid}/task").glob("*/status"):
        (line,) = [x for x in status.read_text().splitlines() if x.startswith("Cpus_allowed_list:")]
        found.add(pins.read(line.partition(":")[2].strip()))
    return found


async def soon(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not true():
            await asyncio.sleep(0.05)


async def test_the_kernel_keeps_real_guests_off_them(qemu: VmHost, libvirt_host: LibvirtHost) -> None:
    await cpus.learn(qemu.host)
    every = qemu.hypervisor.cpus.every
    mine = max(every)
    shared, owner = tiny_spec(), tiny_spec(cpus=GivenCpus(pins=((mine,),), exclusive=(mine,)))
    watching = asyncio.create_task(cpus.watch(qemu.host))
    await qemu.run(shared)
    await qemu.run(owner)
    assert threads_on(libvirt_host, shared) == {every - {mine}}
    assert threads_on(libvirt_host, owner) == {frozenset({mine})}
    late = tiny_spec()
    await qemu.run(late)
    assert threads_on(libvirt_host, late) == {every - {mine}}
    await qemu.power_off(owner.vm_id)
    await soon(lambda: threads_on(libvirt_host, shared) == {every})  # its vCPU first, then QEMU's own threads
    watching.cancel()
    await asyncio.gather(watching, return_exceptions=True)


async def test_a_guest_without_cpus_of_its_own_needs_one_that_is_shared(eight: VmHost) -> None:
    shared, owner = tiny_spec(), tiny_spec(cpus=GivenCpus(pins=((0,),), exclusive=tuple(ALL)))
    await eight.run(shared)
    with pytest.raises(Refused, match="every CPU of this host"):
        await eight.run(owner)
    await eight.power_off(shared.vm_id)
    await eight.run(owner)
    with pytest.raises(Refused, match="has no CPUs of its own") as refused:
        await eight.run(tiny_spec())
    assert refused.value.kind is Kind.CONFLICT
    pinned = tiny_spec(cpus=GivenCpus(pins=((3,),)))
    await eight.run(pinned)
    assert await allowed(eight, pinned) == {3}


NODES = (
    NumaNode(memory_bytes=64 << 20, vcpus=(0, 2), host_cells=(0,)),
    NumaNode(memory_bytes=32 << 20, vcpus=(1,), host_cells=(0,), mode=NumaMode.PREFERRED),
    NumaNode(memory_bytes=32 << 20, vcpus=(3,)),
)
CELLS = {0: frozenset({0, 2}), 1: frozenset({1, 3})}


def noded(**fields: Any) -> DomainSpec:
    return tiny_spec(**({"memory_bytes": 128 << 20, "vcpus": 4, "numa_nodes": NODES} | fields))


def pins_in(xml: str) -> dict[int, frozenset[int]]:
    return {vcpu: pins.read(cpus) for vcpu, cpus in pins.of_vcpus(runningxml.parsed(xml)).items()}


def test_vcpus_of_a_bound_node_are_on_the_shared_cpus_of_its_cell() -> None:
    assert cell_pins.cells_of(runningxml.parsed(TOPOLOGY)) == CELLS
    one = TOPOLOGY[: TOPOLOGY.index(" <cell id='1'")] + "</cells></topology></host></capabilities>"
    assert cell_pins.cells_of(runningxml.parsed(one)) == {}

    def xml(shared: set[int] | None, cells: cell_pins.Cells = CELLS, **fields: Any) -> str:
        return domain_xml(noded(**fields), Placement(1, 1), Machine("kvm"), shared, cells)

    assert pins_in(xml(None)) == {0: {0, 2}, 2: {0, 2}}
    assert pins_in(xml({1, 2, 3})) == {0: {2}, 2: {2}}
    assert pins_in(xml({1, 3})) == {0: {1, 3}, 2: {1, 3}}, "nothing is left of the cell"
    assert pins_in(xml(None, {})) == {}, "a host with one cell"
    own = GivenCpus(pins=((1,), (1,), (3,), (3,)))
    assert pins_in(xml(None, cpus=own)) == {0: {1}, 1: {1}, 2: {3}, 3: {3}}, "it has CPUs of its own choice"
    seat = runningxml.cpu_seat(xml({1, 2, 3}), "vm")
    assert (seat.allowed, seat.bound, seat.vcpus) == ({1, 2, 3}, {0: {0}, 2: {0}}, {0: {2}, 2: {2}})
    assert cpu_seats_agree(seat)
    assert runningxml.cpu_seat(xml(None), "vm").allowed == frozenset(), "the rest of it may be anywhere"


def cpu_seats_agree(seat: CpuSeat) -> bool:
    return seat.vcpus == {n: cell_pins.near(cells, CELLS, seat.allowed) for n, cells in seat.bound.items()}


def threads_of_vcpus(libvirt_host: LibvirtHost, spec: DomainSpec) -> list[frozenset[int]]:
    """On which CPUs the kernel may run each vCPU, as QEMU names their threads."""
    found = {}
    for task in Path(f"/proc/{libvirt_host.qemu(spec.vm_id)}/task").iterdir():
        name = re.fullmatch(r"CPU (\d+)/\w+", (task / "comm").read_text().strip())
        if name is not None:
            lines = (task / "status").read_text().splitlines()
            (line,) = [x for x in lines if x.startswith("Cpus_allowed_list:")]
            found[int(name[1])] = pins.read(line.partition(":")[2].strip())
    return [found[vcpu] for vcpu in sorted(found)]


async def test_real_vcpus_follow_their_node_and_step_aside(qemu: VmHost, libvirt_host: LibvirtHost) -> None:
    """This machine has one cell; its agent is told of two, and that the memory's has the highest CPU."""
    await cpus.learn(qemu.host)
    room = qemu.hypervisor.cpus
    every, mine = room.every, max(room.every)
    room.cells = {0: frozenset({mine}), 1: every - {mine}}
    watching = asyncio.create_task(cpus.watch(qemu.host))
    here, came = noded(), noded()
    await qemu.run(here)
    assert threads_of_vcpus(libvirt_host, here) == [{mine}, every, {mine}, every]
    # As one that arrives: who sent it said nothing of these cells.
    await qemu.hypervisor.create(domain_xml(came, Placement(1, 1), qemu.hypervisor.machine))
    await soon(lambda: threads_of_vcpus(libvirt_host, came) == [{mine}, every, {mine}, every])

    owner = tiny_spec(cpus=GivenCpus(pins=((mine,),), exclusive=(mine,)))
    await qemu.run(owner)
    assert threads_of_vcpus(libvirt_host, here) == [every - {mine}] * 4
    late = noded()
    await qemu.run(late)
    assert threads_of_vcpus(libvirt_host, late) == [every - {mine}] * 4
    await qemu.power_off(owner.vm_id)
    await soon(lambda: threads_of_vcpus(libvirt_host, here) == [{mine}, every, {mine}, every])
    await soon(lambda: threads_of_vcpus(libvirt_host, late) == [{mine}, every, {mine}, every])
    watching.cancel()
    await asyncio.gather(watching, return_exceptions=True)
