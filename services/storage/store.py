"""Every table and SQL statement of storage."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import asyncpg
import msgspec

from volery.contracts.agent import LunClaim, OpenLun
from volery.contracts.base import Message, encode
from volery.contracts.host import Host
from volery.contracts.leases import LeaseAbility, LockspaceReport
from volery.contracts.storage import (
    DISK_CHANGED,
    DISK_DELETED,
    STORAGE_DOMAIN_CHANGED,
    STORAGE_DOMAIN_DELETED,
    TRANSFER_CHANGED,
    TRANSFER_DELETED,
    Disk,
    DiskStatus,
    StorageDomain,
    Transfer,
)
from volery.contracts.vm import Vm
from volery.runtime.tables import Change, Row, Table, text_columns


class DomainPrivate(Message):
    chap_password: str = ""
    """Sealed."""
    maintenance: bool = False
    """What a person wants; otherwise an attached domain is to be active."""
    stained: dict[str, str] = {}
    """LUN → what was found on it that no disk explains."""
    lockspace: bool = False
    """It has one: it is never made again."""


class DiskPrivate(Message):
    writer_host_id: str = ""
    """The one host that may have an order at work that writes the volume; "" before the first."""
    begun: dict[str, int] = {}
    """VM → the newest epoch under which it was told where the volume is. It may run, whatever the facts that were heard say
    of earlier ones."""
    readers: tuple[str, ...] = ()
    """Operations that copy it and downloads that read it: nobody may write it meanwhile."""
    transfer_id: str = ""
    """The upload it waits for."""
    before: DiskStatus = DiskStatus.OK
    """Its status before that upload."""
    claimed: bool = False
    """Its LUN was proven blank, or made so: what is on it now is this disk's. Without it the LUN is never written."""
    removal: str = ""
    """The order by which a failed operation's volume is removed."""
    doomed: bool = False
    """Its operation failed and its volume is to be removed, as soon as its host can."""


class TransferPrivate(Message):
    ticket: str = ""
    """Sealed."""
    data_address: str = ""


DOMAINS: Table[StorageDomain, DomainPrivate] = Table(
    "storage_domain",
    StorageDomain,
    DomainPrivate,
    columns={
        "name": "name",
        "kind": "kind",
        "data_center_id": "data_center_id",
        "status": "status",
        "host_id": "host_id",
        "iqn": "iqn",
    },
    changed=STORAGE_DOMAIN_CHANGED,
    deleted=STORAGE_DOMAIN_DELETED,
    noun="storage domain",
)
DISKS: Table[Disk, DiskPrivate] = Table(
    "disk",
    Disk,
    DiskPrivate,
    columns={
        "name": "name",
        "storage_domain_id": "storage_domain_id",
        "data_center_id": "data_center_id",
        "status": "status",
        "content": "content",
        "format": "format",
        "lun": "lun",
        "size_bytes": "size_bytes",
        "busy_with": "busy_with",
        "uses": "uses",
    },
    changed=DISK_CHANGED,
    deleted=DISK_DELETED,
)
TRANSFERS: Table[Transfer, TransferPrivate] = Table(
    "transfer",
    Transfer,
    TransferPrivate,
    columns={
        "disk_id": "disk_id",
        "direction": "direction",
        "state": "state",
        "host_id": "host_id",
        "expires_at": "expires_at",
    },
    changed=TRANSFER_CHANGED,
    deleted=TRANSFER_DELETED,
)
USED_BY = "uses <> '[]' and position($1 in uses) > 0"
"""Disks that a VM has; the argument is its id."""
DOMAIN_NAME = "storage_domain_name"
DOMAIN_IQN = "storage_domain_iqn"
DISK_ID = "disk_pkey"
DISK_LUN = "disk_lun"

Pool: TypeAlias = "asyncpg.Pool[asyncpg.Record]"
_HOST = "id, name, data_center_id, cluster_id, status, data_address, boot_id, leases"


@dataclass(frozen=True, slots=True)
class HostRow:
    """A host as inventory last announced it."""

    id: str
    name: str
    data_center_id: str
    status: str
    data_address: str
    boot_id: str = ""
    leases: LeaseAbility = field(default_factory=LeaseAbility)
    """As this boot reported it."""
    cluster_id: str = ""
    """Hosts with the same one can stand in for each other; "" until inventory has said it."""


