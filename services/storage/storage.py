"""What every handler of storage gets: the runtime's core, the store, the vault, and edits that survive a race."""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TypeVar

from services.storage import chain_model, disk_model, domain_model
from services.storage.chain_model import Chain
from services.storage.config import StorageConfig
from services.storage.lease_store import LeaseStore
from services.storage.store import DISKS, DOMAINS, DiskPrivate, DomainPrivate, HostRow, Store, VmRow
from services.storage.volume_store import VolumeStore
from volery.contracts.base import Entity, Message
from volery.contracts.cluster import GET_DATA_CENTER, GetById
from volery.contracts.domain import VolumeSource
from volery.contracts.errors import unavailable
from volery.contracts.storage import Disk, StorageDomain
from volery.contracts.volume_orders import StorageLocation
from volery.contracts.volumes import Volume
from volery.runtime.core import Core
from volery.runtime.losses import Losses
from volery.runtime.tables import Change, Row, Stale, Table
from volery.runtime.vault import Vault, open_vault

T = TypeVar("T", bound=Entity)
S = TypeVar("S", bound=Message)


@dataclass(slots=True)
class Storage:
    core: Core
    store: Store
    vault: Vault
    config: StorageConfig
    tried: dict[tuple[str, str], float] = field(default_factory=dict)
    """(domain, host) → when connecting last failed, by this process's monotonic clock."""
    asked: dict[str, float] = field(default_factory=dict)
    """Host → when it was last asked for a report."""
    joining: set[tuple[str, str]] = field(default_factory=set)
    """(domain, host) that is being joined or left."""
    joining_failed: dict[tuple[str, str], float] = field(default_factory=dict)
    """(domain, host) → when that last failed."""
    losses: dict[str, Losses] = field(default_factory=dict)
    """Domain → since when which hosts are without it."""
    freeing: dict[tuple[str, str], asyncio.Task[None]] = field(default_factory=dict)
    """(domain, host) whose number is being freed, because that host is dead; they are in `joining`, too."""
    freeing_failed: dict[tuple[str, str], float] = field(default_factory=dict)
    """(domain, host) → when that last failed."""
    at_leases: weakref.WeakValueDictionary[str, asyncio.Lock] = field(
        default_factory=weakref.WeakValueDictionary
    )
    """VM → who makes or removes its leases."""

    @property
    def leases(self) -> LeaseStore:
        return LeaseStore(self.core.pool)

    async def edit(
        self,
        table: Table[T, S],
        object_id: str,
        decide: Callable[[Row[T, S]], tuple[T, S] | None],
        *more: Change,
    ) -> Row[T, S] | None:
        """Read, decide, write, again when somebody else was first. None: there is no such object, or nothing to do."""
        while True:
            row = await table.find(self.core.pool, object_id)
            decided = decide(row) if row is not None else None
            if row is None or decided is None or (decided == (row.public, row.private) and not more):
                return None
            try:
                await self.core.commit(table.update(row, *decided), *more)
            except Stale:
                continue
            return Row(*decided)

    def then_wake(self, change: Change, *keys: str) -> Change:
        """The change, after whose commit the reconcile loop looks at these keys."""

        def wake() -> None:
            for key in keys:
                self.core.wake(key)

        return change.and_then(wake)

    async def domain(self, domain_id: str) -> Row[StorageDomain, DomainPrivate]:
        return await DOMAINS.get(self.core.pool, domain_id)

    async def disk(self, disk_id: str) -> Row[Disk, DiskPrivate]:
        return await DISKS.get(self.core.pool, disk_id)

    async def users(self, *rows: Row[Disk, DiskPrivate]) -> dict[str, VmRow]:
        """The VMs that have these disks, by their ids; read after the disks, so that a change of a disk as it was read
        proves that none has come to run since."""
        vms = await self.store.vms({use.vm_id for row in rows for use in row.public.uses})
        return disk_model.with_begun(vms, rows)

    def location(self, row: Row[StorageDomain, DomainPrivate]) -> StorageLocation:
        backend = domain_model.BACKENDS[row.public.kind]
        return backend.location(row.public, self.vault.open(row.private.chap_password))

    @property
    def volumes(self) -> VolumeStore:
        return VolumeStore(self.core.pool)

    async def chain(self, disk: Disk) -> Chain:
        """The disk's volumes; read after the disk, so that a change of the disk as it was read proves that they are so."""
        return (await self.chains([disk]))[disk.id]

    async def chains(self, disks: Collection[Disk]) -> dict[str, Chain]:
        volumes = await self.volumes.of([disk.id for disk in disks])
        return {disk.id: chain_model.chain_of(disk, volumes.get(disk.id, ())) for disk in disks}

    async def chains_in(self, domain_id: str, disks: Iterable[Disk]) -> dict[str, Chain]:
        """Those of the domain's disks."""
        volumes = await self.volumes.in_domain(domain_id)
        return {disk.id: chain_model.chain_of(disk, volumes.get(disk.id, ())) for disk in disks}

    async def source(self, row: Row[StorageDomain, DomainPrivate], disk: Disk) -> VolumeSource:
        """Where a host finds the disk's leaf and all below it, with the secret that it needs. For orders and QEMU only."""
        return self.source_of(row, disk, (await self.chain(disk)).volumes)

    def source_of(
        self, row: Row[StorageDomain, DomainPrivate], disk: Disk, volumes: Sequence[Volume]
    ) -> VolumeSource:
        """The same of the last of these volumes, which are above each other from the base on."""
        backend = domain_model.BACKENDS[row.public.kind]
        return backend.source(row.public, disk, volumes, self.vault.open(row.private.chap_password))

    async def check_data_center(self, data_center_id: str) -> None:
        """Raises Refused(not_found). Inventory is asked when its fact has not been heard (yet)."""
        if not await self.store.knows_data_center(data_center_id):
            await self.core.bus.ask(GET_DATA_CENTER, GetById(id=data_center_id))

    async def connectable(self, data_center_id: str, host_id: str, what: str) -> list[HostRow]:
        """Hosts that can be asked about a domain's storage. Raises Refused(unavailable) when there is none."""
        found = [
            host
            for host in await self.store.hosts()
            if host.status in domain_model.CAN_CONNECT
            and data_center_id in ("", host.data_center_id)
            and host_id in ("", host.id)
        ]
        if found:
            return found
        if host_id:
            raise unavailable(
                f"{what} needs host {host_id}, which isn't up"
                + (" in that data center" if data_center_id else "")
                + ": activate the host, or name another one",
                host_id=host_id,
            )
        raise unavailable(
            f"{what} needs a host to look at the storage, and none is up"
            + (" in that data center" if data_center_id else "")
            + ": add or activate a host first"
        )


@asynccontextmanager
async def open_storage(core: Core) -> AsyncIterator[Storage]:
    config: StorageConfig = core.config
    yield Storage(core, Store(core.pool), open_vault(config.key_file, "VOLERY_STORAGE_KEY_FILE"), config)
