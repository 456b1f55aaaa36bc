"""Where a VM may run, and the claims that hold its capacity there."""

from __future__ import annotations

from enum import StrEnum

from volery.contracts.base import Call, Done, Entity, Fact, Message
from volery.contracts.cpus import CpuPinning, GivenCpus
from volery.contracts.domain import NumaNode
from volery.contracts.host_devices import AskedDevice, GivenDevice
from volery.contracts.operation import ListQuery, Page
from volery.contracts.resizing import VmShape


class Need(Message):
    """What a VM asks of a host."""

    vm_id: str
    cluster_id: str
    memory_bytes: int
    vcpus: int
    name: str = ""
    hugepage_kib: int = 0
    """Its memory is in huge pages of this size; 0: in ordinary ones."""
    numa_nodes: tuple[NumaNode, ...] = ()
    cpu_model: str = ""
    machine: str = ""
    network_ids: tuple[str, ...] = ()
    host_ids: tuple[str, ...] = ()
    """Pinned to these; empty: any."""
    preferred_host_ids: tuple[str, ...] = ()
    storage_host_ids: tuple[str, ...] | None = None
    """Hosts that reach its disks; None: no disk restricts it."""
    high_availability: bool = False
    priority: int = 1
    """With which it is brought back before others."""
    same_host: bool = False
    """It is to be brought back on its own host only: no cluster can promise anything for it."""
    cpu_pinning: CpuPinning = CpuPinning()
    threads: int = 0
    """Of each of its cores; 0 or 1: its vCPUs are cores."""
    shape: VmShape | None = None
    """Of one that is resized to its host: what it runs with, and keeps where it moves; None: it takes any host's."""
    host_devices: tuple[AskedDevice, ...] = ()


class Purpose(StrEnum):
    START = "start"
    MIGRATE = "migrate"
    RESTART = "restart"


class Place(Message):
    """Choose a host and claim its capacity for (vm_id, epoch). A repeat returns the first answer."""

    need: Need
    epoch: int
    purpose: Purpose = Purpose.START
    excluded_host_ids: tuple[str, ...] = ()
    """Tried already, or the source of a migration."""
    target_host_id: str = ""
    """Only this one."""
    preferred_host_id: str = ""
    """This one, if it fits."""
    avoided_host_ids: tuple[str, ...] = ()
    """These only when no other fits; weighs more than any preference."""
    dry_run: bool = False
    """Decide and explain, claim nothing."""
    operation_id: str = ""


class Verdict(Message):
    """What one rule said of one host."""

    rule: str
    passed: bool
    message: str = ""
    """With the figures, when it excluded the host."""
    change: str = ""
    """The smallest change that would make it pass."""


class HostVerdict(Message):
    host_id: str
    name: str = ""
    fits: bool = False
    verdicts: tuple[Verdict, ...] = ()
    """Of filters: those that excluded it (all of them, not only the first)."""
    weight: float = 0.0
    weights: dict[str, float] = {}
    """Weight → its share; the highest sum wins."""


class ChangeKind(StrEnum):
    """What would have to be changed, and so by whom."""

    HOST = "host"
    """The host: activated, mended, or made emptier."""
    VM = "vm"
    """The VM: it asks for less."""
    CLUSTER = "cluster"
    """The cluster: it promises more."""
    CONNECTIONS = "connections"
    """Networks and storage that the host lacks."""
    REQUEST = "request"
    """The question: another host is asked for, or none is left out."""
    MIXED = "mixed"
    """Several of these together: none of them alone is enough."""


class Change(Message):
    """One field of one object, and the nearest value with which rules no longer exclude a host."""

    rules: tuple[str, ...]
    """The rules that it satisfies."""
    kind: ChangeKind
    object_kind: str
    """host, vm, cluster, scheduling_policy, affinity_group, network, disks, placement"""
    object_id: str
    object_name: str = ""
    field: str = ""
    """As REST has it, where REST can set it; memory_used_bytes and vcpus_used of a host shrink by moving VMs away."""
    current: int | float | str = ""
    wanted: int | float | str = ""
    """Of a list, what is taken out of it (`current`) or added to it (`wanted`)."""
    amount: int = 1
    """By how many units the two differ; 1 where there is nothing to count."""
    unit: str = ""
    """bytes, MiB, vCPUs, %, tenths, hosts, NICs, devices, or "" where there is nothing to count."""
    sentence: str = ""


