"""iSCSI targets and LUNs, always from user space: the host's kernel never logs in to anything."""

from __future__ import annotations

import asyncio
import re

from host_agent import children, images
from host_agent.children import ChildFailed, ChildTimedOut, Limits
from volery.contracts.agent import StorageDomainReport, VolumeReport
from volery.contracts.domain import ImageFormat, IscsiSource
from volery.contracts.errors import Kind, Refused, invalid
from volery.contracts.volume_orders import DiscoveredLun, DiscoveredTarget, IscsiLocation, IscsiTargets

LIST_SECONDS = 15.0
LIMITS = Limits(cpu_seconds=10, address_space_bytes=512 * 1024**2)
PARALLEL_LOOKS = 8
PROBED_LUNS = 64
PORTAL = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9.-]+):\d{1,5}")
IQN = re.compile(r"(iqn|eui|naa)\.[A-Za-z0-9.:_-]{1,220}")
TARGET_LINE = re.compile(r"^Target:(\S+) Portal:(\S+?),\d+\s*$")
LUN_LINE = re.compile(r"^Lun:(\d+)\s+Type:DIRECT_ACCESS\b")


def check_names(portal: str, iqn: str = "iqn.x") -> None:
    """Raises Refused(invalid) for what isn't a portal or a target's name."""
    if not PORTAL.fullmatch(portal):
        raise invalid(f"{portal!r} isn't an iSCSI portal: write host:port, as in 192.0.2.7:3260")
    if not IQN.fullmatch(iqn):
        raise invalid(
            f"{iqn!r} isn't the name of an iSCSI target: write it as in iqn.2026-11.org.example:disks"
        )


async def discover(portal: str, chap_user: str, chap_password: str) -> IscsiTargets:
    """The targets at a portal with their LUNs; one that refuses the login says why in its `problem`.

    Raises Refused(unavailable) when the portal doesn't answer.
    """
    check_names(portal)
    listed, _ = await _iscsi_ls(portal, chap_user, chap_password, with_luns=False)
    found = parse_targets(listed)
    targets = await asyncio.gather(*(_luns(iqn, at, chap_user, chap_password) for iqn, at in found))
    return IscsiTargets(targets=tuple(targets))


def parse_targets(output: str) -> list[tuple[str, str]]:
    """(target name, portal) from `iscsi-ls`."""
    matches = (TARGET_LINE.match(line) for line in output.splitlines())
    return [(m[1], m[2]) for m in matches if m]


def parse_luns(output: str, iqn: str) -> list[int]:
    """The numbers of one target's disks from `iscsi-ls -s`; controllers, tapes and CDs aren't disks."""
    luns: list[int] = []
    inside = False
    for line in output.splitlines():
        if target := TARGET_LINE.match(line):
            inside = target[1] == iqn
        elif inside and (lun := LUN_LINE.match(line)):
            luns.append(int(lun[1]))
    return luns


async def _luns(iqn: str, portal: str, user: str, password: str) -> DiscoveredTarget:
    try:
        sizes = await lun_sizes(IscsiLocation(portal=portal, iqn=iqn, chap_user=user, chap_password=password))
    except Refused as refused:
        return DiscoveredTarget(iqn=iqn, portal=portal, problem=refused.message)
    luns = tuple(DiscoveredLun(lun=lun, size_bytes=size) for lun, size in sizes)
    return DiscoveredTarget(iqn=iqn, portal=portal, luns=luns)


async def lun_sizes(location: IscsiLocation) -> list[tuple[int, int]]:
    """(number, exact size in bytes) of each disk of a target. Raises Refused."""
    check_names(location.portal, location.iqn)
    listed, whole = await _iscsi_ls(
        location.portal, location.chap_user, location.chap_password, with_luns=True
    )
    if location.iqn not in dict(parse_targets(listed)) and whole:
        raise Refused(
            Kind.NOT_FOUND,
            f"portal {location.portal} has no target {location.iqn}: discover its targets first",
        )
    luns = parse_luns(listed, location.iqn)
    if luns or whole:
        return [(lun, await size(source(location, lun))) for lun in luns]
    return await _probed(location)


async def _probed(location: IscsiLocation) -> list[tuple[int, int]]:
    """The LUNs found by asking for each: iscsi-ls ends at the first target that refuses its login."""
    gate = asyncio.Semaphore(PARALLEL_LOOKS)

    async def look(lun: int) -> tuple[int, int] | Refused:
        async with gate:
            try:
                return lun, await size(source(location, lun))
            except Refused as refused:
                return refused

    first = await look(0)
    if isinstance(first, Refused) and first.kind in (Kind.FORBIDDEN, Kind.TIMEOUT):
        raise first
    found = [first, *await asyncio.gather(*map(look, range(1, PROBED_LUNS)))]
    return [one for one in found if not isinstance(one, Refused) and one[1]]


def source(location: IscsiLocation, lun: int) -> IscsiSource:
    return IscsiSource(
        portal=location.portal,
        iqn=location.iqn,
        lun=lun,
        chap_user=location.chap_user,
        chap_password=location.chap_password,
    )


async def size(lun: IscsiSource) -> int:
    """The LUN's size in bytes. Raises Refused."""
    check_names(lun.portal, lun.iqn)
    return (await images.info(images.source_node(lun), lun)).virtual_size


async def report(domain_id: str, location: IscsiLocation) -> StorageDomainReport:
    """The target's LUNs as volumes; their `path` is the LUN's number. Raises Refused."""
    sizes = await lun_sizes(location)
    volumes = tuple(
        VolumeReport(path=str(lun), size_bytes=size, used_bytes=size, format=ImageFormat.RAW)
        for lun, size in sizes
    )
    capacity = sum(size for _, size in sizes)
    return StorageDomainReport(
        domain_id=domain_id, reachable=True, capacity_bytes=capacity, available_bytes=0, volumes=volumes
    )


async def _iscsi_ls(portal: str, user: str, password: str, *, with_luns: bool) -> tuple[str, bool]:
    """What iscsi-ls says, and whether it came to its end: with LUNs it stops at a target that refuses the login.

    The password goes by environment, which only root reads, never by argument.
    Raises Refused(unavailable) when the portal doesn't answer.
    """
    output = bytearray()
    try:
        await children.run(
            ["iscsi-ls", *(["-s"] if with_luns else []), f"iscsi://{portal}"],
            timeout_seconds=LIST_SECONDS,
            environment={"LIBISCSI_CHAP_USERNAME": user, "LIBISCSI_CHAP_PASSWORD": password} if user else {},
            limits=LIMITS,
            on_output=output.extend,
        )
    except ChildTimedOut as failure:
        raise Refused(
            Kind.UNAVAILABLE, f"iSCSI portal {portal} doesn't answer: check address, port and network"
        ) from failure
    except ChildFailed as failure:
        listed = output.decode(errors="replace")
        if not parse_targets(listed):
            raise Refused(
                Kind.UNAVAILABLE, f"iSCSI portal {portal} can't be listed: {failure.reason[:200]}"
            ) from failure
        return listed, False
    return output.decode(errors="replace"), True
