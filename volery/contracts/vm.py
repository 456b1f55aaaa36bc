"""Virtual machines: what they are, what they should be, what may be done with them. States after oVirt's VMStatus."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum

from msgspec import UNSET, UnsetType

from volery.contracts.base import Call, Done, Entity, Fact, Message
from volery.contracts.cluster import GetById
from volery.contracts.cpus import CpuPinning
from volery.contracts.domain import DiskBus, ImageFormat, NicModel, NumaNode
from volery.contracts.host_devices import AskedDevice, GivenDevice
from volery.contracts.operation import ListQuery, Operation, Page
from volery.contracts.resizing import VmShape


class VmStatus(StrEnum):
    DOWN = "down"
    IMAGE_LOCKED = "image_locked"
    """Its disks are being made."""
    WAIT_FOR_LAUNCH = "wait_for_launch"
    POWERING_UP = "powering_up"
    """QEMU runs; the guest agent has not answered yet (only for VMs that had one)."""
    UP = "up"
    PAUSED = "paused"
    SAVING_STATE = "saving_state"
    SUSPENDED = "suspended"
    RESTORING_STATE = "restoring_state"
    MIGRATING = "migrating"
    POWERING_DOWN = "powering_down"
    REBOOT_IN_PROGRESS = "reboot_in_progress"
    NOT_RESPONDING = "not_responding"
    """The host answers, the domain's QEMU doesn't."""
    UNKNOWN = "unknown"
    """The host doesn't answer: it may run or not."""
    DELETING = "deleting"


PAGE_SIZES_KIB = (2048, 1048576)
"""The sizes of huge pages that x86-64 has: 2 MiB and 1 GiB."""


class DesiredState(StrEnum):
    """What reconciling makes true."""

    DOWN = "down"
    UP = "up"
    PAUSED = "paused"
    SUSPENDED = "suspended"


class DiskAttachment(Message):
    """A disk in the VM. storage owns who uses the disk, inventory the device."""

    disk_id: str
    name: str = ""
    bus: DiskBus = DiskBus.VIRTIO
    target: str = ""
    boot_order: int = 0
    read_only: bool = False
    shareable: bool = False
    size_bytes: int = 0
    active: bool = True


class CdRom(Message):
    """A CD drive; `disk_id` is the ISO in it, "" is empty."""

    target: str = "sda"
    disk_id: str = ""


class Nic(Message):
    id: str
    name: str
    network_id: str = ""
    """"" plugs it nowhere."""
    mac: str = ""
    model: NicModel = NicModel.VIRTIO
    link_up: bool = True
    boot_order: int = 0


class GuestInfo(Message):
    """What the guest agent says."""

    agent_connected: bool = False
    hostname: str = ""
    ip_addresses: tuple[str, ...] = ()
    os: str = ""


class RestartWhere(StrEnum):
    """Where a highly available VM is to be brought back."""

    POSSIBLE = "possible"
    """Wherever it can, also when that is only its own host."""
    ELSEWHERE = "elsewhere"
    """Refused for a VM that could never run on another host: pinned to one, or with a disk in a local directory."""
    SAME_HOST = "same_host"
    """On the host on which it ran and nowhere else; when that died, once it is up again."""


class HighAvailability(Message):
    enabled: bool = False
    priority: int = 50
    """1 to 100; higher restarts first."""
    restart_after_guest_shutdown: bool = False
    """Also bring it back when its guest switched itself off."""
    where: RestartWhere = RestartWhere.POSSIBLE


class Affinity(Message):
    """Where it may run."""

    host_ids: tuple[str, ...] = ()
    """Pinned: only these. Empty: any host of the cluster."""
    preferred_host_ids: tuple[str, ...] = ()


class IoErrorPolicy(StrEnum):
    """What becomes of a VM that QEMU paused since its disk could not be read or written (oVirt's resume behaviour)."""

    RESUME = "resume"
    """Tried again, ever more seldom, until it runs on: when the storage is back."""
    LEAVE = "leave"
    """Left paused until somebody unpauses it."""
    KILL = "kill"
    """Tried again for a while, then ended; a highly available VM starts elsewhere."""


class MigrationPolicy(Message):
    allowed: bool = True
    bandwidth_mib_per_second: int = 0
    """0: the cluster's."""
    auto_converge: bool = True
    post_copy: bool = False
    parallel_connections: int = 0
    max_downtime_ms: int = 300


