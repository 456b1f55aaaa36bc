"""What a VM may be and what may be done with it next. Pure: no bus, no database, no clock."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from msgspec import UnsetType
from msgspec.structs import asdict, replace

from services.inventory import host_devices, numa, resizing
from services.inventory.config import InventoryConfig
from volery.contracts import together
from volery.contracts.base import Message
from volery.contracts.cpus import CpuPinning, PinningPolicy
from volery.contracts.domain import DiskBus, DomainState
from volery.contracts.errors import conflict, invalid
from volery.contracts.host import Host, HostStatus, PowerSaving
from volery.contracts.together import By, Held, Holder, Thing, Work
from volery.contracts.vm import PAGE_SIZES_KIB, CreateVm, UpdateVm, Vm, VmStatus
from volery.runtime import checks

KIB = 1024
MIB = 1024 * 1024
MIN_MEMORY_BYTES = 16 * MIB
MAX_MEMORY_BYTES = 64 * 1024 * 1024 * MIB  # 64 TiB, what oVirt validated for EL9 hosts
MAX_VCPUS = 2048
MAX_HOST_CPUS = 8192  # what Linux can be built for
MAX_DISKS = 64
MAX_NICS = 32

S = VmStatus
RUNNING = frozenset({S.UP, S.POWERING_UP, S.REBOOT_IN_PROGRESS})
ALIVE = RUNNING | {S.PAUSED, S.POWERING_DOWN, S.MIGRATING, S.NOT_RESPONDING, S.UNKNOWN, S.SAVING_STATE}

WORK: dict[str, tuple[Work, str]] = {
    "start": (Work.START, "started"),
    "stop": (Work.STOP, "stopped"),
    "reboot": (Work.CONTROL, "rebooted"),
    "reset": (Work.CONTROL, "reset"),
    "pause": (Work.CONTROL, "paused"),
    "unpause": (Work.CONTROL, "unpaused"),
    "suspend": (Work.SUSPEND, "suspended"),
    "migrate": (Work.MIGRATE, "migrated"),
    "delete": (Work.DELETE, "deleted"),
    "attach_disk": (Work.DEVICES, "given a disk"),
    "detach_disk": (Work.DEVICES, "rid of a disk"),
    "attach_nic": (Work.DEVICES, "given a NIC"),
    "update_nic": (Work.DEVICES, "given another network"),
    "detach_nic": (Work.DEVICES, "rid of a NIC"),
    "change_cd": (Work.DEVICES, "given another CD"),
}
"""Action → what it is in the table of what may happen together, and what a VM would be."""

ALLOWED: dict[str, frozenset[VmStatus]] = {
    "start": frozenset({S.DOWN, S.SUSPENDED}),
    "stop": RUNNING | {S.PAUSED, S.SUSPENDED, S.POWERING_DOWN, S.NOT_RESPONDING, S.UNKNOWN},
    "reboot": RUNNING,
    "reset": RUNNING | {S.NOT_RESPONDING},
    "pause": RUNNING,
    "unpause": frozenset({S.PAUSED}),
    "suspend": RUNNING | {S.PAUSED},
    "migrate": RUNNING | {S.PAUSED},
    "delete": frozenset({S.DOWN, S.DELETING}),
    "attach_disk": RUNNING | {S.DOWN},
    "detach_disk": RUNNING | {S.DOWN},
    "attach_nic": RUNNING | {S.DOWN},
    "update_nic": RUNNING | {S.DOWN, S.PAUSED},
    "detach_nic": RUNNING | {S.DOWN},
    "change_cd": RUNNING | {S.DOWN, S.PAUSED},
    "console": RUNNING | {S.PAUSED, S.POWERING_DOWN},
}
"""Action → statuses from which it may be asked."""


def allowed_actions(vm: Vm) -> tuple[str, ...]:
    """What may be asked of the VM now."""
    if vm.external or vm.busy_with:
        return ()
    possible = (action for action, statuses in ALLOWED.items() if vm.status in statuses)
    return tuple(action for action in possible if not host_devices.stays(vm, action))


def check_action(vm: Vm, action: str, holder: Holder | None = None) -> None:
    """Raises Refused(conflict) with what would have to be true. `holder`: whom it is busy with, if that was looked up."""
    if vm.external:
        raise conflict(
            f"VM {vm.name} was not made by Volery: it is shown but left alone; manage it where it was made",
            vm_id=vm.id,
        )
    if vm.busy_with:
        work, done = WORK[action]
        at_work = holder or Holder(By.OPERATION, vm.busy_with, None)
        together.refuse(work, Thing(Held.VM, vm.id, vm.name), [at_work], done=done)
    if vm.status not in ALLOWED[action]:
        possible = ", ".join(sorted(ALLOWED[action]))
        raise conflict(
            f"can't {action.replace('_', ' ')} VM {vm.name}: it is {vm.status}, and would have to be {possible}",
            status=vm.status,
            vm_id=vm.id,
        )
    host_devices.check_action(vm, action)


def with_actions(vm: Vm) -> Vm:
    """The VM with what follows from its status: what may be asked of it, and that one that is down runs with nothing."""
    runs_with = None if vm.status is VmStatus.DOWN else vm.runs_with
    return replace(vm, allowed_actions=allowed_actions(vm), runs_with=runs_with)


# --- what a VM may be ---------------------------------------------------------------------------------


def check_shape(memory_bytes: int, vcpus: int, sockets: int, cores: int, threads: int) -> None:
    checks.between(memory_bytes, MIN_MEMORY_BYTES, MAX_MEMORY_BYTES, "memory_bytes", "bytes")
    checks.between(vcpus, 1, MAX_VCPUS, "vcpus")
    given = (sockets, cores, threads)
    if any(given):
        if min(given) < 1:
            raise invalid("a CPU topology names sockets, cores and threads, each at least 1", field="sockets")
        if sockets * cores * threads != vcpus:
            raise invalid(
                f"the topology {sockets} x {cores} x {threads} gives {sockets * cores * threads} vCPUs, not {vcpus}",
                field="vcpus",
            )


def check_backing(memory_bytes: int, hugepage_kib: int) -> None:
    """Huge pages back a VM's memory wholly, or not at all."""
    if not hugepage_kib:
        return
    if hugepage_kib not in PAGE_SIZES_KIB:
        raise invalid(
            f"there are no huge pages of {hugepage_kib} KiB: hugepage_kib is {' or '.join(map(str, PAGE_SIZES_KIB))}, or 0 for "
            "ordinary memory",
            field="hugepage_kib",
        )
    rest = memory_bytes % (hugepage_kib * KIB)
    if rest:
        less, more = memory_bytes - rest, memory_bytes - rest + hugepage_kib * KIB
        near = f"{less} or {more}" if less else str(more)
        raise invalid(
            f"huge pages of {hugepage_kib} KiB back whole pages only: memory_bytes is a multiple of {hugepage_kib * KIB}, e.g. "
            f"{near}, not {memory_bytes}",
            field="memory_bytes",
        )


