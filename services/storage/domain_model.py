"""What a storage domain is, and what follows from what hosts say about it. Pure: no bus, no database, no clock."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Protocol

from msgspec.structs import replace

from services.storage.backends import directory, iscsi
from services.storage.store import DiskPrivate, HostRow, VmRow
from volery.contracts.agent import StorageDomainReport
from volery.contracts.domain import VolumeSource
from volery.contracts.errors import Kind, Refused, conflict, invalid
from volery.contracts.host import HostStatus
from volery.contracts.ids import is_id
from volery.contracts.naming import checked_description, checked_id, checked_name, checked_tags
from volery.contracts.storage import (
    CreateStorageDomain,
    Disk,
    DomainKind,
    DomainStatus,
    Lun,
    StorageDomain,
)
from volery.contracts.volume_orders import StorageLocation
from volery.contracts.volumes import Volume
from volery.runtime.tables import Row

CAN_CONNECT = frozenset({HostStatus.UP, HostStatus.NON_OPERATIONAL})
"""Hosts that may be ordered to connect: a host is often non-operational because its storage is missing."""
STAYS_CONNECTED = CAN_CONNECT | {HostStatus.CONNECTING, HostStatus.PREPARING_FOR_MAINTENANCE}
"""Hosts whose word that they reach a domain still counts."""
NOT_RUNNING = frozenset({"down", "image_locked", "deleting"})
"""VM states in which nothing of its disks is open. A suspended VM's memory expects its disks as they were."""
NOTED_BYTES = 1024**3
"""Free space is announced when it changed by this much, or by a hundredth of the capacity."""


class Backend(Protocol):
    """What each module of `backends` says about its kind."""

    GROWS: bool

    def location(self, domain: StorageDomain, chap_password: str) -> StorageLocation: ...
    def source(
        self, domain: StorageDomain, disk: Disk, volumes: Sequence[Volume], chap_password: str
    ) -> VolumeSource: ...
    def volume_name(self, disk: Disk, volume: Volume) -> str: ...
    def reported_name(self, path: str) -> str: ...
    def place(
        self,
        domain: StorageDomain,
        size_bytes: int,
        preallocated: bool,
        taken: frozenset[int],
        withheld: Mapping[int, str],
        reserve_bytes: int,
    ) -> int: ...


BACKENDS: Mapping[DomainKind, Backend] = {DomainKind.DIRECTORY: directory, DomainKind.ISCSI: iscsi}


def checked(ask: CreateStorageDomain) -> CreateStorageDomain:
    """The request with every field in its normal form. Raises Refused(invalid)."""
    ask = replace(
        ask,
        name=checked_name("storage domain", ask.name),
        description=checked_description(ask.description),
        tags=checked_tags(ask.tags),
    )
    if ask.data_center_id:
        checked_id("data center", ask.data_center_id)
    if ask.kind is DomainKind.DIRECTORY:
        _only(ask, "portal", "iqn", "chap_user", "chap_password")
        if ask.host_id:
            checked_id("host", ask.host_id)
        return replace(ask, path=directory.checked_path(ask.path))
    _only(ask, "path", "host_id")
    iscsi.checked_chap(ask.chap_user, ask.chap_password)
    return replace(ask, portal=iscsi.checked_portal(ask.portal), iqn=iscsi.checked_iqn(ask.iqn))


def _only(ask: CreateStorageDomain, *foreign: str) -> None:
    for field in foreign:
        if getattr(ask, field):
            raise invalid(f"a storage domain of kind {ask.kind} has no {field}: leave it out", field=field)


def wanted_hosts(domain: StorageDomain, maintenance: bool, hosts: Iterable[HostRow]) -> dict[str, HostRow]:
    """Hosts that are to have the domain, as far as they can be asked now."""
    if not domain.data_center_id or maintenance:
        return {}
    return {
        host.id: host
        for host in hosts
        if host.data_center_id == domain.data_center_id
        and host.status in CAN_CONNECT
        and domain.host_id in ("", host.id)
    }


