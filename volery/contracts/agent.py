"""What control plane and host agent say to each other: orders, their results, beats, reports, samples.

An order goes to `host.{host_id}.order` in a signed envelope; everything an agent says about its host is a
numbered fact under `fact.host.{host_id}.{owner}.…`, where the owner is the service that hears it.
"""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from typing import Any

import msgspec

from volery.contracts.base import Call, Fact, Message, Order
from volery.contracts.domain import (
    DomainDisk,
    DomainNic,
    DomainSpec,
    DomainState,
    ImageFormat,
    VolumeSource,
)
from volery.contracts.errors import Problem


# --- orders: the envelope -------------------------------------------------------------------------


class OrderEnvelope(Message):
    """One order on its way to a host. Refused for another generation, a lower epoch or order_seq, or when stale."""

    order_id: str
    host_id: str
    agent_generation: str
    """The id of the journal that the owner believes the agent has; "" before its first report was committed."""
    owner: str
    kind: str
    object_id: str
    order_seq: int
    """Counts the orders for this object in its owner's row."""
    beat_seq: int
    """The newest beat of this host its owner had seen when it sent the order."""
    ttl_ms: int
    """How much of the agent's own monotonic time may have passed since that beat."""
    body: msgspec.Raw
    epoch: int = 0
    """The VM's placement epoch; 0 for objects that have none."""
    operation_id: str = ""
    deadline_seconds: float = 300.0
    repeat_safe: bool = True


class OrderState(StrEnum):
    """How far an order is, as the agent's journal has it."""

    ACCEPTED = "accepted"
    FINISHED = "finished"
    REFUSED = "refused"
    UNKNOWN = "unknown"
    """Never heard of it (answer to a cancel or a question)."""


class Outcome(StrEnum):
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"
    OUTCOME_UNKNOWN = "outcome_unknown"
    """The agent died in the middle of something that can't be repeated. It never tries it again."""


class OrderAck(Message):
    order_id: str
    state: OrderState
    problem: Problem | None = None
    outcome: Outcome | None = None
    result: msgspec.Raw | None = None


class CancelOrder(Message):
    """Sent to `host.{host_id}.cancel`. Journaled: an order that comes after its cancel is refused."""

    host_id: str
    order_id: str


SIGNATURE_HEADER = "Volery-Signature"
ORDER_SUBJECT = "host.{host_id}.order"
CANCEL_SUBJECT = "host.{host_id}.cancel"
COMMITTED_SUBJECT = "host.{host_id}.committed"
REPORT_SUBJECT = "host.{host_id}.report"
"""Ask for a full report, in a CommittedWord with `seq` 0."""
BEAT_SUBJECT = "beat.host.{host_id}"
METRICS_SUBJECT = "metrics.host.{host_id}"


class CommittedWord(Message):
    """The owner has committed this host's facts up to `seq`: the agent may forget them."""

    host_id: str
    owner: str
    generation: str
    seq: int


# --- facts from hosts -------------------------------------------------------------------------------


class FromHost(Message):
    """Numbered by the agent, per owner, without gaps within a generation."""

    host_id: str
    generation: str
    seq: int
    boot_id: str
    at: datetime
    """The host's clock: shown to people, never compared."""


class OrderFinished(FromHost):
    order_id: str
    kind: str
    object_id: str
    epoch: int
    outcome: Outcome
    problem: Problem | None = None
    result: msgspec.Raw | None = None
    """The order's answer, encoded."""


class OrderProgressed(FromHost):
    """Coalescible: only the newest per order is kept."""

    order_id: str
    object_id: str
    progress: float
    """0 to 100."""
    details: dict[str, Any] = {}


