"""Storage as hosts see it, in memory: directories and targets with volumes, and agents whose orders change them."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import Any

from msgspec.structs import replace

from tests.support.scripted_agent import ScriptedAgent
from volery.contracts.agent import LunClaim, OpenChain, OpenLun, StorageDomainReport, VolumeReport
from volery.contracts.base import Done
from volery.contracts.domain import (
    ChainSource,
    DomainLease,
    FileSource,
    ImageFormat,
    IscsiSource,
    VolumeSource,
)
from volery.contracts.errors import Kind, Refused
from volery.contracts.ids import new_id
from volery.contracts.leases import (
    CREATE_LEASE,
    DELETE_LEASE,
    FREE_HOST_LEASE,
    JOIN_LOCKSPACE,
    LEASE_TAKEN,
    LEAVE_LOCKSPACE,
    READ_HOST_LEASE,
    CreateLease,
    DeleteLease,
    FreeHostLease,
    HostLeaseReading,
    HostLeaseReadings,
    JoinLockspace,
    LeaveLockspace,
    LockspaceReport,
    ReadHostLease,
)
from volery.contracts.volume_orders import (
    CLAIM_LUN,
    CONNECT_STORAGE,
    COPY_VOLUME,
    CREATE_VOLUME,
    DELETE_VOLUME,
    DISCONNECT_STORAGE,
    DISCOVER_ISCSI,
    FINISH_TRANSFER,
    IMPORT_VOLUME,
    MAKE_OVERLAY,
    MERGE_VOLUME,
    OPEN_TRANSFER,
    RESIZE_VOLUME,
    ClaimLun,
    ConnectStorage,
    CopyVolume,
    CreateVolume,
    DeleteVolume,
    DirectoryLocation,
    DisconnectStorage,
    DiscoveredLun,
    DiscoveredTarget,
    DiscoverIscsi,
    FinishTransfer,
    ImportVolume,
    IscsiTargets,
    MakeOverlay,
    MergeVolume,
    OpenTransfer,
    ResizeVolume,
    TransferOpened,
    VolumeInfo,
)

GIB = 1024**3
MIB = 1024**2


@dataclass
class Shelf:
    """What all hosts share: directories by path, targets by name."""

    capacity_bytes: int = 100 * GIB
    available_bytes: int = 80 * GIB
    markers: set[tuple[str, str]] = field(default_factory=set)
    """(path, domain id)"""
    volumes: dict[str, VolumeReport] = field(default_factory=dict)
    """Path → volume."""
    luns: dict[str, dict[int, int]] = field(default_factory=dict)
    """Target → LUN → size."""
    contents: dict[tuple[str, int], str] = field(default_factory=dict)
    """(target, LUN) → whose bytes are on it; absent is blank."""
    passwords: dict[str, str] = field(default_factory=dict)
    strangers: tuple[str, ...] = ()
    lockspaces: dict[str, dict[int, HostLeaseReading]] = field(default_factory=dict)
    """Domain → number → its host's lease."""
    leases: dict[str, str] = field(default_factory=dict)
    """Path → which host holds it; "" is free."""
    writers: dict[str, set[str]] = field(default_factory=dict)
    """Disk → hosts that are writing it now: never more than one."""
    crowded: list[str] = field(default_factory=list)
    """Disks that two hosts wrote at once."""