def check_pinning(pinning: CpuPinning, vcpus: int) -> None:
    """Whether there is such a host is the scheduler's to say."""
    field = "cpu_pinning.pins"
    if pinning.policy is not PinningPolicy.MANUAL:
        if pinning.pins:
            raise invalid(f"only manual pinning has pins; {pinning.policy} chooses CPUs itself", field=field)
        return
    if len(pinning.pins) != vcpus:
        raise invalid(
            f"manual pinning names the CPUs of each vCPU: {vcpus} lists are needed, {len(pinning.pins)} are there",
            field=field,
        )
    for number, cpus in enumerate(pinning.pins):
        if not cpus or len(set(cpus)) != len(cpus) or not all(0 <= cpu < MAX_HOST_CPUS for cpu in cpus):
            raise invalid(
                f"vCPU {number} is pinned to at least one CPU of the host, each of them once, from 0 to "
                f"{MAX_HOST_CPUS - 1}",
                field=field,
            )


def check_create(ask: CreateVm) -> None:
    """Everything about a new VM that needs no look-up."""
    checks.name(ask.name)
    checks.text(ask.description, "description")
    checks.tags(ask.tags)
    check_shape(ask.memory_bytes, ask.vcpus, ask.sockets, ask.cores, ask.threads)
    check_backing(ask.memory_bytes, ask.hugepage_kib)
    numa.check(ask.numa_nodes, ask.memory_bytes, ask.vcpus, ask.hugepage_kib)
    check_pinning(ask.cpu_pinning, ask.vcpus)
    resizing.check(ask.cpu_pinning, ask.numa_nodes)
    host_devices.check(ask.host_devices)
    if len(ask.disks) > MAX_DISKS:
        raise invalid(f"a VM has at most {MAX_DISKS} disks, not {len(ask.disks)}", field="disks")
    if len(ask.nics) > MAX_NICS:
        raise invalid(f"a VM has at most {MAX_NICS} NICs, not {len(ask.nics)}", field="nics")
    for disk in ask.disks:
        if disk.disk_id:
            checks.object_id(disk.disk_id, "disk")
        else:
            checks.object_id(disk.storage_domain_id, "storage domain")
            if disk.size_bytes <= 0 and not disk.copy_of:
                raise invalid("a new disk has a size above 0, or copies another disk", field="disks")
    existing = [d.disk_id for d in ask.disks if d.disk_id]
    if len(set(existing)) != len(existing):
        raise invalid("a disk is attached to a VM once", field="disks")
    for nic in ask.nics:
        if nic.network_id:
            checks.object_id(nic.network_id, "network")
        check_mac(nic.mac)
    check_policies(ask.affinity.host_ids + ask.affinity.preferred_host_ids, ask.high_availability.priority)


