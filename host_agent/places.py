"""Where a volume's file may be, and the children that touch it there.

A path from an order counts only inside a connected storage domain's own directory, under a volume's name.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import msgspec

from host_agent import children, leased
from host_agent.children import ChildFailed
from host_agent.config import AgentConfig
from host_agent.files import VOLUME_NAME
from host_agent.leased import FREE, Hold
from volery.contracts.agent import LunClaim, OpenLun
from volery.contracts.base import Done
from volery.contracts.domain import DomainLease, FileSource, IscsiSource, VolumeSource
from volery.contracts.errors import Kind, Refused, invalid
from volery.contracts.volume_orders import DirectoryLocation, IscsiLocation, StorageLocation

FILE_SECONDS = 30.0
"""For one look, rename or removal on a storage domain; beyond it its mount hangs."""
LOCK_WAIT_SECONDS = 10.0
VOLUME_LOCK = "volume-"


class ConnectedDomain(msgspec.Struct, frozen=True, kw_only=True):
    domain_id: str
    location: StorageLocation
    root: str = ""
    """A directory domain's own directory, `{path}/{domain_id}` without symbolic links."""


class Connected(msgspec.Struct, frozen=True, kw_only=True):
    """The file `storage.json` in the agent's state directory: what is connected, also after a restart."""

    domains: tuple[ConnectedDomain, ...] = ()


@dataclass(frozen=True, slots=True)
class Place:
    """A file in a storage domain's directory."""

    root: str
    folder: str
    name: str

    @property
    def path(self) -> str:
        return os.path.join(self.root, self.folder, self.name)


def _state_file(config: AgentConfig) -> Path:
    return Path(config.state_dir) / "storage.json"


def connected(config: AgentConfig) -> tuple[ConnectedDomain, ...]:
    """The storage domains connected here."""
    try:
        return msgspec.json.decode(_state_file(config).read_bytes(), type=Connected).domains
    except FileNotFoundError:
        return ()


def remember(config: AgentConfig, domain: ConnectedDomain) -> None:
    others = [d for d in connected(config) if d.domain_id != domain.domain_id]
    write_state(_state_file(config), Connected(domains=(*others, domain)))


def forget(config: AgentConfig, domain_id: str) -> None:
    left = tuple(d for d in connected(config) if d.domain_id != domain_id)
    write_state(_state_file(config), Connected(domains=left))


class Claims(msgspec.Struct, frozen=True, kw_only=True):
    """The file `claims.json` in the agent's state directory."""

    luns: tuple[LunClaim, ...] = ()


def _claims_file(config: AgentConfig) -> Path:
    return Path(config.state_dir) / "claims.json"


def claims(config: AgentConfig) -> tuple[LunClaim, ...]:
    """Which LUN became which disk's, by this host's work."""
    try:
        return msgspec.json.decode(_claims_file(config).read_bytes(), type=Claims).luns
    except FileNotFoundError:
        return ()


def note_claim(config: AgentConfig, claim: LunClaim) -> None:
    """Durable before the disk's first byte: a database that is restored doesn't know its disks, the hosts do."""
    others = [one for one in claims(config) if (one.iqn, one.lun) != (claim.iqn, claim.lun)]
    write_state(_claims_file(config), Claims(luns=(*others, claim)))


def write_state(path: Path, state: msgspec.Struct) -> None:
    """Replaces a small file of the agent's own whole and durably; only root reads it."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.new")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with open(descriptor, "wb") as file:
        file.write(msgspec.json.format(msgspec.json.encode(state), indent=1))
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def locate(config: AgentConfig, source: FileSource) -> Place:
    """The place a file volume's path names. Raises Refused(invalid) for any path but a volume's in a connected domain."""
    for domain in connected(config):
        if not isinstance(domain.location, DirectoryLocation):
            continue
        for top in (domain.root, os.path.join(os.path.normpath(domain.location.path), domain.domain_id)):
            name = source.path.removeprefix(f"{top}/disks/")
            if name != source.path and VOLUME_NAME.fullmatch(name):
                return _with_format(source, Place(domain.root, "disks", name))
    raise invalid(
        f"{source.path!r} isn't a volume of a storage domain connected to this host: connect the domain first; "
        "a volume is {domain}/disks/{disk id}.qcow2 or .raw",
        path=source.path,
    )


def _with_format(source: FileSource, place: Place) -> Place:
    if not place.name.endswith(f".{source.format}"):
        raise invalid(f"{source.path} can't be a volume of format {source.format}: its name says otherwise")
    return place


def check_lun(config: AgentConfig, source: IscsiSource) -> None:
    """Raises Refused(invalid) unless the LUN is on a target connected to this host."""
    for domain in connected(config):
        where = domain.location
        if isinstance(where, IscsiLocation) and (where.portal, where.iqn) == (source.portal, source.iqn):
            return
    raise invalid(
        f"iSCSI target {source.iqn} at {source.portal} isn't a storage domain connected to this host: connect it first"
    )


def staging_root(config: AgentConfig) -> str:
    """Where files wait that belong to iSCSI volumes: the same folders as in a domain's directory."""
    return config.staging_dir or os.path.join(config.state_dir, "staging")


