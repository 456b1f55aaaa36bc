"""The scheduler's rules that need no fleet: limits of a host, what a VM takes, which claims contradict the facts.

Memory: a host may be promised `physical × over-commit % / 100 − reserve`; a VM takes its memory plus QEMU's
overhead. CPU: a host may be promised `threads × over-commit ratio` vCPUs, and no VM may have more vCPUs than the
host has threads.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime, timedelta
from enum import StrEnum

from services.scheduler.config import SchedulerConfig
from volery.contracts.cluster import AdmissionControl, Balance
from volery.contracts.cpus import PinningPolicy
from volery.contracts.errors import invalid
from volery.contracts.scheduling import Claim, Need, Place
from volery.contracts.vm import PAGE_SIZES_KIB, VmStatus

MIB = 1024**2
MAX_VCPUS = 4096
MAX_DEVICES = 16
MAX_MEMORY_BYTES = 1 << 50
"""A petabyte: keeps sums of claims far inside 64 bits."""

TENTATIVE, CONFIRMED = "tentative", "confirmed"


@dataclass(frozen=True, slots=True)
class ClusterPolicy:
    """What a cluster asks of every placement in it."""

    id: str
    name: str = ""
    cpu_model: str = ""
    machine: str = ""
    memory_overcommit_percent: int = 100
    cpu_overcommit_ratio: float = 10.0
    balance: str = Balance.EVENLY_DISTRIBUTED
    reserve_host_failures: int = 0
    admission_control: str = AdmissionControl.OFF
    policy_id: str = ""
    """The scheduling policy that it was given; "" is the built-in one of its balance."""

    @property
    def promises(self) -> bool:
        """Whether it is checked by placing that the cluster survives the loss of hosts."""
        return self.reserve_host_failures > 0 and self.admission_control != AdmissionControl.OFF

    @property
    def enforces(self) -> bool:
        return self.promises and self.admission_control == AdmissionControl.ENFORCE


@dataclass(frozen=True, slots=True)
class Limits:
    """What may be promised of one host."""

    memory_bytes: int
    vcpus: int


def limits(memory_bytes: int, cpus: int, policy: ClusterPolicy, config: SchedulerConfig) -> Limits:
    memory = memory_bytes * policy.memory_overcommit_percent // 100 - config.host_reserve_mib * MIB
    return Limits(max(memory, 0), int(cpus * policy.cpu_overcommit_ratio))


def memory_taken(memory_bytes: int, config: SchedulerConfig, hugepage_kib: int = 0) -> int:
    """What a VM with this much memory takes of its host besides huge pages, which are counted by themselves."""
    return (0 if hugepage_kib else memory_bytes) + config.guest_overhead_mib * MIB


def check(place: Place) -> None:
    """Raises Refused(invalid) for a need that no host could ever be asked."""
    need = place.need
    if not need.vm_id or not need.cluster_id:
        raise invalid("a placement names its VM and its cluster")
    if not 1 <= need.vcpus <= MAX_VCPUS:
        raise invalid(f"{_vm(need)} has {need.vcpus} vCPUs; give it 1 to {MAX_VCPUS}")
    if not 1 <= need.memory_bytes <= MAX_MEMORY_BYTES:
        raise invalid(f"{_vm(need)} has {need.memory_bytes} bytes of memory; give it 1 to {MAX_MEMORY_BYTES}")
    if need.hugepage_kib not in (0, *PAGE_SIZES_KIB):
        raise invalid(
            f"{_vm(need)} asks for huge pages of {need.hugepage_kib} KiB; there are pages of "
            f"{' and '.join(map(str, PAGE_SIZES_KIB))} KiB"
        )
    pinning = need.cpu_pinning
    if pinning.policy is PinningPolicy.MANUAL and len(pinning.pins) < need.vcpus:
        raise invalid(
            f"{_vm(need)} has {need.vcpus} vCPUs and pins for {len(pinning.pins)}; pin each of them"
        )
    if pinning.policy is PinningPolicy.RESIZE_AND_PIN and need.numa_nodes:
        raise invalid(
            f"{_vm(need)} is resized to its host, whose NUMA cells it follows: it has no NUMA nodes of its own"
        )
    if sum(ask.count for ask in need.host_devices) > MAX_DEVICES:
        raise invalid(f"{_vm(need)} asks for more than {MAX_DEVICES} devices of its host")
    if place.epoch < 0:
        raise invalid(f"{_vm(need)} can't be placed under epoch {place.epoch}; epochs count from 0")


def _vm(need: Need) -> str:
    return f"VM {need.name or need.vm_id}"


class Settling(StrEnum):
    """What becomes of a claim that the facts contradict."""

    KEEP = "keep"
    CONFIRM = "confirm"
    RELEASE = "release"


@dataclass(frozen=True, slots=True)
class SeenVm:
    """A VM as inventory last said; `heard_at` by the database's clock, like the claims' times."""

    id: str
    epoch: int
    status: str
    host_id: str
    memory_bytes: int
    vcpus: int
    name: str
    deleted: bool
    heard_at: datetime
    hugepage_kib: int = 0
    numa_nodes: str = "[]"
    devices: str = "[]"
    """JSON, like its nodes: what it got of its host's devices."""