def check_policies(host_ids: Sequence[str], priority: int) -> None:
    for host_id in host_ids:
        checks.object_id(host_id, "host")
    checks.between(priority, 1, 100, "high_availability.priority")


def check_elsewhere(
    name: str, host_ids: Sequence[str], local_host_id: str, *, local_data_center: bool
) -> None:
    """Raises Refused(conflict) for a VM that could never be restarted on another host. `local_host_id`: whose directory
    holds a disk of it."""
    same = "or ask for it to be restarted on its own host only (high_availability.where: same_host)"
    if len(set(host_ids)) == 1:
        raise conflict(
            f"VM {name} can't be restarted elsewhere: it is pinned to host {host_ids[0]} alone. Pin it to another host "
            f"too, {same}",
            rule="pinned",
            host_id=host_ids[0],
        )
    if local_data_center:
        raise conflict(
            f"VM {name} can't be restarted elsewhere: its data center is local, one host whose storage nobody else "
            f"reaches. Use a cluster of another data center, {same}",
            rule="local_data_center",
        )
    if local_host_id:
        raise conflict(
            f"VM {name} can't be restarted elsewhere: a disk of it is in a local directory of host {local_host_id}. Put "
            f"its disks on a shared storage domain, {same}",
            rule="local_disk",
            host_id=local_host_id,
        )


MAC = re.compile(r"^[0-9a-f]{2}(:[0-9a-f]{2}){5}$")


def check_mac(mac: str) -> None:
    if not mac:
        return
    if not MAC.match(mac.lower()):
        raise invalid(f"{mac!r} is not a MAC address like 56:6f:12:34:56:78", field="mac")
    if int(mac[:2], 16) & 1:
        raise invalid(f"{mac} is a multicast address; a NIC needs one whose first byte is even", field="mac")


def given(ask: Message) -> dict[str, Any]:
    """The fields that the question sets, without those that say which object."""
    return {
        field: value
        for field, value in asdict(ask).items()
        if field not in ("id", "if_revision", "dry_run") and not isinstance(value, UnsetType)
    }


NOW = frozenset(
    {
        "name",
        "description",
        "tags",
        "high_availability",
        "affinity",
        "migration",
        "io_error",
        "start_after_blackout",
        "delete_protected",
        "lease",
    }
)
"""Fields that take effect at once, also while it runs; the others wait for the next start."""


SETTLED_AT_START = {"hugepage_kib": "huge pages", "numa_nodes": "NUMA nodes"}
"""Fields that are changed only while it is down, and what they are called."""


def edited(vm: Vm, ask: UpdateVm) -> Vm:
    """The VM after the edit. Raises Refused(invalid), or Refused(conflict) for what can't be edited now."""
    fields = given(ask)
    new = replace(vm, **fields)
    checks.name(new.name)
    checks.text(new.description, "description")
    checks.tags(new.tags)
    check_shape(new.memory_bytes, new.vcpus, new.sockets, new.cores, new.threads)
    check_backing(new.memory_bytes, new.hugepage_kib)
    numa.check(new.numa_nodes, new.memory_bytes, new.vcpus, new.hugepage_kib)
    for field, what in SETTLED_AT_START.items():
        if getattr(new, field) != getattr(vm, field) and vm.status is not VmStatus.DOWN:
            raise conflict(
                f"the {what} of VM {vm.name} can't be changed while it is {vm.status}: where its memory is is settled when it "
                "starts; stop it first",
                field=field,
                vm_id=vm.id,
            )
    check_pinning(new.cpu_pinning, new.vcpus)
    resizing.check(new.cpu_pinning, new.numa_nodes)
    host_devices.check(new.host_devices)
    host_devices.check_edit(vm, new)
    if new.cpu_pinning != vm.cpu_pinning and vm.status is not VmStatus.DOWN:
        raise conflict(
            f"VM {vm.name} is {vm.status}: shut it down before its CPU pinning is changed",
            rule="cpu_pinning",
            status=vm.status,
        )
    check_policies(new.affinity.host_ids + new.affinity.preferred_host_ids, new.high_availability.priority)
    later = vm.status is not VmStatus.DOWN and any(
        field not in NOW and getattr(vm, field) != value for field, value in fields.items()
    )
    return replace(new, next_run=vm.next_run or later)