def kept_hosts(domain: StorageDomain, maintenance: bool, hosts: Iterable[HostRow]) -> frozenset[str]:
    """Hosts whose word about the domain counts."""
    if not domain.data_center_id or maintenance:
        return frozenset()
    return frozenset(
        host.id
        for host in hosts
        if host.data_center_id == domain.data_center_id
        and host.status in STAYS_CONNECTED
        and domain.host_id in ("", host.id)
    )


def only_hosts(domain: StorageDomain, kept: frozenset[str]) -> StorageDomain:
    """The domain without what hosts said whose word no longer counts."""
    return replace(
        domain,
        host_ids=tuple(h for h in domain.host_ids if h in kept),
        unreachable={h: why for h, why in domain.unreachable.items() if h in kept},
        lost={h: why for h, why in domain.lost.items() if h in kept},
    )


def with_status(domain: StorageDomain, maintenance: bool, *, activating: bool = False) -> StorageDomain:
    """The domain with the status that follows from everything else."""
    if not domain.data_center_id:
        status = DomainStatus.UNATTACHED
    elif maintenance:
        status = DomainStatus.MAINTENANCE
    elif domain.host_ids:
        status = DomainStatus.ACTIVE
    elif activating:
        status = DomainStatus.ACTIVATING
    else:
        status = DomainStatus.INACTIVE
    return replace(domain, status=status)