class Remedy(Message):
    """Changes that together would let a host take the VM; one less, or one of them by one unit less, and still no host
    would. Of all hosts the one that needs the fewest changes, then the smallest."""

    kind: ChangeKind
    host_id: str
    host_name: str = ""
    changes: tuple[Change, ...] = ()
    sentence: str = ""


class Placement(Message):
    """The decision: a host, or for each host why not."""

    vm_id: str
    epoch: int
    host_id: str = ""
    claimed: bool = False
    hosts: tuple[HostVerdict, ...] = ()
    message: str = ""
    """A sentence for a person."""
    decision_id: str = ""
    vm_name: str = ""
    purpose: Purpose = Purpose.START
    considered: int = 0
    """Hosts that were looked at. `hosts` has the best of them (when none fits: the nearest), no more than
    VOLERY_SCHEDULER_EXPLAINED_HOSTS."""
    fitting: int = 0
    """Hosts that would take it."""
    excluded_by: dict[str, int] = {}
    """Rule → how many of all hosts it excludes; a host may be excluded by several."""
    remedies: tuple[Remedy, ...] = ()
    """When no host fits: for each kind of change the smallest that would mend that; where none alone is enough, the
    smallest mixture."""
    policy_id: str = ""
    """The scheduling policy that it was decided by; "" in decisions of a release that had none."""
    policy_name: str = ""
    policy_revision: int = 0
    """As the policy was then."""
    cpus: GivenCpus | None = None
    """The physical CPUs that a pinned VM gets there."""
    shape: VmShape | None = None
    """What a VM runs with there that is resized to its host, instead of its own vCPUs, topology and NUMA nodes."""
    selector: str = ""
    """How its weights were put together: weighted_sum (a host's weights are factor × score) or rank (factor × rank)."""
    devices: tuple[GivenDevice, ...] = ()
    """Devices of the host that the VM gets, with all of their IOMMU groups."""
    devices_revision: int = 0
    """Counts how often devices of the host were given or taken back; they were chosen under this."""
    together: tuple[str, ...] = ()
    """The other VMs that it was placed with on one host, or refused with."""
    hopeful: bool = False
    """Refused, but what has just happened to hosts, networks or other VMs may not have been heard yet and might let it in: ask
    once more in a moment."""


class PlaceMany(Message):
    """Choose hosts for many VMs and claim their capacity, as if each had been asked for after the one before. At most 500
    at a time.

    Those of them that enforcing positive affinity groups keep on one host are placed there together, or none of them is. A
    repeat returns the first answer, and for each (vm_id, epoch) that holds a claim the placement that claimed it."""

    places: tuple[Place, ...]
    """`dry_run` of each isn't looked at."""
    absent: dict[str, str] = {}
    """VM that was asked for with these and can't be started as it is → why, as a sentence. Who must be on one host with it isn't
    placed either."""
    all_or_nothing: bool = False
    """Unless all of them find room, none is placed."""
    dry_run: bool = False
    """Decide and explain, claim nothing."""


class Placements(Message):
    """In the order of the questions. Of hosts only the chosen one is explained; all of a refusal is its decision."""

    placements: tuple[Placement, ...] = ()


class CellClaim(Message):
    """What is held of one NUMA cell."""

    cell: int
    memory_bytes: int = 0
    """Beside huge pages."""
    pages_2m: int = 0
    pages_1g: int = 0


