"""What control plane and host agent say to each other: the envelope of orders, and facts from hosts.

An order goes to `host.{host_id}.order` in a signed envelope; everything an agent says about its host is a
numbered fact under `fact.host.{host_id}.{owner}.…`, where the owner is the service that hears it.
"""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from typing import Any

import msgspec

from volery.contracts.base import Call, Fact, Message
from volery.contracts.cpus import CpuCore
from volery.contracts.domain import DomainState, ImageFormat
from volery.contracts.errors import Problem
from volery.contracts.host_devices import HostDevice
from volery.contracts.leases import LeaseAbility, LockspaceReport

NO_RESULT = msgspec.Raw(b"null")
"""Not None: msgspec can't decode `Raw | None`."""


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
    fencing_token: int = 0
    """The owner's leadership count. The agent refuses one lower than the highest it has seen from this owner."""
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
    HOST_DIED = "host_died"
    """Said by no agent: the boot that had the order ended by proof before it said how the order ended. Nothing of it
    runs there any more; what it wrote, it may have written."""


class OrderAck(Message):
    """The agent's answer to an order or a cancel.

    A refusal is journaled and final, so that no late copy can run, except for the kinds `stale` (send it again
    with the newest beat), `exhausted` and `unavailable` (send it again later): those are given up by a cancel.
    """

    order_id: str
    state: OrderState
    problem: Problem | None = None
    outcome: Outcome | None = None
    result: msgspec.Raw = NO_RESULT
    result_seq: int = 0
    """Of the fact that tells this end: what was said before it comes first. 0: none tells it, or the agent doesn't say."""


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


class CommittedWord(Message):
    """The owner has committed this host's facts up to `seq`: the agent may forget them."""

    host_id: str
    owner: str
    generation: str
    seq: int
    ask: str = ""
    """Of who asks for a report and wants to know it again: the report names it (`HostReported.asked`)."""


class FromHost(Message, kw_only=True):
    """Numbered by the agent, per owner, within a generation.

    Its owner, having committed up to `position`: a fact with `seq <= position` is a repeat; one with
    `after_seq > position` has a gap before it (ask for a report); any other is next. A superseded state leaves
    the spool together with its number, which is not a gap: `after_seq` of the next fact says so.
    """

    host_id: str
    generation: str
    seq: int
    boot_id: str
    at: datetime
    """The host's clock: shown to people, never compared."""
    after_seq: int
    """The fact before this one in the spool; 0 in the first fact after a report was asked for."""
    confirmed: int = 0
    """The highest number of this generation that the owner has ever said to have committed, as the agent's disk has it
    when the fact is published: a database that has heard less is older than its own word. 0: none, or an agent of
    before this field."""


class OrderFinished(FromHost):
    order_id: str
    kind: str
    object_id: str
    epoch: int
    outcome: Outcome
    problem: Problem | None = None
    result: msgspec.Raw = NO_RESULT
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
    hugepage_kib: int = 0
    """The size of the huge pages that back its memory; 0: none do."""
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


class HugePages(Message):
    """Pages of one size that are set aside, whoever uses them."""

    page_kib: int
    count: int


class NumaCell(Message):
    cell: int
    memory_bytes: int
    """All of it, that in huge pages too."""
    cpus: tuple[int, ...] = ()
    huge_pages: tuple[HugePages, ...] = ()
    """Only sizes of which there are some."""


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
    cores: tuple[CpuCore, ...] = ()
    """How its CPUs are built, in the order of their first threads; empty: it isn't known, and no VM is pinned there."""
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
    dmi_uuid: str = ""
    """The machine's own UUID, as its firmware says it: what its BMC must say, too. "": it can't be read."""
    fence_agents: tuple[str, ...] = ()
    """Names of the installed ones: what this host can be asked to switch other hosts' power with."""
    leases: LeaseAbility = LeaseAbility()
    devices: tuple[HostDevice, ...] = ()
    """Those that VMs could have, or could if the host didn't keep them; empty: there are none, or the agent doesn't say."""


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
    asked: tuple[str, ...] | None = None
    """The asks (`CommittedWord.ask`) that came before this report was begun; older reports may be on their way still. None:
    the agent doesn't say."""
    storage_work: tuple[str, ...] = ()
    """Kinds of storage's orders that the host carries out now, such as volume.copy: who cuts its power cuts them off."""