class Vm(Entity):
    name: str
    cluster_id: str
    data_center_id: str
    status: VmStatus = VmStatus.DOWN
    desired: DesiredState = DesiredState.DOWN
    status_reason: str = ""
    """Why it is in this state: booted, user, guest_shutdown, crashed, host_died, migrated, io_error, …"""
    description: str = ""
    tags: tuple[str, ...] = ()
    template_id: str = ""
    host_id: str = ""
    epoch: int = 0
    """Counts its placements."""
    memory_bytes: int = 0
    hugepage_kib: int = 0
    """Its memory is backed by huge pages of this size, 2048 or 1048576; 0: by ordinary ones."""
    numa_nodes: tuple[NumaNode, ...] = ()
    """NUMA nodes of the guest: all of its memory and vCPUs. None: the guest sees no nodes."""
    vcpus: int = 1
    sockets: int = 0
    cores: int = 0
    threads: int = 0
    cpu_pinning: CpuPinning = CpuPinning()
    """On which physical CPUs it runs; which it has now says its claim."""
    runs_with: VmShape | None = None
    """With `resize_and_pin`: the vCPUs, topology and NUMA nodes that its host gave it, until it ends. Its own are for when it
    is pinned otherwise."""
    host_devices: tuple[AskedDevice, ...] = ()
    """Devices of its host that it has for itself. A VM with some is never moved while it runs, nor suspended."""
    given_devices: tuple[GivenDevice, ...] = ()
    """Those that it got with its last start, and has while it runs."""
    cpu_model: str = ""
    """"" is the cluster's."""
    machine: str = ""
    uefi: bool = False
    disks: tuple[DiskAttachment, ...] = ()
    cdroms: tuple[CdRom, ...] = ()
    nics: tuple[Nic, ...] = ()
    guest: GuestInfo = GuestInfo()
    high_availability: HighAvailability = HighAvailability()
    affinity: Affinity = Affinity()
    migration: MigrationPolicy = MigrationPolicy()
    io_error: IoErrorPolicy = IoErrorPolicy.RESUME
    start_after_blackout: bool | None = None
    """Brought back when its host ended while Volery was down, too. None: if it is highly available."""
    delete_protected: bool = False
    lease: str = ""
    """The storage domain where its lease is: no host runs it without holding that. "" is none."""
    next_lease: str = ""
    """The storage domain where its next start gives it a lease, since it became highly available while it ran."""
    external: bool = False
    """Found on a host, not made by Volery: shown and left alone."""
    busy_with: str = ""
    next_run: bool = False
    """Something was edited that takes effect with the next start."""
    started_at: datetime | None = None
    stopped_at: datetime | None = None
    fits_nowhere: str = ""
    """Why no host could take it when it was last tried to start; "" once it runs. A highly available VM that was to be
    brought back is tried again when there is room."""
    restarts: int = 0
    """Automatic restarts since the last start by a person."""
    allowed_actions: tuple[str, ...] = ()
    """What may be asked of it now, by name."""


class NewDisk(Message):
    """A disk made together with its VM, or an existing one (`disk_id`) attached."""

    disk_id: str = ""
    name: str = ""
    storage_domain_id: str = ""
    size_bytes: int = 0
    format: ImageFormat = ImageFormat.QCOW2
    preallocate: bool = False
    copy_of: str = ""
    """Id of a disk whose content is copied."""
    bus: DiskBus = DiskBus.VIRTIO
    boot_order: int = 0
    read_only: bool = False
    shareable: bool = False


class NewNic(Message):
    name: str = ""
    network_id: str = ""
    mac: str = ""
    """"" takes one from the pool."""
    model: NicModel = NicModel.VIRTIO
    link_up: bool = True
    boot_order: int = 0