def home(config: AgentConfig, source: VolumeSource) -> str:
    """The directory whose `staging` folder serves this volume; made where it is our own."""
    if isinstance(source, FileSource):
        return locate(config, source).root
    check_lun(config, source)
    root = staging_root(config)
    for folder in ("disks", "staging"):
        os.makedirs(os.path.join(root, folder), mode=0o700, exist_ok=True)
    return root


@contextlib.asynccontextmanager
async def volume_lock(
    config: AgentConfig, disk_id: str, target: VolumeSource | None = None, lease: DomainLease | None = None
) -> AsyncIterator[Hold]:
    """One writer per volume on this host: also a child that outlived its order, or the agent, counts.

    A LUN is noted in the lock's file, since nothing else says which one is being written.
    """
    async with children.held(
        Path(config.state_dir) / "locks" / f"{VOLUME_LOCK}{disk_id}",
        wait_seconds=LOCK_WAIT_SECONDS,
        otherwise=f"volume {disk_id} is still being worked on by a former order that has not ended: "
        "its storage may hang; try again when that order has ended",
    ) as descriptor:
        os.ftruncate(descriptor, 0)
        if isinstance(target, IscsiSource):
            note = OpenLun(iqn=target.iqn, lun=target.lun, disk_id=disk_id)
            os.pwrite(descriptor, msgspec.json.encode(note), 0)
        yield Hold(descriptor, lease)


def luns_at_work(config: AgentConfig) -> list[OpenLun]:
    """LUNs that an order of this host is working on now, or a child that such an order left behind."""
    found = []
    for path in sorted((Path(config.state_dir) / "locks").glob(f"{VOLUME_LOCK}*")):
        if note := children.note_of(path):
            found.append(msgspec.json.decode(note, type=OpenLun))
    return found


# Requests to host_agent.files


class _OneFile(msgspec.Struct):
    root: str
    folder: str
    name: str
    wipe: bool = False


class _Placing(msgspec.Struct):
    root: str
    staged: str
    name: str
    replace: bool


class Look(msgspec.Struct):
    """A file as it is now. `head` is its first 64 KiB and `tail` its last 512 bytes, in hexadecimal."""

    exists: bool
    size_bytes: int = 0
    used_bytes: int = 0
    head: str = ""
    tail: str = ""
    in_use: bool = False


class _Digest(msgspec.Struct):
    sha256: str


async def look(place: Place, hold: Hold = FREE) -> Look:
    return await ask("look", _OneFile(place.root, place.folder, place.name), Look, hold=hold.reading)


async def put(place: Place, staged: str, hold: Hold, *, replace: bool) -> None:
    """Gives a finished file in `staging` its final name, at once and durably.

    Raises Refused(conflict) when a file is there (unless `replace`) or it is in use.
    """
    await ask("place", _Placing(place.root, staged, place.name, replace), Done, hold=hold)


async def remove(
    place: Place, hold: Hold = FREE, *, wipe: bool = False, timeout_seconds: float = FILE_SECONDS
) -> None:
    """Removes a file, absent or not. Raises Refused(conflict) when a running VM has it open."""
    request = _OneFile(place.root, place.folder, place.name, wipe)
    await ask("remove", request, Done, timeout_seconds=timeout_seconds, hold=hold)


async def abandon(staged: Place, hold: Hold) -> None:
    """What an order that failed has begun goes. Without the lease it may be another host's by now, and is left."""
    with contextlib.suppress(leased.NoLease):
        await remove(staged, hold)


async def digest(place: Place, hold: Hold, *, timeout_seconds: float) -> str:
    """The file's SHA-256 in hexadecimal."""
    request = _OneFile(place.root, place.folder, place.name)
    return (await ask("digest", request, _Digest, timeout_seconds=timeout_seconds, hold=hold.reading)).sha256


async def ask(
    verb: str,
    request: msgspec.Struct,
    answer: type[children.T],
    *,
    timeout_seconds: float = FILE_SECONDS,
    hold: Hold = FREE,
) -> children.T:
    """Asks `host_agent.files`. Raises Refused(timeout) when the storage hangs."""
    try:
        output = await leased.run_holding(
            hold,
            children.python_arguments("host_agent.files", verb),
            timeout_seconds=timeout_seconds,
            stdin=msgspec.json.encode(request),
            environment=children.PYTHON_ENVIRONMENT,
        )
        return children.answered(output, answer)
    except children.ChildTimedOut as failure:
        raise Refused(
            Kind.TIMEOUT, f"the storage doesn't answer: {verb} did not come back within {timeout_seconds:g} s"
        ) from failure
    except ChildFailed as failure:
        raise Refused(Kind.UNAVAILABLE, f"{verb} on the storage failed: {failure.reason}") from failure
