"""The thinnest thread through everything: a real QEMU guest started, watched and stopped through the services."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from host_agent import pins
from services.inventory.service import service as inventory
from services.scheduler.service import service as scheduler
from services.storage.service import service as storage
from tests.support.libvirt_host import LibvirtHost
from tests.support.plane import (
    Plane,
    default_cluster,
    ended,
    enrolled_agent,
    plane_servers,
    running_plane,
    succeeded,
    until_host,
)
from volery.contracts.cluster import GetById
from volery.contracts.cpus import CpuPinning, PinningPolicy
from volery.contracts.host import HostStatus
from volery.contracts.licence import LICENCE_REPORT, AskLicenceReport
from volery.contracts.operation import OperationState
from volery.contracts.vm import (
    ACT_ON_VM,
    CREATE_VM,
    DELETE_VM,
    GET_VM,
    START_VM,
    STOP_VM,
    ActOnVm,
    CreateVm,
    DeleteVm,
    StartVm,
    StopVm,
    VmAction,
    VmStatus,
)
from volery.runtime.bus import Bus

DEDICATED = CpuPinning(policy=PinningPolicy.DEDICATED)


@pytest.fixture
def plane() -> Iterator[Plane]:
    with plane_servers() as made:
        yield made


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[LibvirtHost]:
    host = LibvirtHost(tmp_path / "h")
    host.path.mkdir()
    host.start()
    yield host
    host.stop()


async def status(bus: Bus, vm_id: str, wanted: VmStatus, seconds: float = 20.0) -> None:
    async with asyncio.timeout(seconds):
        while (await bus.ask(GET_VM, GetById(id=vm_id))).status is not wanted:
            await asyncio.sleep(0.02)


async def test_a_vm_lives_and_dies(plane: Plane, machine: LibvirtHost) -> None:
    async with running_plane(plane, inventory, scheduler, storage) as bus:
        cluster = await default_cluster(bus)
        agent = await enrolled_agent(bus, plane, cluster, "h1", VOLERY_AGENT_LIBVIRT_URI=machine.uri)
        agent.start()
        try:
            host = await until_host(bus, agent.host.id, HostStatus.UP)
            assert host.capabilities.libvirt_version >= 9_000_000
            made = await bus.ask(
                CREATE_VM, CreateVm(name="first", cluster_id=cluster.id, memory_bytes=64 * 1024 * 1024)
            )
            await succeeded(bus, made)
            vm_id = made.object_id
            started = await succeeded(bus, await bus.ask(START_VM, StartVm(id=vm_id)))
            print([(s.name, s.title) for s in started.steps], started.ended_at - started.created_at)
            vm = await bus.ask(GET_VM, GetById(id=vm_id))
            assert (vm.status, vm.host_id, vm.epoch) == (VmStatus.UP, host.id, 1)
            await succeeded(bus, await bus.ask(ACT_ON_VM, ActOnVm(id=vm_id, action=VmAction.PAUSE)))
            assert (await bus.ask(GET_VM, GetById(id=vm_id))).status is VmStatus.PAUSED
            await succeeded(bus, await bus.ask(ACT_ON_VM, ActOnVm(id=vm_id, action=VmAction.UNPAUSE)))
            await succeeded(bus, await bus.ask(STOP_VM, StopVm(id=vm_id, force=True)))
            vm = await bus.ask(GET_VM, GetById(id=vm_id))
            assert (vm.status, vm.host_id, vm.status_reason) == (VmStatus.DOWN, "", "user")
            await succeeded(bus, await bus.ask(START_VM, StartVm(id=vm_id)))
            (qemu,) = machine.processes("qemu")
            os.kill(qemu, signal.SIGKILL)
            await status(bus, vm_id, VmStatus.DOWN, 5)
            assert (await bus.ask(GET_VM, GetById(id=vm_id))).status_reason == "crashed"
            gone = await ended(bus, await bus.ask(DELETE_VM, DeleteVm(id=vm_id)))
            assert gone.state is OperationState.SUCCEEDED, gone.problem
        except BaseException:
            print(agent.log())
            raise
        finally:
            agent.stop()


def cpus_of(machine: LibvirtHost, vm_id: str) -> set[frozenset[int]]:
    """On which CPUs the kernel may run each thread of a VM's QEMU."""
    found = set()
    for status in Path(f"/proc/{machine.qemu(vm_id)}/task").glob("*/status"):
        (line,) = [x for x in status.read_text().splitlines() if x.startswith("Cpus_allowed_list:")]
        found.add(pins.read(line.partition(":")[2].strip()))
    return found


async def test_a_vm_gets_a_cpu_of_its_own_and_the_others_leave_it(plane: Plane, machine: LibvirtHost) -> None:
    """From the wish to the kernel: one VM shares, one has a CPU alone, and a third finds none left."""
    async with running_plane(plane, inventory, scheduler, storage) as bus:
        cluster = await default_cluster(bus)
        agent = await enrolled_agent(bus, plane, cluster, "h1", VOLERY_AGENT_LIBVIRT_URI=machine.uri)
        agent.start()
        try:
            host = await until_host(bus, agent.host.id, HostStatus.UP)
            every = frozenset(cpu for core in host.capabilities.cores for cpu in core.cpus)
            assert len(every) == host.capabilities.cpus > 1

            async def made(name: str, pinning: CpuPinning) -> str:
                ask = CreateVm(
                    name=name,
                    cluster_id=cluster.id,
                    memory_bytes=64 * 1024 * 1024,
                    vcpus=1,
                    cpu_pinning=pinning,
                )
                op = await bus.ask(CREATE_VM, ask)
                await succeeded(bus, op)
                return op.object_id

            shares, alone = await made("shares", CpuPinning()), await made("alone", DEDICATED)
            await succeeded(bus, await bus.ask(START_VM, StartVm(id=shares)))
            assert cpus_of(machine, shares) == {every}
            await succeeded(bus, await bus.ask(START_VM, StartVm(id=alone)))
            (use,) = (await bus.ask(LICENCE_REPORT, AskLicenceReport())).items
            assert (use.vm_name, use.host_name, use.until) == ("alone", "h1", None)
            assert cpus_of(machine, alone) == {frozenset(use.cpus)}
            assert cpus_of(machine, shares) == {every - set(use.cpus)}

            greedy = CpuPinning(policy=PinningPolicy.MANUAL, pins=(use.cpus,))
            other = await made("other", greedy)
            failed = await ended(bus, await bus.ask(START_VM, StartVm(id=other)))
            assert failed.problem is not None
            assert f"CPU {use.cpus[0]} of h1 is another VM's alone" in failed.problem.message

            await succeeded(bus, await bus.ask(STOP_VM, StopVm(id=alone, force=True)))
            async with asyncio.timeout(20):
                while cpus_of(machine, shares) != {every}:
                    await asyncio.sleep(0.05)
            async with asyncio.timeout(20):
                while (await bus.ask(LICENCE_REPORT, AskLicenceReport())).items[0].until is None:
                    await asyncio.sleep(0.05)
            await succeeded(bus, await bus.ask(START_VM, StartVm(id=other)))
            assert cpus_of(machine, other) == {frozenset(use.cpus)}
        except BaseException:
            print(agent.log())
            raise
        finally:
            agent.stop()