class DomainReport(Message):
    """One domain as the host has it now."""

    vm_id: str
    epoch: int
    """From the domain's metadata; 0 for a domain that Volery did not make."""
    order_seq: int
    name: str
    state: DomainState
    reason: str = ""
    """libvirt's reason, lower case: booted, migrated, crashed, ioerror, user, …"""
    installation: str = ""
    memory_bytes: int = 0
    vcpus: int = 0
    responsive: bool = True
    """False: a libvirt call about it has not come back for more than 10 s."""
    agent_connected: bool = False
    hostname: str = ""
    ip_addresses: tuple[str, ...] = ()
    guest_os: str = ""
    disk_ids: tuple[str, ...] = ()
    nic_ids: tuple[str, ...] = ()


class DomainChanged(FromHost):
    """The state of a domain after a libvirt event. Coalescible per domain: only the newest matters."""

    domain: DomainReport


class DomainEventHappened(FromHost):
    """A libvirt event that isn't a state: reboot, watchdog, io_error, block_threshold, agent_lifecycle,
    device_removed, device_removal_failed, block_job, job_completed, migration_iteration, memory_failure, panic."""

    vm_id: str
    epoch: int
    event: str
    details: dict[str, Any] = {}


class NumaCell(Message):
    cell: int
    memory_bytes: int
    cpus: tuple[int, ...] = ()


class HostCapabilities(Message):
    """What a host can do, from libvirt's capabilities and /proc."""

    hostname: str = ""
    hardware_uuid: str = ""
    os: str = ""
    kernel: str = ""
    libvirt_version: int = 0
    """libvirt's number: major * 1,000,000 + minor * 1,000 + release."""
    qemu_version: int = 0
    agent_version: str = ""
    arch: str = "x86_64"
    kvm: bool = False
    """Whether KVM guests were proven to run here (not merely /dev/kvm)."""
    cpus: int = 0
    sockets: int = 0
    cores_per_socket: int = 0
    threads_per_core: int = 0
    cpu_vendor: str = ""
    cpu_model: str = ""
    cpu_models: tuple[str, ...] = ()
    """libvirt CPU models usable here."""
    cpu_flags: tuple[str, ...] = ()
    memory_bytes: int = 0
    numa: tuple[NumaCell, ...] = ()
    machines: tuple[str, ...] = ()
    nics: tuple[str, ...] = ()
    """Physical network devices that could carry a logical network."""
    features: tuple[str, ...] = ()
    """What the kernel and the installed programs allow: vlan, vxlan, bridge_vlan_filtering, iscsi, nat, …"""
    data_address: str = ""
    """host:port of the agent's image and console server."""
    migration_address: str = ""
    """Where other hosts reach this host's QEMU for live migration."""
    libvirt_uri: str = ""
    """Where other hosts' libvirtd reach this host's libvirtd for live migration."""


class JournalOrder(Message):
    order_id: str
    owner: str
    state: OrderState
    outcome: Outcome | None = None


class HostReported(FromHost):
    """The full state of a host. Said at start, on request and after a gap; taken as truth by its owner."""

    capabilities: HostCapabilities
    domains: tuple[DomainReport, ...]
    orders: tuple[JournalOrder, ...] = ()
    """The owner's orders still in the journal."""
    gap: bool = False
    """Facts were dropped from the spool before this report."""


class VolumeReport(Message):
    path: str
    size_bytes: int
    """Virtual size."""
    used_bytes: int
    format: ImageFormat


class StorageDomainReport(Message):
    domain_id: str
    reachable: bool
    problem: str = ""
    capacity_bytes: int = 0
    available_bytes: int = 0
    volumes: tuple[VolumeReport, ...] = ()
    strangers: tuple[str, ...] = ()
    """Files or LUNs found there that no disk of ours explains."""


class StorageReported(FromHost):
    domains: tuple[StorageDomainReport, ...]
    orders: tuple[JournalOrder, ...] = ()
    gap: bool = False


class BridgeReport(Message):
    network_id: str
    bridge: str
    in_sync: bool
    problem: str = ""


class NetworksReported(FromHost):
    networks: tuple[BridgeReport, ...]
    nics: tuple[str, ...] = ()
    orders: tuple[JournalOrder, ...] = ()
    gap: bool = False


