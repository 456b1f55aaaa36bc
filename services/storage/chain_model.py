"""A disk's volumes in their order, and what reports say of them. Pure: no bus, no database, no clock."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from msgspec.structs import replace

from services.storage.domain_model import BACKENDS
from services.storage.store import DiskPrivate
from volery.contracts.agent import OpenChain, StorageDomainReport, VolumeReport
from volery.contracts.domain import ImageFormat
from volery.contracts.storage import Disk, DiskStatus, StorageDomain
from volery.contracts.volumes import IN_CHAIN, Volume, VolumeState
from volery.runtime.tables import Row

NOTED_BYTES = 64 * 1024**2
"""A disk's growth is announced when it is this much, or a hundredth of its size."""


@dataclass(frozen=True, slots=True)
class Chain:
    """All volumes of a disk."""

    volumes: tuple[Volume, ...]
    """From its base to its leaf."""
    loose: tuple[Volume, ...] = ()
    """Those that are being made or removed: they may be there, and belong to it."""

    @property
    def leaf(self) -> Volume:
        return self.volumes[-1]

    @property
    def all(self) -> tuple[Volume, ...]:
        return (*self.volumes, *self.loose)


Chains = Mapping[str, Chain]
"""By disk."""


def base_of(disk: Disk) -> Volume:
    """The first volume of a disk: it has its id."""
    return Volume(id=disk.id, format=disk.format, size_bytes=disk.size_bytes)


def chain_of(disk: Disk, volumes: Sequence[Volume]) -> Chain:
    """These volumes in order. Of a disk that a former release made meanwhile nothing is written down: it has its base.

    Raises ValueError when they aren't a line from one base to one leaf, which the table forbids.
    """
    above = {volume.parent_id: volume for volume in volumes if volume.state in IN_CHAIN}
    line = list[Volume]()
    at = ""
    while at in above:
        line.append(above.pop(at))
        at = line[-1].id
    if above:
        raise ValueError(
            f"the volumes of disk {disk.id} are no chain: {sorted(v.id for v in above.values())}"
        )
    loose = tuple(volume for volume in volumes if volume.state not in IN_CHAIN)
    return Chain(tuple(line) or (base_of(disk),), loose)


def alone(disk: Disk) -> Disk:
    """A disk that has its base and nothing else, which uses as much as it says."""
    only = replace(base_of(disk), used_bytes=disk.used_bytes)
    return described(replace(disk, volumes=(only,)), Chain((only,)))


def described(disk: Disk, chain: Chain) -> Disk:
    """The disk, saying its volumes; what was reported of those that it had stays."""
    used = {volume.id: volume.used_bytes for volume in disk.volumes}
    volumes = tuple(replace(volume, used_bytes=used.get(volume.id, 0)) for volume in chain.all)
    return replace(disk, volumes=volumes, leaf_id=chain.leaf.id, depth=len(chain.volumes))


def with_leaf(chain: Chain, made: Volume, snapshot_id: str) -> Chain:
    """A volume that was made is the leaf, above the one that it was made above; that belongs to the snapshot, and what was
    above it goes."""
    kept, gone = split(chain, made.parent_id)
    frozen = replace(kept[-1], snapshot_id=snapshot_id)
    left = tuple(volume for volume in chain.loose if volume.id != made.id)
    leaving = tuple(replace(volume, state=VolumeState.REMOVING) for volume in gone)
    return Chain((*kept[:-1], frozen, replace(made, state=VolumeState.OK)), (*left, *leaving))


def split(chain: Chain, volume_id: str) -> tuple[tuple[Volume, ...], tuple[Volume, ...]]:
    """The volumes up to this one, and those above it. Raises ValueError when it isn't one of them."""
    at = [volume.id for volume in chain.volumes].index(volume_id) + 1
    return chain.volumes[:at], chain.volumes[at:]


def merging(chain: Chain, volume_id: str) -> Chain:
    """The volume above this one is being merged into it."""
    kept, (above, *rest) = split(chain, volume_id)
    return Chain((*kept, replace(above, state=VolumeState.MERGING), *rest), chain.loose)


def merged(chain: Chain, volume_id: str, host_id: str) -> Chain:
    """The volume above this one was merged into it: this one is in its place, and that one goes, by the host that did it."""
    kept, (above, *rest) = split(chain, volume_id)
    now = replace(kept[-1], snapshot_id=above.snapshot_id, size_bytes=above.size_bytes)
    if rest:
        rest = [replace(rest[0], parent_id=now.id), *rest[1:]]
    gone = replace(above, state=VolumeState.REMOVING, host_id=host_id)
    return Chain((*kept[:-1], now, *rest), (*chain.loose, gone))


def without(chain: Chain, volume_id: str) -> Chain:
    """What is left when this volume is gone, which is the leaf or in no chain."""
    return Chain(
        tuple(volume for volume in chain.volumes if volume.id != volume_id),
        tuple(volume for volume in chain.loose if volume.id != volume_id),
    )


def names(domain: StorageDomain, disk: Disk, volumes: Iterable[Volume]) -> list[str]:
    """What reports call these volumes."""
    backend = BACKENDS[domain.kind]
    return [backend.volume_name(disk, volume) for volume in volumes]


