"""Which LUNs no disk may get, although the database knows no disk of theirs. Pure: no bus, no database, no clock.

The database may be older than the storage (after a restore), and others may use a target. So a LUN is free only when
no host has it open, and when it reads as zeros; what says otherwise is a stranger, reported and left alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from services.storage.store import HostLuns
from volery.contracts.agent import OpenLun
from volery.contracts.errors import conflict, invalid
from volery.contracts.storage import CreateDisk, Disk, DomainKind, StorageDomain

RULE_CONTENT = "lun_content"
"""What a host's refusal is called that found something on a LUN."""


@dataclass(frozen=True, slots=True)
class Seen:
    """What hosts said about a target's LUNs, and how often this database gave each of them to a disk."""

    hosts: Sequence[HostLuns] = ()
    claims: Mapping[int, int] = field(default_factory=dict)

    def with_host(self, said: HostLuns) -> Seen:
        others = [host for host in self.hosts if host.host_id != said.host_id]
        return Seen([*others, said], self.claims)

    def believed(self) -> Seen:
        """Without what an administrator overrules who names a LUN and has it overwritten: later claims, and hosts that
        inventory doesn't have and that have said nothing for long."""
        living = [host for host in self.hosts if host.known or host.fresh]
        return Seen([replace(host, claims=()) for host in living])

    def newest(self, iqn: str, lun: int) -> int:
        """The highest claim that a host carried out."""
        found = (c.claim for h in self.hosts for c in h.claims if (c.iqn, c.lun) == (iqn, lun))
        return max(found, default=0)


def foreign(domain: StorageDomain, seen: Seen, disks: Iterable[Disk]) -> dict[int, str]:
    """LUN → whose it is, of those that are not (only) what this database believes."""
    if domain.kind is not DomainKind.ISCSI:
        return {}
    owners = {disk.lun: disk.id for disk in disks if disk.lun >= 0}
    found: dict[int, str] = {}
    for host in seen.hosts:
        for claim in host.claims:
            if (
                claim.iqn == domain.iqn
                and claim.claim > seen.claims.get(claim.lun, 0)
                and owners.get(claim.lun) != claim.disk_id
            ):
                found[claim.lun] = (
                    f"host {host.host_id} says that disk {claim.disk_id} got it later than this database knows"
                )
        for one in host.luns:
            if one.iqn == domain.iqn and not (one.disk_id and owners.get(one.lun) == one.disk_id):
                found[one.lun] = f"{_opener(one)} on host {host.host_id} has it open" + (
                    "" if host.known else ", and inventory doesn't know this host"
                )
    return found


def _opener(one: OpenLun) -> str:
    who = f"VM {one.vm_id}" if one.vm_id else "an order"
    return f"{who} (disk {one.disk_id})" if one.disk_id else who


def withheld(
    domain: StorageDomain, stained: Mapping[str, str], seen: Seen, disks: Iterable[Disk]
) -> dict[int, str]:
    """LUN → why no disk gets it. Of one that has a disk: why that disk may not use it."""
    disks = list(disks)
    owned = {disk.lun for disk in disks}
    found = {int(lun): why for lun, why in stained.items() if int(lun) not in owned}
    return found | foreign(domain, seen, disks)


def checked(ask: CreateDisk, domain: StorageDomain) -> None:
    """Raises Refused(invalid) for a LUN where there is none, or an overwriting that isn't meant for one LUN."""
    if ask.lun >= 0 and domain.kind is not DomainKind.ISCSI:
        raise invalid(f"storage domain {domain.name} has no LUNs: leave it out", field="lun")
    if ask.overwrite and ask.lun < 0:
        raise invalid(
            "say which LUN is to be overwritten: `overwrite` goes with `lun` only", field="overwrite"
        )


def refuse_foreign(domain: StorageDomain, disk: Disk, seen: Seen, disks: Iterable[Disk]) -> None:
    """Raises Refused(conflict) unless the disk's LUN is this disk's, and nobody else has it open."""
    if why := foreign(domain, seen, disks).get(disk.lun):
        raise conflict(
            f"disk {disk.name} may not use LUN {disk.lun} of storage domain {domain.name}: {why}; stop what has it "
            "open, or, if this database was restored, delete this disk, which leaves the LUN alone",
            rule="lun_foreign",
            lun=disk.lun,
        )
