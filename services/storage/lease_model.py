"""Which hosts hold leases on which storage domains, and what follows from what they say about it. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from msgspec import UnsetType
from msgspec.structs import replace

from services.storage.domain_model import CAN_CONNECT, NOT_RUNNING
from services.storage.store import HostRow, Member, VmRow
from volery.contracts.agent import StorageDomainReport
from volery.contracts.domain import DomainLease
from volery.contracts.errors import conflict, invalid, unavailable
from volery.contracts.host import HostStatus
from volery.contracts.leases import JoinLockspace, Watchdog
from volery.contracts.storage import CreateStorageDomain, DomainKind, DomainStatus, StorageDomain


def refuse_settings(domain: StorageDomain) -> None:
    """Raises Refused(invalid) for leases where none can be held."""
    if domain.leases and domain.kind is not DomainKind.DIRECTORY:
        raise invalid(
            f"storage domain {domain.name} is of kind {domain.kind}, which can't hold leases: only a directory that is "
            "mounted on every host can; a VM with its disks here may have its lease on such a domain",
            field="leases",
        )
    if domain.leases and domain.host_id:
        raise invalid(
            f"storage domain {domain.name} belongs to one host: a lease there would keep nobody else from running the "
            "VM; take a domain that every host has mounted",
            field="leases",
        )
    if not 1 <= domain.lease_io_timeout_seconds <= 60:
        raise invalid(
            f"an io_timeout of {domain.lease_io_timeout_seconds} s can't be used: give 1 to 60 s (usual: 10)",
            field="lease_io_timeout_seconds",
        )
    if domain.reset_hosts and not domain.leases:
        raise invalid(
            f"hosts can be reset when they lose their lease on storage domain {domain.name} only if it holds leases: "
            "set leases, too",
            field="reset_hosts",
        )


def refuse_change(old: StorageDomain, new: StorageDomain, vm_names: list[str]) -> None:
    """Raises Refused(conflict). `vm_names` have their lease on the domain."""
    if old.leases and not new.leases and vm_names:
        raise conflict(
            f"storage domain {old.name} holds the leases of VM {', '.join(vm_names[:5])}: give these VMs another lease, "
            "or none, while they are down",
            vms=vm_names[:100],
        )
    if old.leases and new.leases and old.lease_io_timeout_seconds != new.lease_io_timeout_seconds:
        raise conflict(
            f"the hosts renew their leases on storage domain {old.name} by an io_timeout of "
            f"{old.lease_io_timeout_seconds} s already: switch its leases off, and on again with another",
            field="lease_io_timeout_seconds",
        )


def holders(vm_ids: Iterable[str], vms: Mapping[str, VmRow], *, running: bool = False) -> list[str]:
    """Names of these VMs; `running`: of those that may hold their lease now."""
    return sorted(
        vms[i].name if i in vms else i
        for i in vm_ids
        if not running or (i in vms and vms[i].status not in NOT_RUNNING)
    )


def has_lockspace(domain: StorageDomain, maintenance: bool) -> bool:
    return domain.leases and bool(domain.data_center_id) and not maintenance


def joins(domain: StorageDomain, maintenance: bool, host: HostRow) -> bool:
    """Whether the host is to be in the lockspace, if it can."""
    return (
        has_lockspace(domain, maintenance)
        and host.data_center_id == domain.data_center_id
        and host.id in domain.host_ids
        and host.status in CAN_CONNECT
    )


def leaves(domain: StorageDomain, maintenance: bool, host: HostRow, member: Member | None) -> bool:
    """Whether the host is to give its number back. One that is silent, or only non-operational, keeps it."""
    if member is None or not member.asked:
        return False
    return not has_lockspace(domain, maintenance) or host.status == HostStatus.MAINTENANCE


def cannot_join(host: HostRow) -> str:
    """Why this host can't hold VMs' leases, as it said itself; "" when it can."""
    ability = host.leases
    if ability.version and ability.domains:
        return ""
    return (
        ability.problem or "its agent doesn't say that it can hold leases: update the agent, install sanlock"
    )


def holds_leases(ask: CreateStorageDomain, hosts: Sequence[HostRow]) -> bool:
    """Whether a new domain holds leases, that these hosts can reach. Unsaid: where they would keep a VM from running twice
    and keep no host from running it."""
    if not isinstance(ask.leases, UnsetType):
        return ask.leases
    attached = ask.kind is DomainKind.DIRECTORY and bool(ask.data_center_id)
    return attached and len(hosts) > 1 and not any(cannot_join(host) for host in hosts)


def join_order(domain: StorageDomain, number: int, *, initialise: bool) -> JoinLockspace:
    return JoinLockspace(
        domain_id=domain.id,
        path=lockspace_path(domain),
        host_number=number,
        io_timeout_seconds=domain.lease_io_timeout_seconds,
        reset_host=domain.reset_hosts,
        initialise=initialise,
    )


def lockspace_path(domain: StorageDomain) -> str:
    return f"{domain.path}/{domain.id}/leases/lockspace"


def lease_of(domain: StorageDomain, vm_id: str) -> DomainLease:
    return DomainLease(lockspace=domain.id, key=vm_id, path=f"{domain.path}/{domain.id}/leases/{vm_id}")


def is_settled(domain: StorageDomain, report: StorageDomainReport, member: Member | None) -> bool:
    """Whether the host has joined as it should, by its own report."""
    said = report.lockspace
    return (
        said is not None
        and said.generation > 0
        and member is not None
        and said.host_number == member.number
        and said.reset_host == domain.reset_hosts
    )


def with_lockspace(
    domain: StorageDomain, host_id: str, report: StorageDomainReport, member: Member | None
) -> StorageDomain:
    """The domain after a host reported whether it has joined."""
    if not domain.leases:
        return domain
    said = report.lockspace
    if said is None or not said.generation or member is None or said.host_number != member.number:
        return without_host(domain, host_id)
    if said.failing:
        return with_problem(
            domain, host_id, "it can't renew its lease there: look at the storage's mount on it"
        )
    return replace(
        domain,
        lease_host_ids=tuple(sorted({*domain.lease_host_ids, host_id})),
        lease_problems={h: why for h, why in domain.lease_problems.items() if h != host_id},
    )


def without_host(domain: StorageDomain, host_id: str) -> StorageDomain:
    return replace(domain, lease_host_ids=tuple(h for h in domain.lease_host_ids if h != host_id))


def with_problem(domain: StorageDomain, host_id: str, why: str) -> StorageDomain:
    domain = without_host(domain, host_id)
    return replace(domain, lease_problems=dict(sorted((domain.lease_problems | {host_id: why}).items())))


def only_wanted(domain: StorageDomain, maintenance: bool, hosts: Iterable[HostRow]) -> StorageDomain:
    """The domain without what was said of hosts that have nothing to do with its lockspace."""
    if not has_lockspace(domain, maintenance):
        return replace(domain, lease_host_ids=(), lease_problems={})
    kept = {host.id for host in hosts if host.id in domain.host_ids}
    return replace(
        domain,
        lease_host_ids=tuple(h for h in domain.lease_host_ids if h in kept),
        lease_problems={h: why for h, why in domain.lease_problems.items() if h in kept},
    )


def refuse_unheld(domain: StorageDomain, host_id: str) -> None:
    """Raises Refused unless a VM on this host can hold a lease in this domain now."""
    refuse_leaseless(domain)
    if host_id not in domain.lease_host_ids:
        why = domain.lease_problems.get(host_id) or (
            "it has not joined the lockspace yet, which takes half a minute after it came up"
        )
        raise unavailable(
            f"host {host_id} can't hold a lease on storage domain {domain.name}: {why}",
            storage_domain_id=domain.id,
            host_ids=list(domain.lease_host_ids),
        )


def refuse_leaseless(domain: StorageDomain) -> None:
    if not domain.leases:
        raise conflict(
            f"storage domain {domain.name} holds no leases: switch them on there, or give the VM another lease or none",
            storage_domain_id=domain.id,
        )


def no_holder(domain: StorageDomain, hosts: Iterable[str] | None) -> str:
    """Why none of these hosts (None: none is ruled out) can hold a lease here; "" when one can."""
    if not domain.leases:
        return f"storage domain {domain.name}, where the VM's lease is, holds no leases"
    if domain.status is not DomainStatus.ACTIVE:
        return f"storage domain {domain.name}, where the VM's lease is, is {domain.status}"
    able = set(domain.lease_host_ids) if hosts is None else set(domain.lease_host_ids) & set(hosts)
    if able:
        return ""
    reasons = "; ".join(f"host {h}: {why}" for h, why in sorted(domain.lease_problems.items())[:5])
    return (
        f"no host that reaches the VM's disks has joined the lockspace of storage domain {domain.name}, where its lease "
        f"is ({reasons or 'joining takes half a minute after a host came up'})"
    )


def could_prove(member: Member, watchdog: Watchdog) -> bool:
    """Whether this lease, once expired, could prove that its host is dead: nothing else is worth reading."""
    return bool(member.boot_id) and member.generation > 0 and member.reset_host and watchdog.inescapable


def proofs(
    members: Iterable[Member], domains: Mapping[str, StorageDomain], hosts: Mapping[str, HostRow]
) -> dict[str, str]:
    """Hosts whose death an expired lease could prove, and the name of the storage domain that it would be read on."""
    found: dict[str, str] = {}
    for member in members:
        domain, host = domains.get(member.domain_id), hosts.get(member.host_id)
        if domain is None or host is None or not could_prove(member, watchdog_of(member, host)):
            continue
        others = set(domain.lease_host_ids) - {host.id}
        if any(other in hosts and hosts[other].status == HostStatus.UP for other in others):
            found.setdefault(host.id, domain.name)
    return found


def watchdog_of(member: Member, host: HostRow) -> Watchdog:
    """What was reported of the boot that holds the lease; of any other it says nothing."""
    return host.leases.watchdog if host.boot_id and host.boot_id == member.boot_id else Watchdog()