def with_report(
    domain: StorageDomain,
    host_id: str,
    report: StorageDomainReport,
    disks: Iterable[Disk],
    withheld: Mapping[int, str],
    known: Collection[str],
) -> StorageDomain:
    """What the domain is after a host said what it sees. Small changes of free space are not worth telling."""
    hosts = set(domain.host_ids) - {host_id}
    unreachable = {h: why for h, why in domain.unreachable.items() if h != host_id}
    if not report.reachable:
        why = report.problem or "the host doesn't say why"
        return replace(
            domain,
            host_ids=tuple(sorted(hosts)),
            unreachable=dict(sorted((unreachable | {host_id: why}).items())),
        )
    available = report.available_bytes
    step = min(NOTED_BYTES, max(report.capacity_bytes // 100, 1))
    if domain.host_ids and abs(available - domain.available_bytes) < step:
        available = domain.available_bytes
    seen = replace(
        domain,
        host_ids=tuple(sorted(hosts | {host_id})),
        unreachable=unreachable,
        capacity_bytes=report.capacity_bytes,
        available_bytes=available,
        strangers=strangers(domain, report, known),
        luns=_luns(domain, report),
    )
    return with_disks(seen, disks, withheld)


def _luns(domain: StorageDomain, report: StorageDomainReport) -> tuple[Lun, ...]:
    if domain.kind is not DomainKind.ISCSI:
        return ()
    return tuple(Lun(lun=int(v.path), size_bytes=v.size_bytes) for v in report.volumes if v.path.isdecimal())


def with_disks(domain: StorageDomain, disks: Iterable[Disk], withheld: Mapping[int, str]) -> StorageDomain:
    """The domain with what its disks take of it."""
    disks = list(disks)
    domain = replace(domain, committed_bytes=sum(disk.size_bytes for disk in disks))
    if domain.kind is not DomainKind.ISCSI:
        return domain
    owners = {disk.lun: disk.id for disk in disks if disk.lun >= 0}
    luns = tuple(
        replace(lun, disk_id=owners.get(lun.lun, ""), withheld=withheld.get(lun.lun, ""))
        for lun in domain.luns
    )
    return replace(
        domain,
        luns=luns,
        available_bytes=sum(lun.size_bytes for lun in luns if not lun.disk_id and not lun.withheld),
        strangers=tuple(f"lun {lun.lun}" for lun in luns if lun.withheld),
    )


def strangers(domain: StorageDomain, report: StorageDomainReport, known: Collection[str]) -> tuple[str, ...]:
    """Files there that no disk of ours explains. Of LUNs `lun_model` says which are withheld."""
    if domain.kind is not DomainKind.DIRECTORY:
        return ()
    found = set(report.strangers) | {v.path for v in report.volumes}
    return tuple(sorted(path for path in found if directory.reported_name(path) not in known))[:1000]


def known_paths(domain: StorageDomain, known: Iterable[str]) -> tuple[str, ...]:
    """What an order to connect calls known: paths of the files with these names, or numbers of LUNs."""
    if domain.kind is DomainKind.ISCSI:
        return tuple(sorted(name for name in known if name.isdecimal()))
    return tuple(f"{domain.path}/{domain.id}/disks/{name}" for name in sorted(known))


def running_users(disks: Iterable[Row[Disk, DiskPrivate]], vms: Mapping[str, VmRow]) -> list[str]:
    """Names of VMs that run with one of these disks."""
    ids = {use.vm_id for row in disks for use in row.public.uses}
    return sorted(vms[i].name for i in ids if i in vms and vms[i].status not in NOT_RUNNING)


def refuse_maintenance(domain: StorageDomain, running: list[str], busy: list[str]) -> None:
    """Raises Refused(conflict) naming what still needs the domain."""
    if running:
        raise conflict(
            f"storage domain {domain.name} can't go into maintenance: disks on it are used by running VMs "
            f"{_some(running)}; stop these VMs or move them away first",
            vms=running[:100],
        )
    if busy:
        raise conflict(
            f"storage domain {domain.name} can't go into maintenance: its disks {_some(busy)} are being worked on; "
            "wait for these operations or cancel them",
            disks=busy[:100],
        )


def refuse_transition(domain: StorageDomain, action: str) -> None:
    """Raises Refused unless the domain's status allows the action."""
    allowed = ACTIONS.get(action)
    if allowed is None:
        raise invalid(
            f"{action!r} isn't an action of a storage domain; the actions are {', '.join(sorted(ACTIONS))}",
            field="action",
        )
    if domain.status not in allowed:
        raise conflict(
            f"storage domain {domain.name} is {domain.status} and can't be told to {action}: "
            f"it would have to be {' or '.join(sorted(allowed))}",
            status=str(domain.status),
        )


_ATTACHED = frozenset(DomainStatus) - {DomainStatus.UNATTACHED}
ACTIONS: Mapping[str, frozenset[DomainStatus]] = {
    "activate": frozenset({DomainStatus.MAINTENANCE, DomainStatus.INACTIVE, DomainStatus.ACTIVATING}),
    "maintain": _ATTACHED - {DomainStatus.MAINTENANCE},
    "detach": frozenset({DomainStatus.MAINTENANCE}),
    "refresh": _ATTACHED - {DomainStatus.MAINTENANCE},
}


def unreached(domain: StorageDomain) -> Refused:
    """Why a domain that no host reaches can't be used."""
    reasons = "; ".join(f"host {host}: {why}" for host, why in sorted(domain.unreachable.items())[:5])
    return Refused(
        Kind.UNAVAILABLE,
        f"no host of its data center reaches storage domain {domain.name}"
        + (f" ({reasons})" if reasons else "; at least one host must be up"),
        unreachable=domain.unreachable,
    )


def refuse_unusable(domain: StorageDomain) -> None:
    """Raises Refused unless disks on this domain can be worked on now."""
    if domain.status in (DomainStatus.INACTIVE, DomainStatus.ACTIVATING):
        raise unreached(domain)
    if domain.status is not DomainStatus.ACTIVE:
        raise conflict(
            f"storage domain {domain.name} is {domain.status}: "
            + (
                "attach it to a data center first"
                if domain.status is DomainStatus.UNATTACHED
                else "activate it first"
            ),
            status=str(domain.status),
        )


def in_turn(host_ids: Iterable[str], object_id: str) -> list[str]:
    """These hosts in the order to ask them about this object: others begin elsewhere, so that work is spread."""
    found = sorted(host_ids)
    start = int(object_id.replace("-", ""), 16) % len(found) if found and is_id(object_id) else 0
    return [*found[start:], *found[:start]]


def choose_host(host_ids: Iterable[str], object_id: str) -> str:
    """One of these hosts to work on the object. "" when there is none."""
    return next(iter(in_turn(host_ids, object_id)), "")


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