class CreateVm(Message):
    name: str
    cluster_id: str
    memory_bytes: int
    hugepage_kib: int = 0
    """Its memory is backed by huge pages of this size, 2048 or 1048576; 0: by ordinary ones."""
    numa_nodes: tuple[NumaNode, ...] = ()
    """NUMA nodes of the guest: all of its memory and vCPUs. None: the guest sees no nodes."""
    vcpus: int = 1
    sockets: int = 0
    cores: int = 0
    threads: int = 0
    cpu_pinning: CpuPinning = CpuPinning()
    host_devices: tuple[AskedDevice, ...] = ()
    """Devices of its host that it has for itself. A VM with some is never moved while it runs, nor suspended."""
    cpu_model: str = ""
    machine: str = ""
    uefi: bool = False
    description: str = ""
    tags: tuple[str, ...] = ()
    template_id: str = ""
    disks: tuple[NewDisk, ...] = ()
    cdroms: tuple[CdRom, ...] = ()
    nics: tuple[NewNic, ...] = ()
    high_availability: HighAvailability = HighAvailability()
    affinity: Affinity = Affinity()
    migration: MigrationPolicy = MigrationPolicy()
    io_error: IoErrorPolicy = IoErrorPolicy.RESUME
    start_after_blackout: bool | None = None
    """None: if it is highly available."""
    delete_protected: bool = False
    lease: str | None = None
    """None: if it is highly available, on the storage domain of a disk that it writes, where hosts hold leases; else
    none."""
    start: bool = False
    dry_run: bool = False


class UpdateVm(Message):
    """Unset fields stay. What a running VM can't take at once waits for its next start (`next_run`)."""

    id: str
    if_revision: int = 0
    name: str | UnsetType = UNSET
    description: str | UnsetType = UNSET
    tags: tuple[str, ...] | UnsetType = UNSET
    memory_bytes: int | UnsetType = UNSET
    hugepage_kib: int | UnsetType = UNSET
    """Only while it is down."""
    numa_nodes: tuple[NumaNode, ...] | UnsetType = UNSET
    """Only while it is down."""
    vcpus: int | UnsetType = UNSET
    sockets: int | UnsetType = UNSET
    cores: int | UnsetType = UNSET
    threads: int | UnsetType = UNSET
    cpu_pinning: CpuPinning | UnsetType = UNSET
    """Only while it is down."""
    host_devices: tuple[AskedDevice, ...] | UnsetType = UNSET
    """Only while it is down."""
    cpu_model: str | UnsetType = UNSET
    machine: str | UnsetType = UNSET
    uefi: bool | UnsetType = UNSET
    high_availability: HighAvailability | UnsetType = UNSET
    affinity: Affinity | UnsetType = UNSET
    migration: MigrationPolicy | UnsetType = UNSET
    io_error: IoErrorPolicy | UnsetType = UNSET
    start_after_blackout: bool | UnsetType | None = UNSET
    """None: if it is highly available."""
    delete_protected: bool | UnsetType = UNSET
    lease: str | UnsetType = UNSET
    """Only while it is down. Unset, a VM that becomes highly available gets one as a new one does: at once when it is
    down, else at its next start (`next_lease`)."""


class DeleteVm(Message):
    id: str
    if_revision: int = 0
    delete_disks: bool = True
    """False detaches them."""


class RunOnce(Message):
    """For this one start only."""

    paused: bool = False
    boot_menu: bool = False
    cdrom_disk_id: str = ""
    """Boot from this ISO."""
    kernel_path: str = ""
    initrd_path: str = ""
    kernel_cmdline: str = ""


class StartVm(Message):
    id: str
    if_revision: int = 0
    host_id: str = ""
    """Only on this host; "" lets the scheduler choose. A suspended VM starts only on the host that has its memory."""
    run_once: RunOnce | None = None
    dry_run: bool = False


class StopVm(Message):
    """`force` ends QEMU at once; otherwise the guest is asked (agent, then ACPI), and left running if it won't."""

    id: str
    if_revision: int = 0
    force: bool = False
    force_after_seconds: float = 0.0
    """Force it off when it has not stopped by then; 0 never does."""
    timeout_seconds: float = 120.0


class VmAction(StrEnum):
    """Imperative things that need nothing but the VM's host."""

    REBOOT = "reboot"
    RESET = "reset"
    PAUSE = "pause"
    UNPAUSE = "unpause"


class ActOnVm(Message):
    id: str
    action: VmAction
    if_revision: int = 0


class SuspendVm(Message):
    id: str
    if_revision: int = 0


class MigrateVm(Message):
    id: str
    if_revision: int = 0
    host_id: str = ""
    """To this host; "" lets the scheduler choose."""
    bandwidth_mib_per_second: int = 0
    auto_converge: bool | None = None
    post_copy: bool | None = None
    max_downtime_ms: int = 0
    timeout_seconds: float = 600.0
    dry_run: bool = False


