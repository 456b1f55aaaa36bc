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
from volery.contracts.volumes import IN_CHAIN, Volume
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


def with_overlay(chain: Chain, made: Volume, snapshot_id: str) -> Chain:
    """A volume that was made above the leaf is the leaf; the former one belongs to the snapshot."""
    frozen = replace(chain.leaf, snapshot_id=snapshot_id)
    loose = tuple(volume for volume in chain.loose if volume.id != made.id)
    return Chain((*chain.volumes[:-1], frozen, made), loose)


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
    for name, below in zip(line, ["", *line[:-1]], strict=True):
        volume = reported.get(name)
        if volume is not None and volume.backing is not None and volume.backing != below:
            return (
                f"{name} says that {volume.backing or 'nothing'} is below it, and it should be {below or 'nothing'}: its "
                "files were changed by hand, or Volery's database is older than they are; put the files right, then "
                "refresh the storage domain"
            )
    for opened in report.open_chains or ():
        if opened.disk_id == disk.id and opened.files != tuple(reversed(line)):
            return _opened_otherwise(opened, line)
    return ""


def _opened_otherwise(opened: OpenChain, line: Sequence[str]) -> str:
    return (
        f"VM {opened.vm_id} has {' above '.join(opened.files)} open, and it should be {' above '.join(reversed(line))}: "
        "Volery's database is older than that, or the VM's disk was changed by hand; leave the VM running, copy its data "
        "from inside, and put the files right when it is stopped"
    )


def overlay(volume_id: str, chain: Chain, size_bytes: int, operation_id: str) -> Volume:
    """A volume that is going to be made above the leaf."""
    return Volume(
        id=volume_id,
        parent_id=chain.leaf.id,
        format=ImageFormat.QCOW2,
        size_bytes=size_bytes,
        made_by=operation_id,
    )