class Claim(Entity):
    """Capacity held for a VM on a host. The table says what is held, never where a VM runs."""

    vm_id: str
    epoch: int
    host_id: str
    memory_bytes: int
    vcpus: int
    state: str = "tentative"
    """tentative (until confirmed or expired), confirmed"""
    purpose: Purpose = Purpose.START
    high_availability: bool = False
    """What the VM was when it was placed."""
    pages_2m: int = 0
    pages_1g: int = 0
    """Huge pages of 2 MiB and 1 GiB. Their memory isn't part of `memory_bytes`."""
    cells: tuple[CellClaim, ...] = ()
    """What of it nodes hold that are pinned to NUMA cells."""
    cpu_pinning: str = ""
    """By which policy it holds physical CPUs; "": by none, it shares what others leave."""
    cpus: GivenCpus | None = None
    exclusive_cpus: int = 0
    """How many of them are its alone."""
    shape: VmShape | None = None
    """What it runs with there, if it is resized to its host."""
    devices: tuple[GivenDevice, ...] = ()
    devices_revision: int = 0


class ClaimKey(Message):
    vm_id: str
    epoch: int


class ReleaseVm(Message):
    """Give back every claim of this VM except those of `keep_epochs`."""

    vm_id: str
    keep_epochs: tuple[int, ...] = ()


class HostCapacity(Message):
    """How the scheduler sees a host."""

    host_id: str
    name: str
    cluster_id: str
    memory_bytes: int
    memory_used_bytes: int
    """By claims, overhead included."""
    vcpus_limit: int
    vcpus_used: int
    schedulable: bool
    cpu_percent: float = 0.0
    problem: str = ""
    """That it has promised more than it has, and what to do; "" when it has not."""
    pages_2m: int = 0
    pages_2m_used: int = 0
    pages_1g: int = 0
    pages_1g_used: int = 0
    """Huge pages of 2 MiB and 1 GiB, and how many of them claims hold. Their memory isn't part of `memory_bytes`."""


class PastDecision(Entity):
    """What was decided about a VM, in short; the whole explanation is the decision of this id."""

    vm_id: str
    vm_name: str = ""
    epoch: int = 0
    purpose: Purpose = Purpose.START
    host_id: str = ""
    """Empty: no host could take it."""
    host_name: str = ""
    message: str = ""


class GetDecision(Message):
    id: str


class RoomFor(Message):
    """One VM, and the hosts that don't count."""

    need: Need
    excluded_host_ids: tuple[str, ...] = ()


class FindRoom(Message):
    """Which of these VMs would fit if they were restarted, each by itself? Claims nothing. At most 200 at a time."""

    asks: tuple[RoomFor, ...]


class Room(Message):
    """The answer for one VM. Hosts are those of its cluster, without the excluded ones."""

    vm_id: str
    hosts: int = 0
    up: int = 0
    fitting: int = 0
    """Hosts that would take it now."""
    memory_bytes: int = 0
    """What it would take of a host, overhead included."""
    nearest: HostVerdict | None = None
    """The host that would have to change least to take it; None when there is none that doesn't fit."""
    remedies: tuple[Remedy, ...] = ()
    """When no host fits: as in a placement."""


class Rooms(Message):
    """In the order of the questions."""

    rooms: tuple[Room, ...] = ()


PLACE = Call("scheduler.place", Place, Placement, mutates=True)
PLACE_MANY = Call("scheduler.place_many", PlaceMany, Placements, mutates=True, timeout_seconds=60)
CONFIRM_CLAIM = Call("scheduler.claim.confirm", ClaimKey, Done, mutates=True)
RELEASE_CLAIM = Call("scheduler.claim.release", ClaimKey, Done, mutates=True)
RELEASE_VM_CLAIMS = Call("scheduler.claim.release_vm", ReleaseVm, Done, mutates=True)
LIST_CLAIMS = Call("scheduler.claim.list", ListQuery, Page)
LIST_CAPACITY = Call("scheduler.capacity.list", ListQuery, Page)
LIST_DECISIONS = Call("scheduler.decision.list", ListQuery, Page)
"""Past decisions; without `order_by` the newest first."""
FIND_ROOM = Call("scheduler.room.find", FindRoom, Rooms, timeout_seconds=20)
GET_DECISION = Call("scheduler.decision.get", GetDecision, Placement)
"""A past decision, as it was explained then. Raises not_found when it is older than the retention."""

CLAIM_CHANGED = Fact("fact.scheduler.claim.{id}.changed", Claim)
CLAIM_DELETED = Fact("fact.scheduler.claim.{id}.deleted", Claim)