HOST_REPORTED = Fact("fact.host.{host_id}.inventory.reported", HostReported)
DOMAIN_CHANGED = Fact("fact.host.{host_id}.inventory.domain_changed", DomainChanged)
DOMAIN_EVENT_HAPPENED = Fact("fact.host.{host_id}.inventory.event_happened", DomainEventHappened)
STORAGE_REPORTED = Fact("fact.host.{host_id}.storage.reported", StorageReported)
NETWORKS_REPORTED = Fact("fact.host.{host_id}.network.reported", NetworksReported)

INVENTORY_ORDER_FINISHED = Fact("fact.host.{host_id}.inventory.order_finished", OrderFinished)
STORAGE_ORDER_FINISHED = Fact("fact.host.{host_id}.storage.order_finished", OrderFinished)
NETWORK_ORDER_FINISHED = Fact("fact.host.{host_id}.network.order_finished", OrderFinished)
INVENTORY_ORDER_PROGRESSED = Fact("fact.host.{host_id}.inventory.order_progressed", OrderProgressed)
STORAGE_ORDER_PROGRESSED = Fact("fact.host.{host_id}.storage.order_progressed", OrderProgressed)
NETWORK_ORDER_PROGRESSED = Fact("fact.host.{host_id}.network.order_progressed", OrderProgressed)


# --- beats and samples: core NATS, losing one costs nothing -----------------------------------------


class Beat(Message):
    """Every 500 ms on `beat.host.{host_id}`."""

    host_id: str
    generation: str
    boot_id: str
    beat_seq: int
    """Counts within one run of the agent's machine (boot); orders name the newest one seen."""
    clock_ms: int
    """The host's Unix time: for the skew warning only."""
    hypervisor_ok: bool = True
    stuck_threads: int = 0


class DiskSample(Message):
    disk_id: str
    read_bytes: int = 0
    written_bytes: int = 0
    read_requests: int = 0
    write_requests: int = 0
    allocated_bytes: int = 0


class NicSample(Message):
    nic_id: str
    received_bytes: int = 0
    sent_bytes: int = 0
    received_packets: int = 0
    sent_packets: int = 0
    dropped_packets: int = 0


class VmSample(Message):
    vm_id: str
    cpu_percent: float = 0.0
    """Of one CPU: 200 is two busy vCPUs."""
    memory_used_bytes: int = 0
    memory_bytes: int = 0
    disks: tuple[DiskSample, ...] = ()
    nics: tuple[NicSample, ...] = ()


class HostSample(Message):
    """Every 15 s on `metrics.host.{host_id}`; counters are totals since the domain started."""

    host_id: str
    boot_id: str
    at: datetime
    cpu_percent: float = 0.0
    """Of the whole host: 100 is every CPU busy."""
    memory_used_bytes: int = 0
    memory_bytes: int = 0
    swap_used_bytes: int = 0
    load: float = 0.0
    received_bytes: int = 0
    sent_bytes: int = 0
    vms: tuple[VmSample, ...] = ()


# --- inventory's orders: domains ---------------------------------------------------------------------


class RunDomain(Message):
    """Start a transient domain. Done when QEMU runs (or waits for its migration)."""

    vm_id: str
    spec: DomainSpec
    paused: bool = False
    restore_path: str = ""
    """Restore this saved memory image instead of booting; deleted once the domain runs."""


class DomainRunning(Message):
    vm_id: str
    state: DomainState
    graphics_port: int = 0


class StopMethod(StrEnum):
    """How a domain is stopped, from the mildest."""

    GUEST_AGENT = "guest_agent"
    ACPI = "acpi"
    DESTROY = "destroy"