class AttachVmDisk(Message):
    """Plugged in at once when the VM runs."""

    id: str
    disk_id: str
    if_revision: int = 0
    bus: DiskBus = DiskBus.VIRTIO
    boot_order: int = 0
    read_only: bool = False


class DetachVmDisk(Message):
    id: str
    disk_id: str
    if_revision: int = 0


class ResizeVmDisk(Message):
    """storage to inventory: grow a disk in the VM that runs with it. Repeated after it was done, a success."""

    vm_id: str
    disk_id: str
    size_bytes: int


class AttachVmNic(Message):
    id: str
    nic: NewNic
    if_revision: int = 0


class UpdateVmNic(Message):
    id: str
    nic_id: str
    if_revision: int = 0
    name: str | UnsetType = UNSET
    network_id: str | UnsetType = UNSET
    link_up: bool | UnsetType = UNSET
    boot_order: int | UnsetType = UNSET


class DetachVmNic(Message):
    id: str
    nic_id: str
    if_revision: int = 0


class ChangeVmCd(Message):
    """Insert or (disk_id "") eject, also while it runs."""

    id: str
    target: str = "sda"
    disk_id: str = ""
    if_revision: int = 0


class OpenVmConsole(Message):
    id: str
    kind: str = "serial"


class ConsoleTicket(Message):
    """The gateway bridges `/api/v1/vms/{id}/console` to this; clients never see it."""

    ticket: str
    data_address: str
    host_id: str


class RestartVm(Message):
    """ha to inventory: bring back a VM that ended, by its host's own word or with its host."""

    vm_id: str
    epoch: int
    reason: str
    preferred_host_id: str = ""
    """There first, if it fits: after a crash, where it ran."""
    avoided_host_ids: tuple[str, ...] = ()
    """Only when it fits nowhere else."""
    only_host_id: str = ""
    """There or nowhere."""


class ExplainVm(Message):
    """Where could it run, and why not elsewhere? Changes nothing."""

    id: str
    host_id: str = ""


CREATE_VM = Call("inventory.vm.create", CreateVm, Operation, mutates=True)
UPDATE_VM = Call("inventory.vm.update", UpdateVm, Vm, mutates=True)
DELETE_VM = Call("inventory.vm.delete", DeleteVm, Operation, mutates=True)
GET_VM = Call("inventory.vm.get", GetById, Vm)
LIST_VMS = Call("inventory.vm.list", ListQuery, Page)
START_VM = Call("inventory.vm.start", StartVm, Operation, mutates=True)
STOP_VM = Call("inventory.vm.stop", StopVm, Operation, mutates=True)
ACT_ON_VM = Call("inventory.vm.act", ActOnVm, Operation, mutates=True)
SUSPEND_VM = Call("inventory.vm.suspend", SuspendVm, Operation, mutates=True)
MIGRATE_VM = Call("inventory.vm.migrate", MigrateVm, Operation, mutates=True)
ATTACH_VM_DISK = Call("inventory.vm.attach_disk", AttachVmDisk, Operation, mutates=True)
DETACH_VM_DISK = Call("inventory.vm.detach_disk", DetachVmDisk, Operation, mutates=True)
RESIZE_VM_DISK = Call("inventory.vm.resize_disk", ResizeVmDisk, Done, mutates=True, timeout_seconds=60)
ATTACH_VM_NIC = Call("inventory.vm.attach_nic", AttachVmNic, Operation, mutates=True)
UPDATE_VM_NIC = Call("inventory.vm.update_nic", UpdateVmNic, Operation, mutates=True)
DETACH_VM_NIC = Call("inventory.vm.detach_nic", DetachVmNic, Operation, mutates=True)
CHANGE_VM_CD = Call("inventory.vm.change_cd", ChangeVmCd, Operation, mutates=True)
OPEN_VM_CONSOLE = Call("inventory.vm.open_console", OpenVmConsole, ConsoleTicket, timeout_seconds=20)
RESTART_VM = Call("inventory.vm.restart", RestartVm, Operation, mutates=True)

VM_CHANGED = Fact("fact.inventory.vm.{id}.changed", Vm)
VM_DELETED = Fact("fact.inventory.vm.{id}.deleted", Vm)
