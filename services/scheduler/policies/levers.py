"""Levers: what can be changed so that a rule no longer excludes a host, and by how much, for every host at once.

A lever is one row of LEVERS: the rule, the kind of change, the field, and two functions: by how many units the field
must change on each host (NEVER where no value would do), and that change of one host in words and figures. Two levers
of one field are one change; the larger amount counts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from services.scheduler.fleet import STATUSES, Bools, Fleet, Ints
from services.scheduler.model import MIB
from services.scheduler.policies import pinned, resized, strain
from services.scheduler.policies.recipe import BY_BALANCE
from services.scheduler.policies.request import Request, size
from volery.contracts.cluster import Balance
from volery.contracts.host import HostStatus
from volery.contracts.scheduling import Change, ChangeKind, Purpose

NEVER = np.iinfo(np.int64).max
"""No amount would do."""
LEAST_MEMORY = 16 * MIB
MOST_PERCENT = 400
MOST_TENTHS = 1000
"""What REST accepts: the least memory of a VM, the largest over-commits of a cluster."""
EVERY_HOST_CAN = "host-model"
"""A CPU model that no host refuses."""

Amount = Callable[[Fleet, Request], Ints]
Scale = Callable[[Request], int]
Tell = Callable[[Fleet, Request, int, int], Change]
"""(fleet, request, row, amount) → the change of that host; its rules are filled in by the caller."""


@dataclass(frozen=True, slots=True)
class Lever:
    rule: str
    kind: ChangeKind
    field: str
    amount: Amount
    tell: Tell
    scale: Scale = lambda _: 1
    """Amounts of different fields compare as shares of this."""


def _vcpus(count: int) -> str:
    return f"{count} vCPU{'s' if count != 1 else ''}"


def _where(possible: Bools, amount: Ints) -> Ints:
    return np.where(possible, amount, NEVER)


def _once(fleet: Fleet, request: Request) -> Ints:
    return np.ones(len(fleet), np.int64)


# The question.


def _can_leave_in(fleet: Fleet, request: Request) -> Ints:
    possible = request.place.purpose is not Purpose.MIGRATE
    return _where(np.full(len(fleet), possible), _once(fleet, request))


def ask_for(fleet: Fleet, request: Request, row: int, amount: int) -> Change:
    return Change(
        rules=(), kind=ChangeKind.REQUEST, object_kind="placement", object_id=request.need.vm_id,
        object_name=request.need.name, field="target_host_id", current=request.place.target_host_id,
        wanted=fleet.ids[row], sentence=f"ask for {fleet.names[row]} or for no host in particular",
    )  # fmt: skip


def leave_in(fleet: Fleet, request: Request, row: int, amount: int) -> Change:
    return Change(
        rules=(), kind=ChangeKind.REQUEST, object_kind="placement", object_id=request.need.vm_id,
        object_name=request.need.name, field="excluded_host_ids", current=fleet.ids[row],
        sentence=f"try again without leaving out {fleet.names[row]}",
    )  # fmt: skip


# The host.

EFFORTS: dict[str, int] = {
    HostStatus.MAINTENANCE: 1,
    HostStatus.PREPARING_FOR_MAINTENANCE: 1,
    HostStatus.NON_OPERATIONAL: 2,
}
"""How much it takes to bring a host up: a click, a repair, or (3) whatever makes it answer."""
_EFFORTS = np.array([EFFORTS.get(status, 3) for status in (*STATUSES, "unknown")])


def _effort(fleet: Fleet, request: Request) -> Ints:
    efforts: Ints = _EFFORTS[fleet.ints("status")]
    return efforts


def bring_up(fleet: Fleet, request: Request, row: int, amount: int) -> Change:
    name, status = fleet.names[row], fleet.status_of(row)
    what = f"activate {name}" if "maintenance" in status else f"bring {name} up, which is {status}"
    if status == HostStatus.NON_OPERATIONAL:
        what = f"mend {name}, which is non-operational: its reasons and problems say what it lacks"
    return Change(
        rules=(), kind=ChangeKind.HOST, object_kind="host", object_id=fleet.ids[row], object_name=name,
        field="status", current=status, wanted=HostStatus.UP, amount=amount, sentence=what,
    )  # fmt: skip


def _short_of_memory(fleet: Fleet, request: Request) -> Ints:
    short: Ints = fleet.ints("memory_used") + request.memory - fleet.ints("memory_limit")
    return short


def _memory_to_free(fleet: Fleet, request: Request) -> Ints:
    return _where(fleet.ints("memory_limit") >= request.memory, _short_of_memory(fleet, request))


def free_memory(fleet: Fleet, request: Request, row: int, amount: int) -> Change:
    name, used = fleet.names[row], int(fleet.ints("memory_used")[row])
    return Change(
        rules=(), kind=ChangeKind.HOST, object_kind="host", object_id=fleet.ids[row], object_name=name,
        field="memory_used_bytes", current=used, wanted=used - amount, amount=amount, unit="bytes",
        sentence=f"move or stop VMs with {size(amount)} of memory on {name}",
    )  # fmt: skip


def _vcpus_at_most(fleet: Fleet, request: Request) -> Ints:
    """Those that the VM can have on the host: where it has more, they must shrink to the host's threads in any case,
    unless its policy lets a VM have more; and to those that are shared, where some aren't."""
    shared = pinned.shared(fleet).cpus
    most = shared if request.follows("cpu") else np.where(fleet.ints("cpus_exclusive") > 0, shared, NEVER)
    return np.minimum(resized.vcpus(fleet, request), np.maximum(most, 1))