def known(domain: StorageDomain, disks: Iterable[Disk], chains: Chains) -> frozenset[str]:
    """What reports call the volumes that these disks explain."""
    return frozenset(name for disk in disks for name in names(domain, disk, chains[disk.id].all))


# What reports say


def _reported(domain: StorageDomain, report: StorageDomainReport) -> dict[str, VolumeReport]:
    backend = BACKENDS[domain.kind]
    return {backend.reported_name(volume.path): volume for volume in report.volumes}


def seen(
    domain: StorageDomain,
    rows: Iterable[Row[Disk, DiskPrivate]],
    chains: Chains,
    report: StorageDomainReport,
) -> list[tuple[Row[Disk, DiskPrivate], Disk]]:
    """Disks that a report changes for the better: found again, put right, or grown. It never makes one missing, since it
    may be older than the disk."""
    reported = _reported(domain, report)
    changed = []
    for row in rows:
        chain = chains[row.id]
        found = [reported.get(name) for name in names(domain, row.public, chain.volumes)]
        volumes = [volume for volume in found if volume is not None]
        if len(volumes) < len(found):
            continue
        new = _measured(row.public, chain, volumes)
        if new.status is DiskStatus.MISSING:
            new = replace(new, status=DiskStatus.OK)
        if new.chain_problem and not crooked(domain, new, chain, report):
            cured = DiskStatus.OK if new.status is DiskStatus.ILLEGAL else new.status
            new = replace(new, chain_problem="", status=cured)
        if new != row.public:
            changed.append((row, new))
    return changed


def _measured(disk: Disk, chain: Chain, reports: Sequence[VolumeReport]) -> Disk:
    step = min(NOTED_BYTES, max(disk.size_bytes // 100, 1))
    used = sum(report.used_bytes for report in reports)
    if disk.lun >= 0 or abs(used - disk.used_bytes) < step:
        return disk
    each = {volume.id: report.used_bytes for volume, report in zip(chain.volumes, reports, strict=True)}
    volumes = tuple(replace(v, used_bytes=each.get(v.id, v.used_bytes)) for v in disk.volumes)
    return replace(disk, used_bytes=used, volumes=volumes)


def absent(
    domain: StorageDomain,
    rows: Iterable[Row[Disk, DiskPrivate]],
    chains: Chains,
    report: StorageDomainReport,
) -> list[Row[Disk, DiskPrivate]]:
    """Disks that should be there by this report and aren't, or not with all their volumes."""
    there = _reported(domain, report).keys()
    return [
        row
        for row in rows
        if _is_settled(row.public) and not there >= set(names(domain, row.public, chains[row.id].volumes))
    ]


def _is_settled(disk: Disk) -> bool:
    return disk.status is DiskStatus.OK and not disk.busy_with


def broken(
    domain: StorageDomain,
    rows: Iterable[Row[Disk, DiskPrivate]],
    chains: Chains,
    report: StorageDomainReport,
) -> list[tuple[Row[Disk, DiskPrivate], Disk]]:
    """Disks whose files aren't above each other as they should be by this report: they are illegal from now on."""
    return [
        (row, replace(row.public, status=DiskStatus.ILLEGAL, chain_problem=problem))
        for row in rows
        if _is_settled(row.public) and (problem := crooked(domain, row.public, chains[row.id], report))
    ]


def crooked(domain: StorageDomain, disk: Disk, chain: Chain, report: StorageDomainReport) -> str:
    """How the disk's chain differs from what the files' headers say, or from what a VM has open; "" when it doesn't."""
    reported = _reported(domain, report)
    line = names(domain, disk, chain.volumes)
    for number, name in enumerate(line):
        volume = reported.get(name)
        if volume is None or volume.backing is None:
            continue
        below = line[number - 1] if number else ""
        if volume.backing not in _may_name(chain, line, number):
            return (
                f"{name} says that {volume.backing or 'nothing'} is below it, and it should be {below or 'nothing'}: its "
                "files were changed by hand, or Volery's database is older than they are; put the files right, then "
                "refresh the storage domain"
            )
    for opened in report.open_chains or ():
        if opened.disk_id == disk.id and opened.files != tuple(reversed(line)):
            return _opened_otherwise(opened, line)
    return ""


def _may_name(chain: Chain, line: Sequence[str], number: int) -> tuple[str, ...]:
    """What the header of a volume may call the one below: also what is below that, if they are being merged."""
    if not number:
        return ("",)
    if chain.volumes[number - 1].state is VolumeState.MERGING:
        return (line[number - 1], line[number - 2])
    return (line[number - 1],)


def _opened_otherwise(opened: OpenChain, line: Sequence[str]) -> str:
    return (
        f"VM {opened.vm_id} has {' above '.join(opened.files)} open, and it should be {' above '.join(reversed(line))}: "
        "Volery's database is older than that, or the VM's disk was changed by hand; leave the VM running, copy its data "
        "from inside, and put the files right when it is stopped"
    )


def overlay(volume_id: str, below: Volume, size_bytes: int, operation_id: str) -> Volume:
    """A volume that is going to be made above this one."""
    return Volume(
        id=volume_id,
        parent_id=below.id,
        state=VolumeState.NEW,
        format=ImageFormat.QCOW2,
        size_bytes=size_bytes,
        made_by=operation_id,
    )
