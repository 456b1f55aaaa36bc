"""An iSCSI target reached by QEMU itself: every volume is a whole LUN, raw, and as large as the target made it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from volery.contracts.domain import IscsiSource
from volery.contracts.errors import Kind, Refused, conflict, invalid
from volery.contracts.storage import Disk, StorageDomain
from volery.contracts.volume_orders import IscsiLocation
from volery.contracts.volumes import Volume

GROWS = False
PORTAL = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9.-]+)(:\d{1,5})?")
IQN = re.compile(r"(iqn|eui|naa)\.[A-Za-z0-9.:_-]{1,220}")
DEFAULT_PORT = 3260
CHAP_USER = re.compile(r"[A-Za-z0-9.:@_-]{1,255}")


def checked_portal(portal: str) -> str:
    """`host:port`, with the usual port where none was given. Raises Refused(invalid)."""
    match = PORTAL.fullmatch(portal)
    port = int(match[2][1:]) if match and match[2] else DEFAULT_PORT
    if not match or not 1 <= port <= 65535:
        raise invalid(
            f"{portal[:200]!r} isn't an iSCSI portal: write host or host:port, e.g. 192.0.2.7:3260",
            field="portal",
        )
    return f"{match[1]}:{port}"


def checked_iqn(iqn: str) -> str:
    if not IQN.fullmatch(iqn):
        raise invalid(
            f"{iqn[:250]!r} isn't the name of an iSCSI target: it is like iqn.2026-11.org.example:disks; discover the "
            "portal's targets to see theirs",
            field="iqn",
        )
    return iqn


def checked_chap(user: str, password: str) -> None:
    """Raises Refused(invalid), never with the password in it."""
    if bool(user) != bool(password):
        raise invalid("CHAP needs both a user and a password, or neither", field="chap_user")
    if user and not CHAP_USER.fullmatch(user):
        raise invalid(
            "a CHAP user has letters, digits and . : @ _ - only, at most 255 of them", field="chap_user"
        )
    if len(password) > 255 or not password.isprintable():
        raise invalid("a CHAP password has at most 255 printable characters", field="chap_password")


def location(domain: StorageDomain, chap_password: str) -> IscsiLocation:
    return IscsiLocation(
        portal=domain.portal, iqn=domain.iqn, chap_user=domain.chap_user, chap_password=chap_password
    )


def source(domain: StorageDomain, disk: Disk, volumes: Sequence[Volume], chap_password: str) -> IscsiSource:
    return IscsiSource(
        portal=domain.portal,
        iqn=domain.iqn,
        lun=disk.lun,
        chap_user=domain.chap_user,
        chap_password=chap_password,
    )


def volume_name(disk: Disk, volume: Volume) -> str:
    return str(disk.lun)


def reported_name(path: str) -> str:
    return path


def place(
    domain: StorageDomain,
    size_bytes: int,
    preallocated: bool,
    taken: frozenset[int],
    withheld: Mapping[int, str],
    reserve_bytes: int,
) -> int:
    """The smallest free LUN that is large enough. Raises Refused(exhausted)."""
    free = sorted(
        (lun.size_bytes, lun.lun) for lun in domain.luns if lun.lun not in taken and lun.lun not in withheld
    )
    for size, lun in free:
        if size >= size_bytes:
            return lun
    largest = free[-1][0] if free else 0
    kept = "; ".join(f"LUN {lun} is not given away: {why}" for lun, why in sorted(withheld.items())[:5])
    raise Refused(
        Kind.EXHAUSTED,
        f"target {domain.iqn} of storage domain {domain.name} has no free LUN of at least {size_bytes} bytes "
        f"(the largest free one has {largest}): add a LUN on the target and refresh the domain, or make a smaller disk"
        + (f" ({kept})" if kept else ""),
        rule="lun",
        largest_free_bytes=largest,
        withheld={str(lun): why for lun, why in sorted(withheld.items())[:100]},
    )


def named(
    domain: StorageDomain, lun: int, size_bytes: int, taken: frozenset[int], withheld: Mapping[int, str]
) -> int:
    """The LUN that was asked for by its number. Raises Refused."""
    found = next((one for one in domain.luns if one.lun == lun), None)
    if found is None:
        raise invalid(
            f"target {domain.iqn} of storage domain {domain.name} has no LUN {lun}: refresh the domain, or name "
            f"one of {', '.join(str(one.lun) for one in domain.luns[:20])}",
            field="lun",
        )
    if lun in taken:
        raise conflict(f"LUN {lun} of storage domain {domain.name} has a disk already", lun=lun)
    if size_bytes > found.size_bytes:
        raise Refused(
            Kind.EXHAUSTED,
            f"LUN {lun} of storage domain {domain.name} has {found.size_bytes} bytes, fewer than {size_bytes}: "
            "make the LUN larger on the target and refresh the domain, or make a smaller disk",
            rule="lun",
            lun_bytes=found.size_bytes,
        )
    if lun in withheld:
        raise conflict(
            f"LUN {lun} of storage domain {domain.name} is not given away: {withheld[lun]}",
            rule="lun_withheld",
            lun=lun,
        )
    return lun
