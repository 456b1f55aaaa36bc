"""From a VM to what its host is told: the domain, with its volumes and bridges as that host sees them."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping

from msgspec.structs import replace

from services.inventory import leases, resizing, restored
from services.inventory.desk import Inventory
from services.inventory.store import CLUSTERS
from volery.contracts.cluster import Cluster
from volery.contracts.cpus import GivenCpus
from volery.contracts.domain import DiskBus, DomainDisk, DomainNic, DomainSpec
from volery.contracts.errors import Kind, Refused
from volery.contracts.host_devices import GivenDevice
from volery.contracts.network import PREPARE_NETWORKS, NetworkBridge, PrepareNetworks
from volery.contracts.resizing import VmShape
from volery.contracts.scheduling import Need
from volery.contracts.storage import PREPARE_DISKS, REACH_DISKS, DiskReach, PrepareDisks, ReachDisks
from volery.contracts.together import Work
from volery.contracts.vm import CdRom, DiskAttachment, Nic, RestartWhere, RunOnce, Vm
from volery.runtime.bus import Caller

UNSAFE = re.compile(r"[^A-Za-z0-9_.-]+")


def domain_name(vm: Vm) -> str:
    """The libvirt name: readable, safe in a path, unique by the end of the id."""
    return f"{UNSAFE.sub('-', vm.name)[:40].strip('-') or 'vm'}-{vm.id[-12:]}"


def device_disk(attachment: DiskAttachment, prepared: DomainDisk) -> DomainDisk:
    return replace(
        prepared,
        bus=attachment.bus,
        target=attachment.target,
        boot_order=attachment.boot_order,
        read_only=attachment.read_only or prepared.read_only,
    )


def device_cdrom(cdrom: CdRom, prepared: Mapping[str, DomainDisk], boot_order: int = 0) -> DomainDisk:
    found = prepared.get(cdrom.disk_id)
    return DomainDisk(
        disk_id=f"cdrom-{cdrom.target}",  # the drive, whatever is in it
        source=found.source if found else None,
        shared_storage=found.shared_storage if found else False,
        cdrom=True,
        bus=DiskBus.VIRTIO_SCSI,
        target=cdrom.target,
        read_only=True,
        boot_order=boot_order,
    )


def device_nic(nic: Nic, bridges: Mapping[str, NetworkBridge]) -> DomainNic:
    found = bridges.get(nic.network_id)
    return DomainNic(
        nic_id=nic.id,
        mac=nic.mac,
        model=nic.model,
        bridge=found.bridge if found else "",
        mtu=found.mtu if found else 0,
        link_up=nic.link_up,
        boot_order=nic.boot_order,
    )


async def prepared_disks(
    inv: Inventory,
    vm_id: str,
    epoch: int,
    host_id: str,
    disk_ids: tuple[str, ...],
    caller: Caller,
    work: Work = Work.DEVICES,
) -> dict[str, DomainDisk]:
    """Disk → where it is on this host, for the placement of this epoch. `work`: what they are opened for. Raises Refused with storage's sentence, or since another VM has it open."""
    if not disk_ids:
        return {}
    question = PrepareDisks(vm_id=vm_id, host_id=host_id, disk_ids=disk_ids, epoch=epoch, work=work)
    answer = await inv.core.bus.ask(PREPARE_DISKS, question, caller)
    own = {disk.disk_id for disk in answer.disks if not (disk.shareable or disk.read_only)}
    await restored.refuse_open_elsewhere(inv, vm_id, own, "used")
    return {disk.disk_id: disk for disk in answer.disks}


async def prepared_bridges(
    inv: Inventory, host_id: str, network_ids: tuple[str, ...], caller: Caller
) -> dict[str, NetworkBridge]:
    """Network → its bridge on this host, which is made if need be. Raises Refused with network's sentence."""
    if not network_ids:
        return {}
    question = PrepareNetworks(host_id=host_id, network_ids=network_ids)
    answer = await inv.core.bus.ask(PREPARE_NETWORKS, question, caller)
    return {bridge.network_id: bridge for bridge in answer.bridges}


def disk_ids(vm: Vm, run_once: RunOnce | None = None) -> tuple[str, ...]:
    """Every volume that the VM needs, its ISOs too."""
    found = [d.disk_id for d in vm.disks if d.active] + [c.disk_id for c in vm.cdroms if c.disk_id]
    if run_once and run_once.cdrom_disk_id:
        found.append(run_once.cdrom_disk_id)
    return tuple(dict.fromkeys(found))


def network_ids(vm: Vm) -> tuple[str, ...]:
    return tuple(sorted({nic.network_id for nic in vm.nics if nic.network_id}))