def _vcpus_to_free(fleet: Fleet, request: Request) -> Ints:
    vcpus, limit = _vcpus_at_most(fleet, request), fleet.ints("vcpus_limit")
    short = fleet.ints("vcpus_used") + vcpus - limit
    return _where((limit >= vcpus) & (short > 0), short)


def _vcpus_to_unshare(fleet: Fleet, request: Request) -> Ints:
    return _where(*pinned.sharing_too_much(fleet, request))


def free_vcpus(fleet: Fleet, request: Request, row: int, amount: int) -> Change:
    name, used = fleet.names[row], int(fleet.ints("vcpus_used")[row])
    return Change(
        rules=(), kind=ChangeKind.HOST, object_kind="host", object_id=fleet.ids[row], object_name=name,
        field="vcpus_used", current=used, wanted=used - amount, amount=amount, unit="vCPUs",
        sentence=f"move or stop VMs with {_vcpus(amount)} on {name}",
    )  # fmt: skip


def _swapped_too_much(fleet: Fleet, request: Request) -> Ints:
    return strain.swap_excess(fleet, request)


def take_back_swap(fleet: Fleet, request: Request, row: int, amount: int) -> Change:
    name, swapped = fleet.names[row], int(fleet.ints("swapped")[row])
    return Change(
        rules=(), kind=ChangeKind.HOST, object_kind="host", object_id=fleet.ids[row], object_name=name,
        field="swapped_bytes", current=swapped, wanted=swapped - amount, amount=amount, unit="bytes",
        sentence=f"free {size(amount)} of the memory of {name} that VMs and other programs use, since it swaps",
    )  # fmt: skip


def relieve(fleet: Fleet, request: Request, row: int, amount: int) -> Change:
    name = fleet.names[row]
    return Change(
        rules=(), kind=ChangeKind.HOST, object_kind="host", object_id=fleet.ids[row], object_name=name,
        field="cpu_percent", current=round(float(fleet.floats("cpu_percent")[row]), 1),
        wanted=f"below {request.high_utilization:.0%}",
        sentence=f"move VMs away from {name}, whose CPUs are overloaded, or wait until they are less busy",
    )  # fmt: skip


# The VM.


def _of_vm(request: Request, field: str, sentence: str, **more: Any) -> Change:
    return Change(
        rules=(),
        kind=ChangeKind.VM,
        object_kind="vm",
        object_id=request.need.vm_id,
        object_name=request.need.name,
        field=field,
        sentence=sentence,
        **more,
    )


