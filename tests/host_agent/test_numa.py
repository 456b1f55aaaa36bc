"""NUMA nodes of a real guest, with their memory in cells of its host."""

from __future__ import annotations

from pathlib import Path

import pytest

from host_agent import domxml, runningxml
from host_agent.domxml import Machine, Placement
from tests.support.libvirt_host import LibvirtHost
from tests.support.vms import VmHost, tiny_spec
from volery.contracts.cpus import GivenCpus
from volery.contracts.domain import DomainState, NumaMode, NumaNode
from volery.contracts.errors import Refused

pytestmark = pytest.mark.timeout(180)

MIB = 1 << 20


async def test_a_real_guest_has_its_nodes_and_their_memory_is_where_it_is_pinned(
    qemu: VmHost, libvirt_host: LibvirtHost
) -> None:
    nodes = (
        NumaNode(memory_bytes=64 * MIB, vcpus=(0, 2), host_cells=(0,)),
        NumaNode(memory_bytes=32 * MIB, vcpus=(1,), host_cells=(0,), mode=NumaMode.INTERLEAVE),
        NumaNode(memory_bytes=32 * MIB, vcpus=(3,)),
    )
    vm = tiny_spec(memory_bytes=128 * MIB, vcpus=4, numa_nodes=nodes)
    await qemu.run(vm)
    await qemu.agent_up(vm.vm_id)
    root = runningxml.parsed(await qemu.hypervisor.domain_xml(vm.vm_id))
    cells = [(c.get("cpus"), c.get("memory"), c.get("unit")) for c in root.findall("cpu/numa/cell")]
    assert cells == [("0,2", "65536", "KiB"), ("1", "32768", "KiB"), ("3", "32768", "KiB")]
    command = Path(f"/proc/{libvirt_host.qemu(vm.vm_id)}/cmdline").read_text()
    assert '"host-nodes":[0],"policy":"bind"' in command
    assert '"host-nodes":[0],"policy":"interleave"' in command
    assert command.count('"host-nodes"') == 2, "the third is anywhere"
    maps = Path(f"/proc/{libvirt_host.qemu(vm.vm_id)}/numa_maps").read_text()
    assert " bind:0 " in maps
    assert " interleave:0 " in maps


async def test_a_guest_that_is_resized_counts_its_sockets_and_nodes_and_each_vcpu_is_on_its_cpu(
    qemu: VmHost, libvirt_host: LibvirtHost
) -> None:
    """As a host of two sockets, each a cell, gives it; on this machine every pin is of the CPUs that there are."""
    nodes = tuple(
        NumaNode(memory_bytes=64 * MIB, vcpus=tuple(range(2 * n, 2 * n + 2)), host_cells=(0,))
        for n in range(2)
    )
    given = GivenCpus(pins=((0,), (1,), (1,), (0,)))
    vm = tiny_spec(
        memory_bytes=128 * MIB, vcpus=4, sockets=2, cores=1, threads=2, numa_nodes=nodes, cpus=given
    )
    await qemu.run(vm)
    await qemu.agent_up(vm.vm_id)
    command = Path(f"/proc/{libvirt_host.qemu(vm.vm_id)}/cmdline").read_text()
    assert "4,sockets=2,dies=1" in command or "4,sockets=2,cores=1,threads=2" in command
    shown = libvirt_host.run("virsh", "vcpupin", vm.vm_id)
    assert [line.split() for line in shown.splitlines()[2:] if line] == [
        ["0", "0"],
        ["1", "1"],
        ["2", "1"],
        ["3", "0"],
    ]
    assert libvirt_host.run("virsh", "vcpucount", vm.vm_id, "--active", "--live").strip() == "4"


async def test_a_cell_that_the_host_lacks_is_refused(qemu: VmHost) -> None:
    node = NumaNode(memory_bytes=96 * MIB, vcpus=(0,), host_cells=(7,))
    vm = tiny_spec(numa_nodes=(node,))
    with pytest.raises(Refused, match="7"):
        await qemu.run(vm)
    assert (await qemu.hypervisor.domain(vm.vm_id)).state is DomainState.GONE


def test_nodes_are_written_as_they_are_and_take_the_place_of_the_one_for_plugged_memory() -> None:
    nodes = (
        NumaNode(memory_bytes=MIB, vcpus=(0, 1), host_cells=(3,), mode=NumaMode.PREFERRED),
        NumaNode(memory_bytes=2 * MIB, vcpus=(2,), host_cells=(0, 2), mode=NumaMode.INTERLEAVE),
        NumaNode(memory_bytes=4 * MIB, vcpus=(3,)),
    )
    vm = tiny_spec(memory_bytes=7 * MIB, max_memory_bytes=16 * MIB, vcpus=4, numa_nodes=nodes)
    root = runningxml.parsed(domxml.domain_xml(vm, Placement(1, 1), Machine("kvm")))
    assert [(c.get("id"), c.get("cpus"), c.get("memory")) for c in root.findall("cpu/numa/cell")] == [
        ("0", "0,1", "1048576"),
        ("1", "2", "2097152"),
        ("2", "3", "4194304"),
    ]
    tuned = [(m.get("cellid"), m.get("mode"), m.get("nodeset")) for m in root.findall("numatune/memnode")]
    assert tuned == [("0", "preferred", "3"), ("1", "interleave", "0,2")]
    plain = tiny_spec(numa_nodes=(NumaNode(memory_bytes=96 * MIB, vcpus=(0,)),))
    assert (
        runningxml.parsed(domxml.domain_xml(plain, Placement(1, 1), Machine("kvm"))).find("numatune") is None
    )