@dataclass(frozen=True, slots=True)
class Member:
    """A host's number in a domain's lockspace: its own for good, unless it was given back and the host is gone."""

    domain_id: str
    host_id: str
    number: int
    asked: bool
    """A join was ordered, and no leave has been confirmed since: it may hold the number."""
    boot_id: str
    """Which reported that it has joined, as below; "" when it has not."""
    generation: int
    io_timeout_seconds: int
    reset_host: bool
    freer_host_id: str = ""
    """Which was ordered to write its lease free, and may be about to; it is not joined again meanwhile."""

    @property
    def joined(self) -> LockspaceReport:
        return LockspaceReport(
            domain_id=self.domain_id,
            host_number=self.number,
            generation=self.generation,
            io_timeout_seconds=self.io_timeout_seconds,
            reset_host=self.reset_host,
        )


@dataclass(frozen=True, slots=True)
class VmRow:
    id: str
    name: str
    host_id: str
    status: str
    epoch: int = 0


@dataclass(frozen=True, slots=True)
class HostLuns:
    """What a host said it has open, and which LUNs it made a disk's."""

    host_id: str
    luns: tuple[OpenLun, ...]
    claims: tuple[LunClaim, ...] = ()
    known: bool = True
    """Inventory has the host."""
    fresh: bool = True
    """It said so within the last ten minutes."""


@dataclass(frozen=True, slots=True)
class Leftover:
    """The directory of a deleted domain, until a host has removed its marker."""

    domain_id: str
    host_id: str
    data_center_id: str
    path: str


def _host(record: asyncpg.Record) -> HostRow:
    fields = dict(record)
    return HostRow(**(fields | {"leases": msgspec.json.decode(fields["leases"], type=LeaseAbility)}))