def _memory_too_much(fleet: Fleet, request: Request) -> Ints:
    """Whole MiB by which the VM is too large."""
    left = (fleet.ints("memory_limit") - fleet.ints("memory_used") - request.overhead) // MIB * MIB
    too_much = -((left - request.need.memory_bytes) // MIB)
    return _where(left >= LEAST_MEMORY, too_much)


def shrink_memory(fleet: Fleet, request: Request, row: int, amount: int) -> Change:
    now = request.need.memory_bytes
    wanted = -(-now // MIB) * MIB - amount * MIB
    return _of_vm(
        request, "memory_bytes", f"give {request.vm} at most {size(wanted)} of memory instead of {size(now)}",
        current=now, wanted=wanted, amount=amount, unit="MiB",
    )  # fmt: skip


def _vcpus_beyond_threads(fleet: Fleet, request: Request) -> Ints:
    cpus = fleet.ints("cpus")
    return _where(cpus >= 1, request.need.vcpus - cpus)


def _vcpus_beyond_limit(fleet: Fleet, request: Request) -> Ints:
    """Nothing where its host says how many it has."""
    left = fleet.ints("vcpus_limit") - fleet.ints("vcpus_used")
    return _where((left >= 1) & (not resized.is_resized(request)), request.need.vcpus - left)


def _vcpus_beyond_cpus(fleet: Fleet, request: Request) -> Ints:
    most = pinned.fitting_vcpus(fleet, request)
    return _where(most >= 1, request.need.vcpus - most)


def shrink_vcpus(fleet: Fleet, request: Request, row: int, amount: int) -> Change:
    now = request.need.vcpus
    return _of_vm(
        request, "vcpus", f"give {request.vm} at most {_vcpus(now - amount)} instead of {now}",
        current=now, wanted=now - amount, amount=amount, unit="vCPUs",
    )  # fmt: skip


def pin_here_too(fleet: Fleet, request: Request, row: int, amount: int) -> Change:
    name = fleet.names[row]
    return _of_vm(
        request, "affinity.host_ids", f"add {name} to the hosts that {request.vm} is pinned to",
        wanted=fleet.ids[row], unit="hosts",
    )  # fmt: skip


def any_model(fleet: Fleet, request: Request, row: int, amount: int) -> Change:
    return _of_vm(
        request, "cpu_model", f"give {request.vm} the CPU model {EVERY_HOST_CAN} instead of {request.cpu_model}",
        current=request.cpu_model, wanted=EVERY_HOST_CAN,
    )  # fmt: skip


def other_machine(fleet: Fleet, request: Request, row: int, amount: int) -> Change:
    wanted = min(fleet.machines_of(row), key=lambda m: (m not in ("q35", "pc"), m), default="")
    return _of_vm(
        request, "machine", f"give {request.vm} the machine type {wanted} instead of {request.machine}",
        current=request.machine, wanted=wanted,
    )  # fmt: skip


# The cluster.


def _of_cluster(request: Request, field: str, sentence: str, **more: Any) -> Change:
    return Change(
        rules=(),
        kind=ChangeKind.CLUSTER,
        object_kind="cluster",
        object_id=request.need.cluster_id,
        object_name=request.policy.name,
        field=field,
        sentence=sentence,
        **more,
    )


def _percent_more(fleet: Fleet, request: Request) -> Ints:
    """The least percentage p with physical × p // 100 − reserve ≥ what would be used."""
    physical = np.maximum(fleet.ints("memory_bytes"), 1)
    wanted = fleet.ints("memory_used") + request.memory + request.reserve
    percent = -(-wanted * 100 // physical)
    more: Ints = percent - request.policy.memory_overcommit_percent
    return _where(
        _own(fleet, request) & (fleet.ints("memory_bytes") > 0) & (percent <= MOST_PERCENT) & (more > 0), more
    )


def raise_percent(fleet: Fleet, request: Request, row: int, amount: int) -> Change:
    now = request.policy.memory_overcommit_percent
    return _of_cluster(
        request, "memory_overcommit_percent",
        f"raise the memory over-commit of {request.cluster} from {now} to {now + amount} %",
        current=now, wanted=now + amount, amount=amount, unit="%",
    )  # fmt: skip


def _tenths_now(request: Request) -> int:
    """The cluster's ratio in whole tenths, rounded down."""
    return int(request.policy.cpu_overcommit_ratio * 10 + 1e-9)


def _ratio_more(fleet: Fleet, request: Request) -> Ints:
    """Tenths of the least ratio r, in whole tenths, with ⌊threads × r⌋ ≥ what would be used, as limits are computed."""
    cpus, shared = np.maximum(fleet.ints("cpus"), 1), pinned.shared(fleet).cpus
    sharing = fleet.ints("vcpus_used") - fleet.ints("vcpus_exclusive") + _vcpus_at_most(fleet, request)
    wanted = -(-sharing * cpus // np.maximum(shared, 1))
    tenths = -(-wanted * 10 // cpus)
    tenths += np.floor(cpus * (tenths / 10)) < wanted
    more: Ints = tenths - _tenths_now(request)
    return _where(_own(fleet, request) & (shared > 0) & (tenths <= MOST_TENTHS) & (more > 0), more)


def raise_ratio(fleet: Fleet, request: Request, row: int, amount: int) -> Change:
    now, wanted = request.policy.cpu_overcommit_ratio, (_tenths_now(request) + amount) / 10
    return _of_cluster(
        request, "cpu_overcommit_ratio",
        f"raise the CPU over-commit of {request.cluster} from {now:g} to {wanted:g} vCPUs per thread",
        current=now, wanted=wanted, amount=amount, unit="tenths",
    )  # fmt: skip


def _own(fleet: Fleet, request: Request) -> Bools:
    """Only hosts of the VM's cluster get more from its over-commit."""
    return fleet.in_cluster(request.need.cluster_id)


def end_maintenance(fleet: Fleet, request: Request, row: int, amount: int) -> Change:
    """By what closes the cluster: its balance, a built-in policy that it was given, or the filter of another one."""
    wanted = BY_BALANCE[Balance.EVENLY_DISTRIBUTED]
    if not request.recipe.built_in:
        return leave_out("cluster_maintenance")(fleet, request, row, amount)
    if request.policy.policy_id:
        return _of_cluster(
            request, "scheduling_policy_id",
            f"end the maintenance of {request.cluster}: give it the scheduling policy {wanted.name}",
            current=request.policy.policy_id, wanted=wanted.id,
        )  # fmt: skip
    return _of_cluster(
        request, "balance", f"end the maintenance of {request.cluster}: give it the balance {wanted.name}",
        current=request.policy.balance, wanted=wanted.name,
    )  # fmt: skip


# The policy.


def _own_policy(fleet: Fleet, request: Request) -> Ints:
    """Where an administrator's own policy can do without a filter; a built-in one can't be changed."""
    return _where(np.full(len(fleet), not request.recipe.built_in), _once(fleet, request))


def leave_out(unit: str) -> Tell:
    def told(fleet: Fleet, request: Request, row: int, amount: int) -> Change:
        recipe = request.recipe
        return Change(
            rules=(), kind=ChangeKind.CLUSTER, object_kind="scheduling_policy", object_id=recipe.id,
            object_name=recipe.name, field="filters", current=unit,
            sentence=f"leave the filter {unit} out of scheduling policy {recipe.name}",
        )  # fmt: skip

    return told


# Connections.


def reach_disks(fleet: Fleet, request: Request, row: int, amount: int) -> Change:
    name = fleet.names[row]
    return Change(
        rules=(), kind=ChangeKind.CONNECTIONS, object_kind="disks", object_id=request.need.vm_id,
        object_name=request.need.name, field="storage_host_ids", wanted=fleet.ids[row], unit="hosts",
        sentence=f"connect {name} to the storage domains of the disks of {request.vm}",
    )  # fmt: skip


def network_levers(network_id: str) -> tuple[Lever, ...]:
    """Of one network that the VM needs."""

    def known(fleet: Fleet, request: Request) -> Ints:
        return _where(np.full(len(fleet), network_id in fleet.networks), _once(fleet, request))

    def name(fleet: Fleet) -> str:
        return fleet.networks[network_id].name if network_id in fleet.networks else network_id

    def attach(fleet: Fleet, request: Request, row: int, amount: int) -> Change:
        host = fleet.names[row]
        return Change(
            rules=(), kind=ChangeKind.CONNECTIONS, object_kind="network", object_id=network_id,
            object_name=name(fleet), field="ready_host_ids", wanted=fleet.ids[row], unit="hosts",
            sentence=f"attach network {name(fleet)} to {host}, or repair it there",
        )  # fmt: skip

    def unplug(fleet: Fleet, request: Request, row: int, amount: int) -> Change:
        return _of_vm(
            request, "nics", f"take the NICs of {request.vm} off network {name(fleet)}",
            current=network_id, unit="NICs",
        )  # fmt: skip

    return (
        Lever("network", ChangeKind.CONNECTIONS, f"network {network_id}", known, attach),
        Lever("network", ChangeKind.VM, f"nics {network_id}", _once, unplug),
    )


def vm_memory(request: Request) -> int:
    return max(request.need.memory_bytes // MIB, 1)


def _taken(request: Request) -> int:
    return max(request.memory, 1)


def _vm_vcpus(request: Request) -> int:
    return request.need.vcpus


LEVERS: tuple[Lever, ...] = (
    Lever("target", ChangeKind.REQUEST, "target_host_id", _once, ask_for),
    Lever("excluded", ChangeKind.REQUEST, "excluded_host_ids", _can_leave_in, leave_in),
    Lever("host_state", ChangeKind.HOST, "status", _effort, bring_up),
    Lever("pinned", ChangeKind.VM, "affinity.host_ids", _once, pin_here_too),
    Lever("cpu", ChangeKind.VM, "vcpus", _vcpus_beyond_threads, shrink_vcpus, _vm_vcpus),
    Lever("cpu_overcommit", ChangeKind.VM, "vcpus", _vcpus_beyond_limit, shrink_vcpus, _vm_vcpus),
    Lever("cpu_overcommit", ChangeKind.HOST, "vcpus_used", _vcpus_to_free, free_vcpus, _vm_vcpus),
    Lever("cpu_overcommit", ChangeKind.CLUSTER, "cpu_overcommit_ratio", _ratio_more, raise_ratio,
          lambda r: max(_tenths_now(r), 1)),
    Lever("cpu_pinning", ChangeKind.VM, "vcpus", _vcpus_beyond_cpus, shrink_vcpus, _vm_vcpus),
    Lever("cpu_pinning", ChangeKind.HOST, "vcpus_used", _vcpus_to_unshare, free_vcpus, _vm_vcpus),
    Lever("memory", ChangeKind.VM, "memory_bytes", _memory_too_much, shrink_memory, vm_memory),
    Lever("memory", ChangeKind.HOST, "memory_used_bytes", _memory_to_free, free_memory, _taken),
    Lever("memory", ChangeKind.CLUSTER, "memory_overcommit_percent", _percent_more, raise_percent,
          lambda r: r.policy.memory_overcommit_percent),
    Lever("cluster_maintenance", ChangeKind.CLUSTER, "balance", _once, end_maintenance),
    Lever("cpu_overload", ChangeKind.HOST, "cpu_percent", _once, relieve),
    Lever("cpu_overload", ChangeKind.CLUSTER, "filters cpu_overload", _own_policy, leave_out("cpu_overload")),
    Lever("swap", ChangeKind.CLUSTER, "filters swap", _own_policy, leave_out("swap")),
    Lever("swap", ChangeKind.HOST, "swapped_bytes", _swapped_too_much, take_back_swap, _taken),
    Lever("storage", ChangeKind.CONNECTIONS, "storage_host_ids", _once, reach_disks),
    Lever("cpu_model", ChangeKind.VM, "cpu_model", _once, any_model),
    Lever("machine", ChangeKind.VM, "machine", _once, other_machine),
)  # fmt: skip
"""What has no row here (a rule of another cluster's host) is mended by no change of its own."""