ASKED = (
    "memory_bytes",
    "hugepage_kib",
    "numa_nodes",
    "vcpus",
    "threads",
    "cpu_pinning",
    "host_devices",
    "cpu_model",
    "machine",
    "affinity",
    "high_availability",
)
"""What a VM asks of the host on which it is brought back, as far as an edit goes."""


def asks_anew(old: Vm, new: Vm) -> bool:
    return any(getattr(old, name) != getattr(new, name) for name in ASKED)


def check_cluster(
    name: str,
    description: str,
    tags: Sequence[str],
    memory_percent: int,
    cpu_ratio: float,
    host_failures: int,
) -> None:
    checks.name(name)
    checks.text(description, "description")
    checks.tags(tags)
    checks.between(memory_percent, 50, 400, "memory_overcommit_percent", "%")
    checks.between(cpu_ratio, 0.5, 100, "cpu_overcommit_ratio")
    checks.between(host_failures, 0, 16, "reserve_host_failures", "hosts")


STORAGE_UNREACHABLE = "storage_unreachable"
NETWORK_MISSING = "network_missing"
"""Why a host is non-operational: it has lost a storage domain, or a required network."""

IO_ERROR = "io_error"
"""The reason of a VM that QEMU paused since a disk could not be read or written."""

PREFIX: dict[DiskBus, str] = {DiskBus.VIRTIO: "vd", DiskBus.VIRTIO_SCSI: "sd", DiskBus.SATA: "sd"}


def free_target(taken: Sequence[str], bus: DiskBus) -> str:
    """The next device name of the bus: vda … vdz, vdaa …"""
    for number in range(26 * 27):
        name = PREFIX[bus] + _letters(number)
        if name not in taken:
            return name
    raise invalid("no device name is left for another disk", field="disks")


def _letters(number: int) -> str:
    text = ""
    number += 1
    while number:
        number, rest = divmod(number - 1, 26)
        text = chr(97 + rest) + text
    return text


# --- what a host's report means -------------------------------------------------------------------------

STATUS_OF: dict[DomainState, VmStatus] = {
    DomainState.RUNNING: S.UP,
    DomainState.PAUSED: S.PAUSED,
    DomainState.SHUTTING_DOWN: S.POWERING_DOWN,
    DomainState.PMSUSPENDED: S.PAUSED,
    DomainState.INCOMING: S.MIGRATING,
    DomainState.CRASHED: S.DOWN,
    DomainState.SHUTOFF: S.DOWN,
    DomainState.GONE: S.DOWN,
}

# --- what a host is -----------------------------------------------------------------------------------------


LIVENESS: dict[str, HostStatus] = {
    "connecting": HostStatus.CONNECTING,
    "non_responsive": HostStatus.NON_RESPONSIVE,
    "dead": HostStatus.DOWN,
}
"""ha's word → how the host is shown for it."""


def host_problems(host: Host, minimum_libvirt: int) -> tuple[str, ...]:
    """Why a host can't run VMs of its cluster, as codes."""
    found = []
    capabilities = host.capabilities
    if capabilities.libvirt_version and capabilities.libvirt_version < minimum_libvirt:
        found.append("libvirt_too_old")
    if capabilities.arch and capabilities.arch != "x86_64":
        found.append("architecture_unknown")
    return tuple(found)


def is_leaving(host: Host) -> bool:
    """Whether an operation is at work on it that its VMs leave; of no use but for one in maintenance."""
    return bool(host.busy_with) and host.power_saving not in (PowerSaving.ASLEEP, PowerSaving.WAKING)


def switched_on(host: Host) -> Host:
    """A host that slept and reports under another boot: somebody switched it on. It stays in maintenance, as whoever did that
    may be at work on it."""
    return replace(
        host,
        power_saving=PowerSaving.AWAKE,
        power_saving_reason="it was switched on without being woken: activate it to use it again",
    )


def host_with_status(
    host: Host, liveness: str, maintenance: bool, preparing: bool, config: InventoryConfig
) -> Host:
    """The host with the status that follows from what is known of it."""
    lost = (problem.reason for problem in host.problems)
    problems = tuple(dict.fromkeys((*host_problems(host, config.minimum_libvirt_version), *lost)))
    if host.enrolled_at is None or not host.agent_generation:
        status = HostStatus.INSTALLING
    elif maintenance:
        status = HostStatus.PREPARING_FOR_MAINTENANCE if preparing else HostStatus.MAINTENANCE
    elif liveness in LIVENESS:
        status = LIVENESS[liveness]
    elif problems:
        status = HostStatus.NON_OPERATIONAL
    else:
        status = HostStatus.UP
    return replace(host, status=status, reasons=problems)