@dataclass
class StorageHost:
    """One host's side. `refusing` maps an order's kind to what it is refused with; `held` to an event it waits for."""

    shelf: Shelf
    agent: ScriptedAgent
    unreachable: set[str] = field(default_factory=set)
    refusing: dict[str, Refused] = field(default_factory=dict)
    held: dict[str, asyncio.Event] = field(default_factory=dict)
    connected: dict[str, Any] = field(default_factory=dict)
    opened: dict[str, OpenTransfer] = field(default_factory=dict)
    open_luns: list[OpenLun] = field(default_factory=list)
    open_chains: list[OpenChain] = field(default_factory=list)
    claims: dict[int, LunClaim] = field(default_factory=dict)
    joined: dict[str, LockspaceReport] = field(default_factory=dict)

    def __post_init__(self) -> None:
        acts: tuple[tuple[Any, Any], ...] = (
            (CONNECT_STORAGE, self.connect),
            (DISCONNECT_STORAGE, self.disconnect),
            (DISCOVER_ISCSI, self.discover),
            (CLAIM_LUN, self.claim),
            (CREATE_VOLUME, self.create),
            (RESIZE_VOLUME, self.resize),
            (MAKE_OVERLAY, self.overlay),
            (MERGE_VOLUME, self.merge),
            (DELETE_VOLUME, self.delete),
            (COPY_VOLUME, self.copy),
            (IMPORT_VOLUME, self.import_),
            (OPEN_TRANSFER, self.open),
            (FINISH_TRANSFER, self.finish),
            (JOIN_LOCKSPACE, self.join),
            (LEAVE_LOCKSPACE, self.leave),
            (CREATE_LEASE, self.create_lease),
            (DELETE_LEASE, self.delete_lease),
            (READ_HOST_LEASE, self.read_host),
            (FREE_HOST_LEASE, self.free_host),
        )
        for order, act in acts:
            self.agent.does(order, self._guarded(order.kind, act))
        self.agent.reports["storage"] = lambda: {
            "domains": tuple(self.look(domain_id) for domain_id in self.connected),
            "open_luns": tuple(self.open_luns),
            "lun_claims": tuple(self.claims.values()),
        }

    def _guarded(self, kind: str, act: Any) -> Any:
        async def run(question: Any) -> Any:
            disk_id = getattr(question, "disk_id", "")
            writing = self.shelf.writers.setdefault(disk_id, set()) if disk_id else set()
            writing.add(self.agent.host_id)
            if len(writing) > 1:
                self.shelf.crowded.append(disk_id)
            try:
                if kind in self.held:
                    await self.held[kind].wait()
                if kind in self.refusing:
                    raise self.refusing[kind]
                self._hold(getattr(question, "lease", None))
                return act(question)
            finally:
                writing.discard(self.agent.host_id)

        return run

    def _hold(self, lease: DomainLease | None) -> None:
        if lease is None:
            return
        if lease.lockspace not in self.joined:
            raise Refused(Kind.UNAVAILABLE, "this host has not joined the lockspace")
        self.shelf.leases.setdefault(lease.path, "")

    def connect(self, ask: ConnectStorage) -> StorageDomainReport:
        where = ask.location
        if isinstance(where, DirectoryLocation):
            if where.path in self.unreachable:
                raise Refused(Kind.NOT_FOUND, f"{where.path} isn't a directory on this host")
            if ask.initialise:
                self.shelf.markers.add((where.path, ask.domain_id))
            if (where.path, ask.domain_id) not in self.shelf.markers:
                raise Refused(Kind.NOT_FOUND, f"{where.path} has no storage domain {ask.domain_id}")
        else:
            if where.portal in self.unreachable:
                raise Refused(Kind.UNAVAILABLE, f"iSCSI portal {where.portal} doesn't answer")
            if self.shelf.passwords.get(where.iqn, "") != where.chap_password:
                raise Refused(
                    Kind.FORBIDDEN, f"target {where.iqn} refused the login: check the CHAP password"
                )
        self.connected[ask.domain_id] = where
        return self.look(ask.domain_id)

    def look(self, domain_id: str) -> StorageDomainReport:
        where = self.connected[domain_id]
        if isinstance(where, DirectoryLocation):
            top = f"{where.path}/{domain_id}/"
            volumes = tuple(v for p, v in self.shelf.volumes.items() if p.startswith(top))
            return StorageDomainReport(
                domain_id=domain_id,
                reachable=where.path not in self.unreachable,
                problem="it hangs" if where.path in self.unreachable else "",
                capacity_bytes=self.shelf.capacity_bytes,
                available_bytes=self.shelf.available_bytes,
                volumes=volumes,
                strangers=self.shelf.strangers,
                lockspace=self.joined.get(domain_id),
                open_chains=tuple(self.open_chains),
            )
        luns = self.shelf.luns.get(where.iqn, {})
        return StorageDomainReport(
            domain_id=domain_id,
            reachable=True,
            capacity_bytes=sum(luns.values()),
            volumes=tuple(
                VolumeReport(path=str(n), size_bytes=s, used_bytes=s, format=ImageFormat.RAW)
                for n, s in luns.items()
            ),
        )

    def disconnect(self, ask: DisconnectStorage) -> Done:
        where = self.connected.pop(ask.domain_id, None)
        if ask.remove and where is not None:
            self.shelf.markers.discard((where.path, ask.domain_id))
        return Done()

    def discover(self, ask: DiscoverIscsi) -> IscsiTargets:
        return IscsiTargets(
            targets=tuple(
                DiscoveredTarget(
                    iqn=iqn,
                    portal=ask.portal,
                    luns=tuple(DiscoveredLun(lun=n, size_bytes=s) for n, s in luns.items()),
                )
                for iqn, luns in self.shelf.luns.items()
            )
        )

    def _put(self, source: VolumeSource, size_bytes: int, used_bytes: int = MIB) -> VolumeInfo:
        if isinstance(source, FileSource):
            below = source.backing[0].path.rpartition("/")[2] if isinstance(source, ChainSource) else ""
            self.shelf.volumes[source.path] = VolumeReport(
                path=source.path,
                size_bytes=size_bytes,
                used_bytes=used_bytes,
                format=source.format,
                backing=below,
            )
            return VolumeInfo(size_bytes=size_bytes, used_bytes=used_bytes, format=source.format)
        assert isinstance(source, IscsiSource)
        return self._lun(source)

    def _lun(self, source: IscsiSource) -> VolumeInfo:
        size = self.shelf.luns[source.iqn][source.lun]
        return VolumeInfo(size_bytes=size, used_bytes=size, format=ImageFormat.RAW)

    def claim(self, ask: ClaimLun) -> VolumeInfo:
        place = (ask.source.iqn, ask.source.lun)
        if ask.overwrite:
            self.shelf.contents.pop(place, None)
        if place in self.shelf.contents:
            raise Refused(Kind.CONFLICT, f"LUN {ask.source.lun} isn't blank", rule="lun_content", offset=0)
        self.claims[ask.source.lun] = LunClaim(
            iqn=ask.source.iqn, lun=ask.source.lun, claim=ask.claim, disk_id=ask.disk_id
        )
        return self._lun(ask.source)

    def create(self, ask: CreateVolume) -> VolumeInfo:
        return self._put(ask.source, ask.size_bytes)

    def resize(self, ask: ResizeVolume) -> VolumeInfo:
        return self._put(ask.source, ask.size_bytes)

    def overlay(self, ask: MakeOverlay) -> VolumeInfo:
        for file in ask.source.backing:
            if file.path not in self.shelf.volumes:
                raise Refused(Kind.NOT_FOUND, f"there is no volume {file.path}")
        return self._put(ask.source, ask.size_bytes, 0)

    def merge(self, ask: MergeVolume) -> VolumeInfo:
        """As the real one: the file below has the other's size, and the one above names it."""
        below = ask.source.backing[0]
        volume, under = self.shelf.volumes[ask.source.path], self.shelf.volumes[below.path]
        self.shelf.volumes[below.path] = replace(under, size_bytes=volume.size_bytes)
        if ask.above is not None:
            over = self.shelf.volumes[ask.above.path]
            self.shelf.volumes[ask.above.path] = replace(over, backing=below.path.rpartition("/")[2])
        return VolumeInfo(size_bytes=volume.size_bytes, used_bytes=under.used_bytes, format=under.format)

    def copy(self, ask: CopyVolume) -> VolumeInfo:
        if isinstance(ask.source, FileSource) and ask.source.path not in self.shelf.volumes:
            raise Refused(Kind.NOT_FOUND, f"there is no volume {ask.source.path}")
        if isinstance(ask.target, IscsiSource):
            self.shelf.contents[ask.target.iqn, ask.target.lun] = ask.disk_id
        return self._put(ask.target, ask.size_bytes, 2 * MIB)

    def import_(self, ask: ImportVolume) -> VolumeInfo:
        return replace_info(self._put(ask.target, 2 * GIB, 3 * MIB), "ab" * 32)

    def delete(self, ask: DeleteVolume) -> Done:
        if isinstance(ask.source, FileSource):
            self.shelf.volumes.pop(ask.source.path, None)
        else:
            self.shelf.contents.pop((ask.source.iqn, ask.source.lun), None)
        return Done()

    def open(self, ask: OpenTransfer) -> TransferOpened:
        self.opened[ask.transfer_id] = ask
        return TransferOpened(data_address="127.0.0.1:1", size_bytes=ask.size_bytes or GIB)

    def finish(self, ask: FinishTransfer) -> VolumeInfo:
        self.opened.pop(ask.transfer_id, None)
        if ask.cancel:
            return VolumeInfo(size_bytes=0, used_bytes=0, format=ImageFormat.RAW)
        return replace_info(self._put(ask.target, ask.max_bytes, 5 * MIB), ask.sha256 or "cd" * 32)

    # Leases

    async def boot(self) -> None:
        """It comes up under a new boot, in no lockspace."""
        await self.agent.kill()
        self.joined.clear()
        self.agent.boot_id = new_id()
        await self.agent.start()

    def join(self, ask: JoinLockspace) -> LockspaceReport:
        if ask.initialise:
            self.shelf.lockspaces.setdefault(ask.domain_id, {})
        if ask.domain_id not in self.shelf.lockspaces:
            raise Refused(Kind.NOT_FOUND, f"storage domain {ask.domain_id} has no lockspace at {ask.path}")
        leases = self.shelf.lockspaces[ask.domain_id]
        before = leases.get(ask.host_number)
        if before is not None and before.holder != self.agent.host_id:
            raise Refused(Kind.CONFLICT, "another machine uses this host's number in the lockspace")
        now = self.joined.get(ask.domain_id)
        if now is not None and now.host_number != ask.host_number:
            raise Refused(Kind.CONFLICT, f"this host is number {now.host_number} in the lockspace")
        generation = now.generation if now else before.generation + 1 if before else 1
        self.joined[ask.domain_id] = LockspaceReport(
            domain_id=ask.domain_id,
            host_number=ask.host_number,
            generation=generation,
            io_timeout_seconds=ask.io_timeout_seconds,
            reset_host=ask.reset_host,
        )
        leases[ask.host_number] = HostLeaseReading(
            asked_seconds=0.0,
            answered_seconds=0.0,
            holder=self.agent.host_id,
            generation=generation,
            timestamp=100,
            io_timeout_seconds=ask.io_timeout_seconds,
        )
        return self.joined[ask.domain_id]

    def leave(self, ask: LeaveLockspace) -> Done:
        if self.agent.host_id in self.shelf.leases.values():
            raise Refused(Kind.CONFLICT, "this host holds 1 leases of the storage domain")
        now = self.joined.pop(ask.domain_id, None)
        if now is not None:
            leases = self.shelf.lockspaces[ask.domain_id]
            leases[now.host_number] = replace(leases[now.host_number], timestamp=0)
        return Done()

    def create_lease(self, ask: CreateLease) -> Done:
        self.shelf.leases.setdefault(ask.path, "")
        return Done()

    def delete_lease(self, ask: DeleteLease) -> Done:
        if self.shelf.leases.get(ask.path):
            raise Refused(Kind.CONFLICT, "it is held")
        self.shelf.leases.pop(ask.path, None)
        return Done()

    def read_host(self, ask: ReadHostLease) -> HostLeaseReadings:
        found = self.shelf.lockspaces[ask.domain_id][ask.host_number]
        now = replace(found, asked_seconds=time.monotonic(), answered_seconds=time.monotonic())
        return HostLeaseReadings(reader_boot_id=self.agent.boot_id, first=now, second=now)

    def free_host(self, ask: FreeHostLease) -> Done:
        leases = self.shelf.lockspaces[ask.domain_id]
        if leases[ask.host_number].generation != ask.generation:
            raise Refused(Kind.CONFLICT, "it is another boot's", rule=LEASE_TAKEN)
        leases[ask.host_number] = replace(leases[ask.host_number], timestamp=0)
        return Done()


def replace_info(info: VolumeInfo, sha256: str) -> VolumeInfo:
    return VolumeInfo(
        size_bytes=info.size_bytes, used_bytes=info.used_bytes, format=info.format, sha256=sha256
    )