class VolumeReport(Message):
    path: str
    size_bytes: int
    """Virtual size."""
    used_bytes: int
    format: ImageFormat
    backing: str | None = None
    """The file below it by its own header, as that names it; "" is none. None: the agent doesn't say."""


class OpenChain(Message):
    """The files that a VM's QEMU has open for a disk, by libvirt."""

    disk_id: str
    vm_id: str
    files: tuple[str, ...]
    """Their names, from the one that is written to the base."""


class StorageDomainReport(Message):
    domain_id: str
    reachable: bool
    problem: str = ""
    capacity_bytes: int = 0
    available_bytes: int = 0
    volumes: tuple[VolumeReport, ...] = ()
    strangers: tuple[str, ...] = ()
    """Files or LUNs found there that no disk of ours explains."""
    lockspace: LockspaceReport | None = None
    """As the host has joined it; None when it has not."""
    open_chains: tuple[OpenChain, ...] | None = None
    """Of the VMs that the host runs with disks there. None: it was not asked, as where no file is above another one."""


class OpenLun(Message):
    """A LUN that a process of the host has open, or is about to write."""

    iqn: str
    lun: int
    vm_id: str = ""
    """The domain's UUID, also of one that Volery did not make; "" is an order at work."""
    disk_id: str = ""
    """What it is by the domain's alias or the order; "" for what Volery did not make."""


class LunClaim(Message):
    """The newest claim of a LUN that the host carried out: it tells an owner whose database is older than it."""

    iqn: str
    lun: int
    claim: int
    disk_id: str


class StorageReported(FromHost):
    domains: tuple[StorageDomainReport, ...]
    orders: tuple[JournalOrder, ...] = ()
    gap: bool = False
    open_luns: tuple[OpenLun, ...] = ()
    """Of any target, connected here or not, whoever opened them."""
    lun_claims: tuple[LunClaim, ...] = ()
    asked: tuple[str, ...] | None = None


class StorageChecked(FromHost):
    """What a small read of one connected domain came to, said when it differs from the read before. Coalescible per domain:
    only the newest matters."""

    domain_id: str
    readable: bool
    problem: str = ""
    """Why it isn't, as a sentence."""


class BridgeReport(Message):
    network_id: str
    bridge: str
    in_sync: bool
    problem: str = ""
    link_down: str = ""
    """Why no frame gets out of the host, though its devices are as they should be: the NIC that carries it has no link."""


class NetworksReported(FromHost):
    networks: tuple[BridgeReport, ...]
    nics: tuple[str, ...] = ()
    orders: tuple[JournalOrder, ...] = ()
    gap: bool = False
    asked: tuple[str, ...] | None = None


HOST_REPORTED = Fact("fact.host.{host_id}.inventory.reported", HostReported)
DOMAIN_CHANGED = Fact("fact.host.{host_id}.inventory.domain_changed", DomainChanged)
DOMAIN_EVENT_HAPPENED = Fact("fact.host.{host_id}.inventory.event_happened", DomainEventHappened)
STORAGE_REPORTED = Fact("fact.host.{host_id}.storage.reported", StorageReported)
STORAGE_CHECKED = Fact("fact.host.{host_id}.storage.check_reported", StorageChecked)
NETWORKS_REPORTED = Fact("fact.host.{host_id}.network.reported", NetworksReported)

INVENTORY_ORDER_FINISHED = Fact("fact.host.{host_id}.inventory.order_finished", OrderFinished)
STORAGE_ORDER_FINISHED = Fact("fact.host.{host_id}.storage.order_finished", OrderFinished)
NETWORK_ORDER_FINISHED = Fact("fact.host.{host_id}.network.order_finished", OrderFinished)
INVENTORY_ORDER_PROGRESSED = Fact("fact.host.{host_id}.inventory.order_progressed", OrderProgressed)
STORAGE_ORDER_PROGRESSED = Fact("fact.host.{host_id}.storage.order_progressed", OrderProgressed)
NETWORK_ORDER_PROGRESSED = Fact("fact.host.{host_id}.network.order_progressed", OrderProgressed)


class AskHost(Message):
    host_id: str


DESCRIBE_HOST = Call("host.{host_id}.ask.describe", AskHost, HostCapabilities)
