"""What inventory may order a host to do with a domain."""

from __future__ import annotations

from enum import StrEnum

from volery.contracts.base import Done, Message, Order
from volery.contracts.cpus import GivenCpus
from volery.contracts.domain import (
    ChainSource,
    DomainDisk,
    DomainNic,
    DomainSpec,
    DomainState,
    VolumeSource,
)


class RunDomain(Message):
    """Start a transient domain. Done when QEMU runs (or waits for its migration)."""

    vm_id: str
    spec: DomainSpec
    paused: bool = False
    restore_path: str = ""
    """Restore this saved memory image instead of booting. No domain is restored from it once one has run on from it; then
    it is deleted."""
    goes_on: bool = False
    """Only a domain that lives there gets the order's epoch: one that has ended since is not started anew."""


class DomainRunning(Message):
    vm_id: str
    state: DomainState
    graphics_port: int = 0


UNKILLABLE = "unkillable"
"""The rule of a refusal to end a domain, and the reason of its report: QEMU was sent SIGKILL and waits in the kernel for
what can't be interrupted. It has its disks until it ends, which it does by itself as soon as it can."""


class StopMethod(StrEnum):
    """How a domain is stopped, from the mildest."""

    GUEST_AGENT = "guest_agent"
    ACPI = "acpi"
    DESTROY = "destroy"


class StopDomain(Message):
    """Ask the guest to power off, or end QEMU. Done when QEMU has ended; fails if it still runs after `wait_seconds`, by
    rule UNKILLABLE if the kernel can't end it.

    A domain that doesn't exist is a success: and from then on epochs up to this order's are refused.
    """

    vm_id: str
    methods: tuple[StopMethod, ...] = (StopMethod.GUEST_AGENT, StopMethod.ACPI)
    wait_seconds: float = 60.0
    """For each method in turn."""


class DomainStopped(Message):
    vm_id: str
    method: StopMethod | None = None
    """None: it was not running."""


class DomainAction(StrEnum):
    PAUSE = "pause"
    RESUME = "resume"
    RESET = "reset"
    REBOOT = "reboot"


class ActOnDomain(Message):
    vm_id: str
    action: DomainAction


class SaveDomain(Message):
    """Suspend to disk: memory to a file, then QEMU ends. Another name for each suspension."""

    vm_id: str
    path: str


class DiscardMemory(Message):
    """Saved memory that nobody goes on from any more; a file that isn't there is a success. The order's object isn't the
    VM, which may run there again, under any epoch."""

    of_vm_id: str
    path: str


class AttachDisk(Message):
    vm_id: str
    disk: DomainDisk


class DetachDisk(Message):
    """Done when the guest has let go of it (DEVICE_REMOVED)."""

    vm_id: str
    disk_id: str
    wait_seconds: float = 30.0


class ChangeMedia(Message):
    """Change or eject (source None) the medium of a CD drive."""

    vm_id: str
    disk_id: str
    source: VolumeSource | None = None
    target: str = ""
    """The drive's device name: a drive keeps its name whatever is in it."""


class ResizeDomainDisk(Message):
    vm_id: str
    disk_id: str
    size_bytes: int


class SwitchedDisk(Message):
    disk_id: str
    source: ChainSource
    """A volume right above the one that is written now."""


class SwitchDisks(Message):
    """QEMU goes on in these volumes, for all disks at one point in time. A VM that does already is a success.

    Refused with rule `not_switched` when it surely writes where it did, for all of them.
    """

    vm_id: str
    disks: tuple[SwitchedDisk, ...]


NOT_SWITCHED = "not_switched"


class AttachNic(Message):
    vm_id: str
    nic: DomainNic


class UpdateNic(Message):
    """Link state and bridge of a running NIC."""

    vm_id: str
    nic: DomainNic


class DetachNic(Message):
    vm_id: str
    nic_id: str
    wait_seconds: float = 30.0


class AdmitMigration(Message):
    """Tells the destination that this VM may arrive with the order's epoch."""

    vm_id: str
    spec: DomainSpec


class MigrationAdmitted(Message):
    shared_cpus: tuple[int, ...] | None = None
    """The destination's CPUs for guests that have none of their own; None: all."""


class MigrateDomain(Message):
    """Live migration, peer to peer, on the source. `epoch` of the order is the source's; the destination gets e+1."""

    vm_id: str
    destination_uri: str
    destination_address: str
    destination_epoch: int
    destination_order_seq: int
    bandwidth_mib_per_second: int = 0
    """0: unlimited."""
    auto_converge: bool = True
    post_copy: bool = False
    parallel_connections: int = 0
    max_downtime_ms: int = 300
    timeout_seconds: float = 600.0
    disks: tuple[DomainDisk, ...] = ()
    nics: tuple[DomainNic, ...] = ()
    cpus: GivenCpus | None = None
    """On the destination, as in its spec there."""
    shared_cpus: tuple[int, ...] | None = None
    """Of the destination, as it said when it admitted the VM."""


class MigrationDone(Message):
    vm_id: str
    downtime_ms: int = 0
    total_ms: int = 0
    transferred_bytes: int = 0


class ForgetDomain(Message):
    """No domain of this VM may be here: leftovers of a failed migration end, epochs ≤ the order's are refused."""

    vm_id: str


class OpenConsole(Message):
    """Admit one WebSocket on the agent's data server under this ticket."""

    vm_id: str
    ticket: str
    kind: str = "serial"
    """serial or vnc"""
    expires_seconds: float = 60.0


RUN_DOMAIN = Order("domain.run", RunDomain, DomainRunning)
STOP_DOMAIN = Order("domain.stop", StopDomain, DomainStopped)
ACT_ON_DOMAIN = Order("domain.act", ActOnDomain, Done, repeat_safe=False)
SAVE_DOMAIN = Order("domain.save", SaveDomain, Done, deadline_seconds=1800)
DISCARD_MEMORY = Order("domain.discard_memory", DiscardMemory, Done)
ATTACH_DISK = Order("domain.attach_disk", AttachDisk, Done)
DETACH_DISK = Order("domain.detach_disk", DetachDisk, Done)
CHANGE_MEDIA = Order("domain.change_media", ChangeMedia, Done)
RESIZE_DOMAIN_DISK = Order("domain.resize_disk", ResizeDomainDisk, Done)
SWITCH_DISKS = Order("domain.switch_disks", SwitchDisks, Done)
ATTACH_NIC = Order("domain.attach_nic", AttachNic, Done)
UPDATE_NIC = Order("domain.update_nic", UpdateNic, Done)
DETACH_NIC = Order("domain.detach_nic", DetachNic, Done)
ADMIT_MIGRATION = Order("domain.admit_migration", AdmitMigration, MigrationAdmitted)
MIGRATE_DOMAIN = Order(
    "domain.migrate", MigrateDomain, MigrationDone, repeat_safe=False, deadline_seconds=3600
)
FORGET_DOMAIN = Order("domain.forget", ForgetDomain, Done)
OPEN_CONSOLE = Order("domain.open_console", OpenConsole, Done)
