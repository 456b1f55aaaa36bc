"""A start that failed since another QEMU program has a disk of the VM locked: said also where libvirt doesn't know why."""

from __future__ import annotations

from collections.abc import Awaitable, Sequence
from pathlib import PurePath

from host_agent import places
from host_agent.places import Place
from host_agent.refusals import image_held
from volery.contracts.domain import DomainDisk, FileSource
from volery.contracts.errors import Kind, Refused


async def started(doing: str, start: Awaitable[None], disks: Sequence[DomainDisk]) -> None:
    """Waits for libvirt's start of a domain. Raises Refused, with rule `image_held` when a disk of it is locked: QEMU says
    so and ends, and libvirt hears that only if it is quick enough."""
    try:
        await start
    except Refused as problem:
        if problem.kind is not Kind.INTERNAL or not (path := await _locked(disks)):
            raise
        raise image_held(doing, path, **problem.details) from problem


async def _locked(disks: Sequence[DomainDisk]) -> str:
    """The file of a disk that a QEMU program has locked, on this host or on another one that reaches it; "" for none, or
    when the storage doesn't say."""
    for disk in disks:
        if not isinstance(disk.source, FileSource) or disk.cdrom or disk.read_only or disk.shareable:
            continue
        path = PurePath(disk.source.path)
        try:
            found = await places.look(Place(root=str(path.parent), folder="", name=path.name))
        except Refused:
            return ""
        if found.in_use:
            return str(path)
    return ""
