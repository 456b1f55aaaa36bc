"""Which LUNs no disk may get, although the database knows no disk of theirs. Pure: no bus, no database, no clock.

The database may be older than the storage (after a restore), and others may use a target. So a LUN is free only when
no host has it open, and when it reads as zeros; what says otherwise is a stranger, reported and left alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from services.storage.store import HostLuns
from volery.contracts.agent import OpenLun
from volery.contracts.errors import conflict, invalid
from volery.contracts.storage import CreateDisk, Disk, DomainKind, StorageDomain

RULE_CONTENT = "lun_content"
"""What a host's refusal is called that found something on a LUN."""


def opened(domain: StorageDomain, hosts: Iterable[HostLuns], disks: Iterable[Disk]) -> dict[int, str]:
    """LUN → who has it open, of those that are not open as the disk that has them."""
    if domain.kind is not DomainKind.ISCSI:
        return {}
    owners = {disk.lun: disk.id for disk in disks if disk.lun >= 0}
    found: dict[int, str] = {}
    for host in hosts:
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
    domain: StorageDomain,
    stained: Mapping[str, str],
    hosts: Iterable[HostLuns],
    disks: Iterable[Disk],
) -> dict[int, str]:
    """LUN → why no disk gets it. Of one that has a disk: why its disk isn't the only one to use it."""
    disks = list(disks)
    owned = {disk.lun for disk in disks}
    found = {int(lun): why for lun, why in stained.items() if int(lun) not in owned}
    return found | opened(domain, hosts, disks)


def believed(hosts: Iterable[HostLuns]) -> list[HostLuns]:
    """Without hosts that inventory doesn't have and that have said nothing for long: an administrator who names a
    LUN and has it overwritten vouches that they are gone."""
    return [host for host in hosts if host.known or host.fresh]


def checked(ask: CreateDisk, domain: StorageDomain) -> None:
    """Raises Refused(invalid) for a LUN where there is none, or an overwriting that isn't meant for one LUN."""
    if ask.lun >= 0 and domain.kind is not DomainKind.ISCSI:
        raise invalid(f"storage domain {domain.name} has no LUNs: leave it out", field="lun")
    if ask.overwrite and ask.lun < 0:
        raise invalid(
            "say which LUN is to be overwritten: `overwrite` goes with `lun` only", field="overwrite"
        )


def refuse_open(domain: StorageDomain, lun: int, hosts: Iterable[HostLuns], disks: Iterable[Disk]) -> None:
    """Raises Refused(conflict) while somebody has the LUN open."""
    if why := opened(domain, hosts, disks).get(lun):
        raise conflict(
            f"LUN {lun} of storage domain {domain.name} can't become a disk's: {why}; stop it first",
            rule="lun_open",
            lun=lun,
        )