async def domain_spec(
    inv: Inventory,
    vm: Vm,
    host_id: str,
    run_once: RunOnce | None,
    caller: Caller,
    cpus: GivenCpus | None = None,
    shape: VmShape | None = None,
    devices: tuple[GivenDevice, ...] = (),
    *,
    work: Work = Work.START,
) -> DomainSpec:
    """The VM as this host must run it, on the physical CPUs and with the devices that it was given there, in the shape that it
    was given if it is resized. Raises Refused when the host lacks a volume or a network, or can't hold
    the VM's lease."""
    volumes, bridges, lease = await asyncio.gather(
        prepared_disks(inv, vm.id, vm.epoch, host_id, disk_ids(vm, run_once), caller, work),
        prepared_bridges(inv, host_id, network_ids(vm), caller),
        leases.prepared(inv, vm, host_id, caller),
    )
    once = run_once or RunOnce()
    cluster = (await CLUSTERS.get(inv.core.pool, vm.cluster_id)).public
    cdroms = list(vm.cdroms)
    if once.cdrom_disk_id:
        rest = [c for c in cdroms if c.target != "sda"]
        cdroms = [CdRom(target="sda", disk_id=once.cdrom_disk_id), *rest]
    first = 1 if once.cdrom_disk_id else 0
    disks = [device_disk(d, volumes[d.disk_id]) for d in vm.disks if d.active]
    if first:
        disks = [replace(d, boot_order=d.boot_order + 1 if d.boot_order else 0) for d in disks]
    built = _own_shape(vm) if shape is None else shape
    return DomainSpec(
        vm_id=vm.id,
        name=domain_name(vm),
        title=vm.name,
        hostname=UNSAFE.sub("-", vm.name)[:63].strip("-."),
        memory_bytes=vm.memory_bytes,
        hugepage_kib=vm.hugepage_kib,
        numa_nodes=built.numa_nodes,
        vcpus=built.vcpus,
        sockets=built.sockets,
        cores=built.cores,
        threads=built.threads,
        cpu_model=vm.cpu_model or cluster.cpu_model,
        machine=vm.machine or cluster.machine,
        uefi=vm.uefi,
        disks=(
            *disks,
            *(device_cdrom(c, volumes, first if c.target == "sda" else 0) for c in cdroms),
        ),
        nics=tuple(device_nic(nic, bridges) for nic in vm.nics),
        boot_menu=once.boot_menu,
        kernel_path=once.kernel_path,
        initrd_path=once.initrd_path,
        kernel_cmdline=once.kernel_cmdline,
        installation=inv.config.installation,
        lease=lease,
        cpus=cpus,
        devices=devices,
    )


def _own_shape(vm: Vm) -> VmShape:
    return VmShape(
        vcpus=vm.vcpus, sockets=vm.sockets, cores=vm.cores, threads=vm.threads, numa_nodes=vm.numa_nodes
    )


async def need_of(
    inv: Inventory,
    vm: Vm,
    caller: Caller,
    run_once: RunOnce | None = None,
    shape: VmShape | None = None,
) -> Need:
    """What the VM asks of a host, for the scheduler; `shape`: what it has to go on with there. Raises Refused when no host can hold its lease now."""
    ids = disk_ids(vm, run_once)
    reach = DiskReach(any_host=True)
    if ids or vm.lease:
        reach = await inv.core.bus.ask(
            REACH_DISKS, ReachDisks(disk_ids=ids, lease_domain_id=vm.lease), caller
        )
    if reach.lease_problem:
        raise Refused(Kind.EXHAUSTED, f"VM {vm.name} can run nowhere now: {reach.lease_problem}", vm_id=vm.id)
    asked = need(vm, (await CLUSTERS.get(inv.core.pool, vm.cluster_id)).public, reach)
    return replace(_as_it_runs(inv, vm, asked), shape=shape)


def _as_it_runs(inv: Inventory, vm: Vm, asked: Need) -> Need:
    """A VM that runs takes what its domain has: an edit that waits for its next start gives nothing back before."""
    seen = inv.seen.get((vm.host_id, vm.id))
    if seen is None:
        return asked
    return replace(
        asked,
        memory_bytes=max(asked.memory_bytes, seen.memory_bytes),
        vcpus=asked.vcpus if resizing.is_resized(vm) else max(asked.vcpus, seen.vcpus),
    )


def need(vm: Vm, cluster: Cluster, reach: DiskReach) -> Need:
    return Need(
        vm_id=vm.id,
        cluster_id=vm.cluster_id,
        memory_bytes=vm.memory_bytes,
        vcpus=vm.vcpus,
        name=vm.name,
        hugepage_kib=vm.hugepage_kib,
        numa_nodes=vm.numa_nodes,
        cpu_model=vm.cpu_model or cluster.cpu_model,
        machine=vm.machine or cluster.machine,
        network_ids=network_ids(vm),
        host_ids=vm.affinity.host_ids,
        preferred_host_ids=vm.affinity.preferred_host_ids,
        storage_host_ids=None if reach.any_host else reach.host_ids,
        high_availability=vm.high_availability.enabled,
        priority=vm.high_availability.priority,
        same_host=vm.high_availability.where is RestartWhere.SAME_HOST,
        cpu_pinning=vm.cpu_pinning,
        threads=vm.threads,
        host_devices=vm.host_devices,
    )