ENDED_STATUSES = frozenset({VmStatus.DOWN, VmStatus.SUSPENDED, VmStatus.IMAGE_LOCKED})
SETTLED_STATUSES = frozenset(
    {VmStatus.UP, VmStatus.PAUSED, VmStatus.POWERING_UP, VmStatus.REBOOT_IN_PROGRESS}
)
"""Where a VM in one of these states is, is certain: its host's agent said so and no move is on its way."""


def settle(
    claim: Claim, vm: SeenVm | None, now: datetime, config: SchedulerConfig, *, replaced: bool = False
) -> tuple[Settling, str]:
    """What the facts say about a claim, and why. `vm` is None when inventory never spoke of it; `replaced`: a later
    placement of the VM holds a claim on the same host. Without one an older claim still counts there: a move that
    failed gives the VM a new epoch at its source, and no new claim.

    A claim of a higher epoch than the VM's is on its way and left alone until it expires; whatever changed a
    moment ago is too.
    """
    settled = timedelta(seconds=config.settled_seconds)
    expired = claim.state == TENTATIVE and claim.created_at + timedelta(seconds=config.claim_seconds) < now
    if now - claim.updated_at < settled or (vm is not None and now - vm.heard_at < settled):
        return Settling.KEEP, ""
    if vm is None:
        return (Settling.RELEASE, "it was never confirmed in time") if expired else (Settling.KEEP, "")
    if vm.deleted:
        return Settling.RELEASE, "its VM was deleted"
    here = vm.host_id == claim.host_id and vm.status not in ENDED_STATUSES
    if claim.state == TENTATIVE and here and vm.epoch == claim.epoch and vm.status in SETTLED_STATUSES:
        return Settling.CONFIRM, "its VM runs there"
    if expired and not here and vm.epoch <= claim.epoch and vm.status in ENDED_STATUSES | SETTLED_STATUSES:
        return Settling.RELEASE, "it was never confirmed in time"
    if claim.state == CONFIRMED or vm.epoch > claim.epoch:
        return _overtaken(claim, vm, here, replaced)
    return Settling.KEEP, ""


def _overtaken(claim: Claim, vm: SeenVm, here: bool, replaced: bool) -> tuple[Settling, str]:
    if claim.epoch > vm.epoch:
        return Settling.KEEP, ""
    if vm.status in ENDED_STATUSES:
        return Settling.RELEASE, f"its VM is {vm.status}"
    if vm.status in SETTLED_STATUSES and not here:
        return Settling.RELEASE, f"its VM runs on host {vm.host_id}"
    if vm.status in SETTLED_STATUSES and replaced:
        return Settling.RELEASE, "a later claim holds its VM's place there"
    return Settling.KEEP, ""


@dataclass(slots=True)
class Looked:
    """What the leader's last look at affinity groups saw."""

    at: datetime | None = None
    clusters: dict[str, tuple[int, dict[str, str]]] = field(default_factory=dict)
    """Revision of its groups, and its hosts with their names."""
    again: set[str] = field(default_factory=set)
    """Groups that somebody changed while they were looked at."""


@dataclass(slots=True)
class Audit:
    """The leader's last look at a cluster's promise."""

    seen: int = 0
    """A hash of all that was looked at."""
    next_at: float = 0.0
    """Not before: looking takes a small share of the time, however large the cluster is."""
