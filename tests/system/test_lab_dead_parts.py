"""A host of the lab that lives, but has lost a required network or its iSCSI storage, told through REST alone."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab.host import Host
from lab.scene import MIB, Scene, staged
from volery.client import api
from volery.client.request import Request, body_of
from volery.contracts.host import HostStatus
from volery.contracts.network import CreateNetwork, Network
from volery.contracts.network_orders import NetworkKind
from volery.contracts.operation import Operation
from volery.contracts.vm import HighAvailability, NewDisk, Vm, VmStatus

pytestmark = pytest.mark.timeout(420)
NIC = "eth1"
SWITCHS_END = "eth1p"
WRITER = "while dd if=/dev/zero of=/dev/vdb bs=512 count=1 conv=notrunc,fsync; do usleep 100000; done"
HA = HighAvailability(enabled=True)


@pytest.fixture(scope="module")
def stage() -> Iterator[Scene]:
    hurried = {
        "VOLERY_STORAGE_LOST_AFTER_SECONDS": "8",
        "VOLERY_STORAGE_BACK_AFTER_SECONDS": "3",
        "VOLERY_NETWORK_LOST_AFTER_SECONDS": "8",
        "VOLERY_NETWORK_BACK_AFTER_SECONDS": "3",
    }
    with staged(2, hurried) as scene:
        yield scene


def give_nic(stage: Scene, host: Host) -> None:
    """A second NIC, whose other end stands in for a port of a switch; and its agent has told of it."""
    host.exec(["ip", "link", "add", NIC, "type", "veth", "peer", "name", SWITCHS_END])
    for end in (NIC, SWITCHS_END):
        host.exec(["ip", "link", "set", end, "up"])
    host.kill_agent()  # NICs are told of when an agent starts

    def known() -> bool:
        return NIC in stage.client.find(api.HOSTS, host.name).capabilities.nics

    stage.wait(known, 60, lambda: f"{host.name} to have {NIC}")
    stage.host_is_up(stage.client.find(api.HOSTS, host.name).id)


@pytest.fixture
def office(stage: Scene) -> Iterator[Network]:
    """A required network on a cable of its own, on every host."""
    for host in stage.lab.hosts:
        give_nic(stage, host)
    center = stage.cluster.data_center_id
    ask = CreateNetwork(name="office", data_center_id=center, kind=NetworkKind.BRIDGE, required=True)
    network = stage.client.send(api.NETWORKS.create(ask, Network))
    for one in stage.client.list(api.HOSTS):
        nics = body_of({"nics": {network.id: NIC}})
        stage.client.wait(stage.client.send(Request("POST", f"hosts/{one.id}/networks", Operation, nics)))
    yield network
    stage.client.send(api.NETWORKS.delete(network.id))


def boot_of(stage: Scene, vm: Vm) -> str:
    return stage.inside(vm, "cat /proc/sys/kernel/random/boot_id").strip()


def is_left(stage: Scene, host_id: str, reason: str) -> None:
    """Waits until the host is non-operational, and says what it has lost."""

    def look() -> bool:
        now = stage.client.send(api.HOSTS.get(host_id))
        return now.status is HostStatus.NON_OPERATIONAL and reason in [p.reason for p in now.problems]

    stage.wait(look, 60, lambda: f"{stage.client.send(api.HOSTS.get(host_id))} to have lost something")


def test_a_host_whose_cable_of_a_required_network_is_out_sends_its_guest_away_alive(
    stage: Scene, office: Network
) -> None:
    vm = stage.guest("clerk", high_availability=HA)
    boot, host = boot_of(stage, vm), stage.host(vm.host_id)
    host.exec(["ip", "link", "set", SWITCHS_END, "down"])
    pulled = time.monotonic()
    is_left(stage, vm.host_id, "network_missing")
    assert vm.host_id in stage.client.send(api.NETWORKS.get(office.id)).lost
    moved = stage.until(vm.id, lambda now: now.status is VmStatus.UP and now.host_id != vm.host_id, 60)
    print(f"it runs elsewhere after {time.monotonic() - pulled:.1f} s")
    assert boot_of(stage, moved) == boot, "it moved, and was not started anew"
    assert list(stage.client.list(api.RESTARTS, filter={"vm_id": vm.id})) == []
    assert not stage.domains(host, vm)
    host.exec(["ip", "link", "set", SWITCHS_END, "up"])
    stage.host_is_up(vm.host_id, 30)
    assert stage.client.send(api.VMS.get(vm.id)).host_id == moved.host_id, "nothing moves back by itself"
    stage.remove(moved)


def beside(stage: Scene, vm: Vm, other: Vm) -> Vm:
    """The other on the same host."""
    if other.host_id != vm.host_id:
        stage.act(other.id, "migrate", {"host_id": vm.host_id})
    return stage.client.send(api.VMS.get(other.id))


def test_a_host_that_has_lost_its_iscsi_storage_keeps_whom_a_write_holds_until_its_qemu_has_ended(
    stage: Scene,
) -> None:
    iscsi = stage.client.find(api.STORAGE_DOMAINS, "iscsi")
    bound = stage.guest(
        "bound", NewDisk(storage_domain_id=iscsi.id, size_bytes=64 * MIB), high_availability=HA
    )
    free = beside(stage, bound, stage.guest("free", high_availability=HA))
    host, boot = stage.host(bound.host_id), boot_of(stage, free)
    stage.inside(bound, f"({WRITER}) > /dev/null 2>&1 &")
    host.cut_storage()
    cut = time.monotonic()
    try:
        is_left(stage, bound.host_id, "storage_unreachable")
        moved = stage.until(free.id, lambda vm: vm.status is VmStatus.UP and vm.host_id != free.host_id, 60)
        print(f"who needs nothing of it runs elsewhere after {time.monotonic() - cut:.1f} s")
        assert boot_of(stage, moved) == boot, "it moved, and was not started anew"
        assert stage.client.send(api.VMS.get(bound.id)).host_id == bound.host_id
        assert list(stage.client.list(api.RESTARTS, filter={"vm_id": bound.id})) == []
        for pid in host.pids("qemu-system-x86"):
            if bound.id in Path(f"/proc/{pid}/cmdline").read_text(errors="replace"):
                os.kill(pid, signal.SIGKILL)
        killed = time.monotonic()
        back = stage.until(bound.id, lambda vm: vm.status is VmStatus.UP and vm.host_id != bound.host_id, 60)
        print(f"whose QEMU ended runs elsewhere after {time.monotonic() - killed:.1f} s")
        assert back.epoch > bound.epoch
    finally:
        host.join_storage()
    stage.host_is_up(bound.host_id, 60)
    assert not stage.domains(host, bound)
    for vm in (back, moved):
        stage.remove(vm)