class StopDomain(Message):
    """Ask the guest to power off, or end QEMU. Done when QEMU has ended; fails if it still runs after `wait_seconds`.

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
    """Suspend to disk: memory to a file, then QEMU ends."""

    vm_id: str
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


class ResizeDomainDisk(Message):
    vm_id: str
    disk_id: str
    size_bytes: int


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


class Done(Message):
    """Nothing to add."""


RUN_DOMAIN = Order("domain.run", RunDomain, DomainRunning)
STOP_DOMAIN = Order("domain.stop", StopDomain, DomainStopped)
ACT_ON_DOMAIN = Order("domain.act", ActOnDomain, Done, repeat_safe=False)
SAVE_DOMAIN = Order("domain.save", SaveDomain, Done, deadline_seconds=1800)
ATTACH_DISK = Order("domain.attach_disk", AttachDisk, Done)
DETACH_DISK = Order("domain.detach_disk", DetachDisk, Done)
CHANGE_MEDIA = Order("domain.change_media", ChangeMedia, Done)
RESIZE_DOMAIN_DISK = Order("domain.resize_disk", ResizeDomainDisk, Done)
ATTACH_NIC = Order("domain.attach_nic", AttachNic, Done)
UPDATE_NIC = Order("domain.update_nic", UpdateNic, Done)
DETACH_NIC = Order("domain.detach_nic", DetachNic, Done)
ADMIT_MIGRATION = Order("domain.admit_migration", AdmitMigration, Done)
MIGRATE_DOMAIN = Order(
    "domain.migrate", MigrateDomain, MigrationDone, repeat_safe=False, deadline_seconds=3600
)
FORGET_DOMAIN = Order("domain.forget", ForgetDomain, Done)
OPEN_CONSOLE = Order("domain.open_console", OpenConsole, Done)


# --- storage's orders ----------------------------------------------------------------------------------


class DirectoryLocation(Message, tag="directory"):
    """A directory that the administrator mounted (or that is local to one host)."""

    path: str


class IscsiLocation(Message, tag="iscsi"):
    portal: str
    iqn: str
    chap_user: str = ""
    chap_password: str = ""


StorageLocation = DirectoryLocation | IscsiLocation


class ConnectStorage(Message):
    """Make the storage usable on this host and say what is there. Writes the domain's marker file when `initialise`."""

    domain_id: str
    location: StorageLocation
    initialise: bool = False
    known: tuple[str, ...] = ()
    """Paths or LUN numbers that disks of ours explain; anything else found is a stranger."""


class DisconnectStorage(Message):
    domain_id: str


class DiscoverIscsi(Message):
    portal: str
    chap_user: str = ""
    chap_password: str = ""


class DiscoveredLun(Message):
    lun: int
    size_bytes: int
    product: str = ""


class DiscoveredTarget(Message):
    iqn: str
    portal: str
    luns: tuple[DiscoveredLun, ...] = ()
    problem: str = ""
    """Why its LUNs could not be listed, e.g. CHAP refused."""


class IscsiTargets(Message):
    targets: tuple[DiscoveredTarget, ...] = ()


class CreateVolume(Message):
    disk_id: str
    source: VolumeSource
    size_bytes: int
    preallocate: bool = False
    check_bytes: int = 0


class ResizeVolume(Message):
    disk_id: str
    source: VolumeSource
    size_bytes: int


class DeleteVolume(Message):
    """A volume that isn't there is a success. `wipe` overwrites it with zeros first."""

    disk_id: str
    source: VolumeSource
    wipe: bool = False


class CopyVolume(Message):
    """qemu-img convert, in a child process that ends with the agent's order."""

    disk_id: str
    source: VolumeSource
    target: VolumeSource
    size_bytes: int


class ImportVolume(Message):
    """Download an image over http(s) and convert it into the volume."""

    disk_id: str
    url: str
    target: VolumeSource
    max_bytes: int
    sha256: str = ""


class InspectVolume(Message):
    """Detect format and sizes, check the image: refused with a backing file, an external data file or an absurd size."""

    disk_id: str
    source: VolumeSource
    max_bytes: int = 0


class VolumeInfo(Message):
    size_bytes: int
    used_bytes: int
    format: ImageFormat
    sha256: str = ""


