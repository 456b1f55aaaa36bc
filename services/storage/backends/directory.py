"""A directory: every volume is a file `{path}/{domain id}/disks/{volume id}.{format}`, qcow2 or raw, and can grow; a disk's
first one has the disk's id."""

from __future__ import annotations

import posixpath
from collections.abc import Mapping, Sequence

from volery.contracts.domain import BackingFile, ChainSource, FileSource
from volery.contracts.errors import Kind, Refused, invalid
from volery.contracts.storage import Disk, StorageDomain
from volery.contracts.volume_orders import DirectoryLocation
from volery.contracts.volumes import Volume, VolumeState

GROWS = True
MAX_PATH = 4096
MAX_PART = 255


def checked_path(path: str) -> str:
    """The path, normalised. Raises Refused(invalid) unless it is absolute, printable and without `..`."""
    parts = path.split("/")
    if not path.startswith("/") or ".." in parts or not path.isprintable() or path.strip("/") == "":
        raise invalid(
            f"{path[:200]!r} can't be a storage domain's directory: give an absolute path without `..`, "
            "e.g. /srv/volery",
            field="path",
        )
    if len(path.encode()) > MAX_PATH - 200 or any(len(part.encode()) > MAX_PART for part in parts):
        raise invalid("the path of a storage domain's directory is too long", field="path")
    return posixpath.normpath(path).replace("//", "/")


def location(domain: StorageDomain, chap_password: str) -> DirectoryLocation:
    return DirectoryLocation(path=domain.path)


def source(domain: StorageDomain, disk: Disk, volumes: Sequence[Volume], chap_password: str) -> FileSource:
    """The last of these volumes, which are above each other from the base on."""
    leaf, *below = reversed(volumes)
    path = f"{domain.path}/{domain.id}/disks/{volume_name(disk, leaf)}"
    if not below:
        return FileSource(path=path, format=leaf.format)
    backing = tuple(
        BackingFile(
            path=f"{domain.path}/{domain.id}/disks/{volume_name(disk, v)}",
            format=v.format,
            merging=v.state is VolumeState.MERGING,
        )
        for v in below
    )
    return ChainSource(path=path, format=leaf.format, backing=backing)


def volume_name(disk: Disk, volume: Volume) -> str:
    """How a volume is called in a report: the file's name, since hosts may mount through links."""
    return f"{volume.id}.{volume.format}"


def reported_name(path: str) -> str:
    return posixpath.basename(path)


def place(
    domain: StorageDomain,
    size_bytes: int,
    preallocated: bool,
    taken: frozenset[int],
    withheld: Mapping[int, str],
    reserve_bytes: int,
) -> int:
    """Whether a volume of this size fits; files have no LUN (-1). Raises Refused(exhausted)."""
    if size_bytes > domain.capacity_bytes:
        raise Refused(
            Kind.EXHAUSTED,
            f"a disk of {size_bytes} bytes is larger than all of storage domain {domain.name} "
            f"({domain.capacity_bytes} bytes): make it smaller, or use another storage domain",
            rule="capacity",
            capacity_bytes=domain.capacity_bytes,
        )
    free = domain.available_bytes - reserve_bytes
    needed = size_bytes if preallocated else 0
    if needed > free or free <= 0:
        raise Refused(
            Kind.EXHAUSTED,
            f"storage domain {domain.name} has {max(free, 0)} bytes to give and {needed or 'some'} are needed: "
            "free some space there, make a smaller or thin disk, or use another storage domain",
            rule="available",
            available_bytes=max(free, 0),
        )
    return -1