@dataclass(frozen=True, slots=True)
class Store:
    """What Table does not say by itself."""

    pool: Pool

    # Inventory's nouns

    def know_host(self, host: Host) -> Change:
        return Change(
            """insert into host (id, name, data_center_id, status, data_address, boot_id, leases, cluster_id)
               values ({0}, {1}, {2}, {3}, {4}, {5}, {6}, {7})
               on conflict (id) do update set name = excluded.name, data_center_id = excluded.data_center_id,
                   status = excluded.status, data_address = excluded.data_address, boot_id = excluded.boot_id,
                   leases = excluded.leases, cluster_id = excluded.cluster_id""",
            (
                host.id,
                host.name,
                host.data_center_id,
                str(host.status),
                host.capabilities.data_address,
                host.boot_id,
                encode(host.capabilities.leases).decode(),
                host.cluster_id,
            ),
            guarded=False,
        )

    def know_vms(self, vms: Sequence[Vm]) -> Change:
        """Each of them once."""
        return Change(
            """insert into vm (id, name, host_id, status, epoch)
               select v.id, v.name, v.host_id, v.status, v.epoch::bigint
               from unnest({0}::text[], {1}::text[], {2}::text[], {3}::text[], {4}::text[])
                   as v(id, name, host_id, status, epoch)
               on conflict (id) do update set name = excluded.name, host_id = excluded.host_id,
                   status = excluded.status, epoch = excluded.epoch""",
            (
                [vm.id for vm in vms],
                [vm.name for vm in vms],
                [vm.host_id for vm in vms],
                [str(vm.status) for vm in vms],
                [str(vm.epoch) for vm in vms],
            ),
            guarded=False,
        )

    def catch_up(self, vm: Vm) -> Change:
        """A VM as inventory answered; facts of the same epoch, or a later one, know better."""
        return Change(
            """update vm set name = {1}, host_id = {2}, status = {3}, epoch = {4}::bigint
               where id = {0} and epoch < {4}::bigint""",
            (vm.id, vm.name, vm.host_id, str(vm.status), vm.epoch),
            guarded=False,
        )

    def know_data_center(self, data_center_id: str, name: str) -> Change:
        return Change(
            """insert into data_center (id, name) values ({0}, {1})
               on conflict (id) do update set name = excluded.name""",
            (data_center_id, name),
            guarded=False,
        )

    def forget(self, table: str, object_id: str) -> Change:
        """`table` is one of data_center, host, vm."""
        return Change(f"delete from {table} where id = {{0}}", (object_id,), guarded=False)

    def forget_all_but(self, table: str, ids: Iterable[str]) -> Change:
        return Change(f"delete from {table} where not id = any({{0}}::text[])", (list(ids),), guarded=False)

    async def hosts(self) -> list[HostRow]:
        return [_host(row) for row in await self.pool.fetch(f"select {_HOST} from host order by id")]

    async def host(self, host_id: str) -> HostRow | None:
        row = await self.pool.fetchrow(f"select {_HOST} from host where id = $1", host_id)
        return None if row is None else _host(row)

    async def hosts_with(self, host_ids: Sequence[str]) -> dict[str, HostRow]:
        rows = await self.pool.fetch(f"select {_HOST} from host where id = any($1::text[])", list(host_ids))
        return {row["id"]: _host(row) for row in rows}

    async def vms(self, vm_ids: Iterable[str]) -> dict[str, VmRow]:
        rows = await self.pool.fetch(
            "select id, name, host_id, status, epoch from vm where id = any($1::text[])", list(vm_ids)
        )
        return {row["id"]: VmRow(**dict(row)) for row in rows}

    async def knows_data_center(self, data_center_id: str) -> bool:
        return bool(await self.pool.fetchval("select 1 from data_center where id = $1", data_center_id))

    # Storage domains

    def while_active(self, domain_id: str) -> Change:
        """A guard: the domain is active, and stays so until this is committed. Whoever maintains, detaches or
        deletes it afterwards finds what was written."""
        return Change(
            "select 1 from storage_domain where id = {0} and status = 'active' for share", (domain_id,)
        )

    async def domains_of(self, host: HostRow) -> list[Row[StorageDomain, DomainPrivate]]:
        """Domains that this host has, or should have."""
        return await DOMAINS.where(
            self.pool,
            "(data_center_id <> '' and data_center_id = $1) or host_id = $2 or position($2 in doc) > 0",
            host.data_center_id,
            host.id,
        )

    async def domains_by_host(
        self, hosts: Collection[HostRow]
    ) -> dict[str, list[Row[StorageDomain, DomainPrivate]]]:
        """The same of many hosts; one that has none isn't named."""
        pairs = await self.pool.fetch(
            """select h.id as host_id, d.id as domain_id
               from unnest($1::text[], $2::text[]) as h(id, data_center_id)
               join storage_domain d on (d.data_center_id <> '' and d.data_center_id = h.data_center_id)
                    or d.host_id = h.id or position(h.id in d.doc) > 0 order by h.id, d.id""",
            [host.id for host in hosts],
            [host.data_center_id for host in hosts],
        )
        domains = await self.domains_with({pair["domain_id"] for pair in pairs}) if pairs else {}
        found: dict[str, list[Row[StorageDomain, DomainPrivate]]] = {}
        for pair in pairs:
            if (row := domains.get(pair["domain_id"])) is not None:
                found.setdefault(pair["host_id"], []).append(row)
        return found

    async def domains_with(self, ids: Iterable[str]) -> dict[str, Row[StorageDomain, DomainPrivate]]:
        rows = await DOMAINS.where(self.pool, "id = any($1::text[])", list(ids))
        return {row.id: row for row in rows}

    async def incomplete_domains(self) -> list[Row[StorageDomain, DomainPrivate]]:
        """Attached ones that some host doesn't reach, or has lost. What a person wrote has its quotes escaped."""
        return await DOMAINS.where(
            self.pool,
            """data_center_id <> '' and (position('"unreachable":{"' in doc) > 0 or position('"lost":{"' in doc) > 0)""",
        )

    async def attached_domain_ids(self) -> list[str]:
        rows = await self.pool.fetch("select id from storage_domain where data_center_id <> '' order by id")
        return [row["id"] for row in rows]

    def leave_behind(self, domain: StorageDomain, host_id: str) -> Change:
        return Change(
            """insert into leftover (domain_id, host_id, data_center_id, path) values ({0}, {1}, {2}, {3})
               on conflict (domain_id) do nothing""",
            (domain.id, host_id, domain.data_center_id, domain.path),
            guarded=False,
        )

    async def leftovers(self) -> list[Leftover]:
        rows = await self.pool.fetch("select domain_id, host_id, data_center_id, path from leftover")
        return [Leftover(**dict(row)) for row in rows]

    def cleaned(self, domain_id: str) -> Change:
        return Change("delete from leftover where domain_id = {0}", (domain_id,), guarded=False)

    # Open LUNs

    def keep_luns(self, hosts: Sequence[HostLuns]) -> Change:
        return Change(
            """insert into host_lun (host_id, luns, claims)
               select n.host_id, n.luns, n.claims
               from unnest({0}::text[], {1}::text[], {2}::text[]) as n(host_id, luns, claims)
               on conflict (host_id) do update
               set luns = excluded.luns, claims = excluded.claims, seen_at = now()
               where host_lun.luns <> excluded.luns or host_lun.claims <> excluded.claims
               or host_lun.seen_at < now() - interval '1 minute'""",
            text_columns((h.host_id, encode(h.luns).decode(), encode(h.claims).decode()) for h in hosts),
            guarded=False,
        )

    async def host_luns(self, about: str) -> list[HostLuns]:
        """Of the hosts that said something about this target, or disk."""
        rows = await self.pool.fetch(
            """select l.host_id, l.luns, l.claims, h.id is not null as known,
                      l.seen_at > now() - interval '10 minutes' as fresh
               from host_lun l left join host h on h.id = l.host_id
               where position($1 in l.luns) > 0 or position($1 in l.claims) > 0 order by l.host_id""",
            about,
        )
        return [
            HostLuns(
                row["host_id"],
                msgspec.json.decode(row["luns"], type=tuple[OpenLun, ...]),
                msgspec.json.decode(row["claims"], type=tuple[LunClaim, ...]),
                row["known"],
                row["fresh"],
            )
            for row in rows
        ]

    async def luns_of(self, host_ids: Sequence[str]) -> dict[str, HostLuns]:
        """What these hosts said last, if they said something."""
        rows = await self.pool.fetch(
            "select host_id, luns, claims from host_lun where host_id = any($1::text[])", list(host_ids)
        )
        return {
            row["host_id"]: HostLuns(
                row["host_id"],
                msgspec.json.decode(row["luns"], type=tuple[OpenLun, ...]),
                msgspec.json.decode(row["claims"], type=tuple[LunClaim, ...]),
            )
            for row in rows
        }

    async def claims_of(self, iqn: str) -> dict[int, int]:
        rows = await self.pool.fetch("select lun, claim from lun_claim where iqn = $1", iqn)
        return {row["lun"]: row["claim"] for row in rows}

    async def next_claim(self, iqn: str, lun: int, above: int) -> int:
        """A number for a claim, higher than every former one and than `above`."""
        sql = """insert into lun_claim (iqn, lun, claim) values ($1, $2, $3 + 1)
                 on conflict (iqn, lun) do update set claim = greatest(lun_claim.claim + 1, excluded.claim)
                 returning claim"""
        return int(await self.pool.fetchval(sql, iqn, lun, above))

    def forget_luns(self, host_id: str) -> Change:
        """Of a host that was deleted."""
        return Change("delete from host_lun where host_id = {0}", (host_id,), guarded=False)

    async def domains_on(self, iqns: Iterable[str]) -> list[str]:
        rows = await self.pool.fetch(
            "select id from storage_domain where kind = 'iscsi' and iqn = any($1::text[])", list(iqns)
        )
        return [row["id"] for row in rows]

    # Disks

    async def disks_of(self, domain_id: str) -> list[Row[Disk, DiskPrivate]]:
        return await DISKS.where(self.pool, "storage_domain_id = $1", domain_id)

    async def disks_with(self, ids: Iterable[str]) -> dict[str, Row[Disk, DiskPrivate]]:
        rows = await DISKS.where(self.pool, "id = any($1::text[])", list(ids))
        return {row.id: row for row in rows}

    async def disks_used_by(self, vm_id: str) -> list[Row[Disk, DiskPrivate]]:
        return await DISKS.where(self.pool, USED_BY, vm_id)

    async def begun_disks(self) -> list[Row[Disk, DiskPrivate]]:
        """Those with which a VM was to run, at some time."""
        return await DISKS.where(self.pool, """position('"begun":{"' in private) > 0""")

    async def used_disks(self, domain_id: str) -> list[Row[Disk, DiskPrivate]]:
        return await DISKS.where(self.pool, "storage_domain_id = $1 and uses <> '[]'", domain_id)

    async def unknown_users(self) -> list[str]:
        """VMs that have a disk and that inventory's facts don't know. One that is being made is not asked about."""
        rows = await self.pool.fetch(
            """select distinct u ->> 'vm_id' as vm_id from disk, json_array_elements(uses::json) u
               where uses <> '[]' and busy_with = ''
               and (doc::json ->> 'updated_at')::timestamptz < now() - interval '10 minutes'
               and not exists (select 1 from vm where vm.id = u ->> 'vm_id')"""
        )
        return [row["vm_id"] for row in rows]

    async def unsettled_disks(self) -> list[str]:
        rows = await self.pool.fetch(
            "select id from disk where status <> 'ok' or busy_with <> '' order by id limit 1000"
        )
        return [row["id"] for row in rows]

    async def disks_in(self, domain_id: str) -> int:
        sql = "select count(*) from disk where storage_domain_id = $1"
        return int(await self.pool.fetchval(sql, domain_id))

    # Transfers

    async def expired_transfers(self) -> list[Row[Transfer, TransferPrivate]]:
        return await TRANSFERS.where(
            self.pool, "state in ('opening', 'ready') and expires_at < now() and expires_at is not null"
        )

    async def old_transfers(self, days: int = 7) -> list[Row[Transfer, TransferPrivate]]:
        """Ended ones that nobody needs any more."""
        return await TRANSFERS.where(
            self.pool,
            """state in ('succeeded', 'failed', 'cancelled')
               and expires_at < now() - make_interval(days => $1)""",
            days,
        )