class TransferDirection(StrEnum):
    UPLOAD = "upload"
    DOWNLOAD = "download"


class OpenTransfer(Message):
    """Admit ranged PUT or GET requests under this ticket on the agent's data server.

    Uploads land in a staging file beside the volume; FINISH_TRANSFER checks and converts them.
    """

    transfer_id: str
    disk_id: str
    ticket: str
    direction: TransferDirection
    source: VolumeSource
    size_bytes: int
    """Upload: how many bytes will come. Download: 0."""
    format: ImageFormat = ImageFormat.RAW
    """Download: the format to be sent."""
    expires_seconds: float = 86400.0


class TransferOpened(Message):
    data_address: str
    size_bytes: int
    received_bytes: int = 0
    """Where an interrupted upload goes on."""


class FinishTransfer(Message):
    """Checks size, checksum and image, converts an upload into the volume, and forgets the ticket."""

    transfer_id: str
    disk_id: str
    target: VolumeSource
    max_bytes: int
    sha256: str = ""
    cancel: bool = False
    """Only clean up."""


CONNECT_STORAGE = Order("storage.connect", ConnectStorage, StorageDomainReport)
DISCONNECT_STORAGE = Order("storage.disconnect", DisconnectStorage, Done)
DISCOVER_ISCSI = Order("storage.discover_iscsi", DiscoverIscsi, IscsiTargets)
CREATE_VOLUME = Order("volume.create", CreateVolume, VolumeInfo, deadline_seconds=3600)
RESIZE_VOLUME = Order("volume.resize", ResizeVolume, VolumeInfo)
DELETE_VOLUME = Order("volume.delete", DeleteVolume, Done, deadline_seconds=3600)
COPY_VOLUME = Order("volume.copy", CopyVolume, VolumeInfo, deadline_seconds=86400)
IMPORT_VOLUME = Order("volume.import", ImportVolume, VolumeInfo, deadline_seconds=86400)
INSPECT_VOLUME = Order("volume.inspect", InspectVolume, VolumeInfo)
OPEN_TRANSFER = Order("transfer.open", OpenTransfer, TransferOpened)
FINISH_TRANSFER = Order("transfer.finish", FinishTransfer, VolumeInfo, deadline_seconds=86400)


# --- network's orders ------------------------------------------------------------------------------------


class NetworkKind(StrEnum):
    BRIDGE = "bridge"
    """A Linux bridge, with the host's NIC (or a VLAN on it) in it, or with nothing."""
    VXLAN = "vxlan"
    """A Linux bridge with a VXLAN device that joins the hosts."""
    NAT = "nat"
    """A libvirt network: bridge, NAT and DHCP on this host alone."""


class HostNetwork(Message):
    """One logical network as one host must have it."""

    network_id: str
    name: str
    kind: NetworkKind
    bridge: str
    """The bridge's device name, at most 15 characters."""
    mtu: int = 1500
    nic: str = ""
    """The host's device to put into the bridge; "" for none."""
    vlan: int = 0
    vni: int = 0
    peers: tuple[str, ...] = ()
    """VXLAN: the other hosts' tunnel addresses."""
    local_address: str = ""
    subnet: str = ""
    """NAT: an IPv4 network in CIDR form; the first address is the host's."""


class ApplyNetworks(Message):
    """The whole desired set for this host. What Volery made and isn't listed goes away.

    Applied with a check that the control plane is still reachable; rolled back if it isn't within `check_seconds`.
    """

    host_id: str
    networks: tuple[HostNetwork, ...]
    check_seconds: float = 20.0


class NetworksApplied(Message):
    networks: tuple[BridgeReport, ...]


APPLY_NETWORKS = Order("network.apply", ApplyNetworks, NetworksApplied)


# --- questions an agent answers at once, on `host.{host_id}.ask.…` ------------------------------------------


class AskHost(Message):
    host_id: str


DESCRIBE_HOST = Call("host.{host_id}.ask.describe", AskHost, HostCapabilities)
