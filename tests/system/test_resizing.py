"""A real QEMU guest that is resized to its host: from the wish to what virsh shows and the guest counts."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from host_agent import pins, runningxml
from services.inventory.service import service as inventory
from services.scheduler.policies.outline import outline
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
from volery.contracts.operation import ListQuery, OperationState
from volery.contracts.scheduling import LIST_CLAIMS, Claim
from volery.contracts.vm import CREATE_VM, GET_VM, START_VM, STOP_VM, CreateVm, StartVm, StopVm
from volery.runtime.bus import Bus

MIB = 1024**2
RESIZE = CpuPinning(policy=PinningPolicy.RESIZE_AND_PIN)


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


async def made(bus: Bus, cluster_id: str, name: str, pinning: CpuPinning, vcpus: int = 1) -> str:
    ask = CreateVm(name=name, cluster_id=cluster_id, memory_bytes=64 * MIB, vcpus=vcpus, cpu_pinning=pinning)
    op = await bus.ask(CREATE_VM, ask)
    await succeeded(bus, op)
    return op.object_id


def pinned(machine: LibvirtHost, vm_id: str) -> list[frozenset[int]]:
    """vCPU by vCPU, as `virsh vcpupin` says."""
    rows = re.findall(r"^ *(\d+) +(\S+)$", machine.run("virsh", "vcpupin", vm_id), re.MULTILINE)
    assert [int(vcpu) for vcpu, _ in rows] == list(range(len(rows)))
    return [pins.read(cpus) for _, cpus in rows]


async def test_a_vm_starts_with_what_its_host_gives_and_is_pinned_one_to_one(
    plane: Plane, machine: LibvirtHost
) -> None:
    async with running_plane(plane, inventory, scheduler, storage) as bus:
        cluster = await default_cluster(bus)
        agent = await enrolled_agent(bus, plane, cluster, "h1", VOLERY_AGENT_LIBVIRT_URI=machine.uri)
        agent.start()
        try:
            host = await until_host(bus, agent.host.id, HostStatus.UP)
            given = outline(host.capabilities.cores)
            assert given.vcpus, f"this machine can't be followed: it {given.why_not}"
            vm_id = await made(bus, cluster.id, "large", RESIZE, vcpus=7)
            await succeeded(bus, await bus.ask(START_VM, StartVm(id=vm_id)))

            vm = await bus.ask(GET_VM, GetById(id=vm_id))
            assert vm.vcpus == 7
            assert vm.runs_with is not None
            assert vm.runs_with.vcpus == given.vcpus
            assert pinned(machine, vm_id) == [frozenset(cpus) for cpus in given.pins]
            root = runningxml.parsed(machine.run("virsh", "dumpxml", vm_id))
            topology = root.find("cpu/topology")
            assert topology is not None
            shown = [int(topology.get(name, "0")) for name in ("sockets", "cores", "threads")]
            assert shown == [vm.runs_with.sockets, vm.runs_with.cores, vm.runs_with.threads]
            assert pins.allowed(root) == {cpu for cpus in given.pins for cpu in cpus}
            command = Path(f"/proc/{machine.qemu(vm_id)}/cmdline").read_bytes().split(b"\0")
            assert f"{given.vcpus},sockets={shown[0]},".encode() in command[command.index(b"-smp") + 1]

            (item,) = (await bus.ask(LIST_CLAIMS, ListQuery())).items
            claim = msgspec.json.decode(item, type=Claim)
            assert (claim.vcpus, claim.shape) == (given.vcpus, vm.runs_with)
            (use,) = (await bus.ask(LICENCE_REPORT, AskLicenceReport())).items
            assert (use.policy, frozenset(use.cpus)) == ("resize_and_pin", pins.allowed(root))

            alone = await made(
                bus, cluster.id, "alone", CpuPinning(policy=PinningPolicy.DEDICATED), len(given.pins) + 2
            )
            failed = await ended(bus, await bus.ask(START_VM, StartVm(id=alone)))
            assert failed.state is OperationState.FAILED
            assert failed.problem is not None
            assert f"VMs are pinned to {given.vcpus}" in failed.problem.message

            await succeeded(bus, await bus.ask(STOP_VM, StopVm(id=vm_id, force=True)))
            assert (await bus.ask(GET_VM, GetById(id=vm_id))).runs_with is None
        except BaseException:  # whatever the test failed with, its agent says why
            print(agent.log())
            raise
        finally:
            agent.stop()
