"""Every table and SQL statement of network."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import asyncpg
import msgspec

from volery.contracts.base import Message, encode
from volery.contracts.cluster import Cluster
from volery.contracts.host import Host
from volery.contracts.network import (
    ATTACHMENT_CHANGED,
    ATTACHMENT_DELETED,
    MAC_POOL_CHANGED,
    MAC_POOL_DELETED,
    NETWORK_CHANGED,
    NETWORK_DELETED,
    Attachment,
    MacPool,
    Network,
)
from volery.contracts.network_orders import HostNetwork
from volery.runtime.tables import Change, Nothing, Row, Table


class PoolPrivate(Message):
    default: bool = False
    """The pool of networks that name none; can't be deleted."""


class HostState(Message):
    """How far a host is with its networks. Written by the leader alone."""

    tried: str = ""
    """Digest of the set of the last attempt."""
    applied: tuple[HostNetwork, ...] = ()
    """What the host confirmed last."""
    ready: tuple[str, ...] = ()
    """Networks that are there and as they should be."""
    problems: dict[str, str] = {}
    """Network → why it isn't there, or what is wrong with it."""
    failed: bool = False
    """The last attempt did not do all that was wanted: what was there before still is, and it is tried again."""
    severed: dict[str, str] = {}
    """Network → why no frame of it gets out of the host."""
    dirty: bool = False
    """The host said since that it isn't so any more."""


NETWORKS: Table[Network, Nothing] = Table(
    "network",
    Network,
    Nothing,
    columns={
        "name": "name",
        "data_center_id": "data_center_id",
        "kind": "kind",
        "vlan": "vlan",
        "vni": "vni",
        "subnet": "subnet",
        "bridge": "bridge",
        "mac_pool_id": "mac_pool_id",
    },
    changed=NETWORK_CHANGED,
    deleted=NETWORK_DELETED,
)
MAC_POOLS: Table[MacPool, PoolPrivate] = Table(
    "mac_pool",
    MacPool,
    PoolPrivate,
    columns={"name": "name"},
    changed=MAC_POOL_CHANGED,
    deleted=MAC_POOL_DELETED,
    noun="MAC pool",
)
ATTACHMENTS: Table[Attachment, Nothing] = Table(
    "attachment",
    Attachment,
    Nothing,
    columns={"host_id": "host_id", "network_id": "network_id", "nic": "nic"},
    changed=ATTACHMENT_CHANGED,
    deleted=ATTACHMENT_DELETED,
    noun="network attachment",
)
NETWORK_NAME = "network_name"
NETWORK_BRIDGE = "network_bridge"
NETWORK_VNI = "network_vni"
NETWORK_SUBNET = "network_subnet"
NETWORK_POOL = "network_mac_pool"
POOL_NAME = "mac_pool_name"
NIC_ID = "nic_pkey"
NIC_ADDRESS = "nic_address"
NIC_NETWORK = "nic_network"
NIC_POOL = "nic_pool"
ATTACHMENT_ONCE = "attachment_once"

Pool: TypeAlias = "asyncpg.Pool[asyncpg.Record]"


@dataclass(frozen=True, slots=True)
class HostRow:
    """A host as inventory last announced it."""

    id: str
    name: str
    data_center_id: str
    cluster_id: str
    status: str
    address: str
    nics: tuple[str, ...]
    boot_id: str


@dataclass(frozen=True, slots=True)
class NicRow:
    """An address that a VM's NIC has."""

    id: str
    vm_id: str
    network_id: str
    mac_pool_id: str
    address: int
    shared: bool = False


_HOST = "select id, name, data_center_id, cluster_id, status, address, nics, boot_id from host"
_NIC = "select id, vm_id, coalesce(network_id, '') as network_id, mac_pool_id, address, shared from nic"


def _host(record: asyncpg.Record) -> HostRow:
    fields = dict(record)
    fields["nics"] = msgspec.json.decode(fields["nics"], type=tuple[str, ...])
    return HostRow(**fields)


@dataclass(frozen=True, slots=True)
class Store:
    """What Table does not say by itself."""

    pool: Pool

    # Inventory's nouns

    def know_host(self, host: Host) -> Change:
        return Change(
            """insert into host (id, name, data_center_id, cluster_id, status, address, nics, boot_id)
               values ({0}, {1}, {2}, {3}, {4}, {5}, {6}, {7})
               on conflict (id) do update set name = excluded.name, data_center_id = excluded.data_center_id,
                   cluster_id = excluded.cluster_id, status = excluded.status, address = excluded.address,
                   nics = excluded.nics, boot_id = excluded.boot_id""",
            (
                host.id,
                host.name,
                host.data_center_id,
                host.cluster_id,
                str(host.status),
                host.address,
                encode(host.capabilities.nics).decode(),
                host.boot_id,
            ),
            guarded=False,
        )

    def know_cluster(self, cluster: Cluster) -> Change:
        return Change(
            """insert into cluster (id, name, data_center_id) values ({0}, {1}, {2})
               on conflict (id) do update set name = excluded.name, data_center_id = excluded.data_center_id""",
            (cluster.id, cluster.name, cluster.data_center_id),
            guarded=False,
        )

    def know_name(self, table: str, object_id: str, name: str) -> Change:
        """`table` is data_center or vm."""
        return Change(
            f"""insert into {table} (id, name) values ({{0}}, {{1}})
                on conflict (id) do update set name = excluded.name""",
            (object_id, name),
            guarded=False,
        )

    def forget(self, table: str, object_id: str) -> Change:
        """`table` is one of data_center, cluster, host, vm, host_state."""
        key = "host_id" if table == "host_state" else "id"
        return Change(f"delete from {table} where {key} = {{0}}", (object_id,), guarded=False)

    def forget_all_but(self, table: str, ids: Iterable[str]) -> Change:
        return Change(f"delete from {table} where not id = any({{0}}::text[])", (list(ids),), guarded=False)

    async def hosts(self) -> list[HostRow]:
        return [_host(record) for record in await self.pool.fetch(f"{_HOST} order by id")]

    async def hosts_in(self, data_center_id: str) -> list[HostRow]:
        sql = f"{_HOST} where data_center_id = $1 order by id"
        return [_host(record) for record in await self.pool.fetch(sql, data_center_id)]

    async def host(self, host_id: str) -> HostRow | None:
        record = await self.pool.fetchrow(f"{_HOST} where id = $1", host_id)
        return None if record is None else _host(record)

    async def hosts_with(self, host_ids: Sequence[str]) -> dict[str, HostRow]:
        rows = await self.pool.fetch(f"{_HOST} where id = any($1::text[])", list(host_ids))
        return {row["id"]: _host(row) for row in rows}

    async def knows_data_center(self, data_center_id: str) -> bool:
        return bool(await self.pool.fetchval("select 1 from data_center where id = $1", data_center_id))

    async def clusters_in(self, data_center_id: str) -> set[str]:
        rows = await self.pool.fetch("select id from cluster where data_center_id = $1", data_center_id)
        return {row["id"] for row in rows}

    async def vm_names(self, vm_ids: Iterable[str]) -> dict[str, str]:
        rows = await self.pool.fetch("select id, name from vm where id = any($1::text[])", list(vm_ids))
        return {row["id"]: row["name"] for row in rows}

    async def unknown_users(self) -> list[str]:
        """VMs that have an address and that inventory's facts don't know, for some minutes already."""
        rows = await self.pool.fetch(
            """select distinct vm_id from nic where created_at < now() - interval '10 minutes'
               and not exists (select 1 from vm where vm.id = nic.vm_id)"""
        )
        return [row["vm_id"] for row in rows]

    # Networks

    async def networks_in(self, data_center_id: str) -> list[Row[Network, Nothing]]:
        return await NETWORKS.where(self.pool, "data_center_id = $1", data_center_id)

    async def networks(self) -> dict[str, list[Network]]:
        """By data center."""
        found: dict[str, list[Network]] = {}
        for row in await NETWORKS.where(self.pool):
            found.setdefault(row.public.data_center_id, []).append(row.public)
        return found

    async def networks_with(self, ids: Iterable[str]) -> dict[str, Row[Network, Nothing]]:
        rows = await NETWORKS.where(self.pool, "id = any($1::text[])", list(ids))
        return {row.id: row for row in rows}

    async def networks_to_miss(self) -> list[Row[Network, Nothing]]:
        """Those that are required, or that some host has lost. What a person wrote has its quotes escaped."""
        return await NETWORKS.where(
            self.pool, """position('"required":true' in doc) > 0 or position('"lost":{"' in doc) > 0"""
        )

    async def network_ids(self) -> list[str]:
        return [row["id"] for row in await self.pool.fetch("select id from network order by id")]

    async def subnets(self) -> list[str]:
        rows = await self.pool.fetch("select subnet from network where subnet <> ''")
        return [row["subnet"] for row in rows]

    # Which host has what

    async def state(self, host_id: str) -> HostState | None:
        doc = await self.pool.fetchval("select doc from host_state where host_id = $1", host_id)
        return None if doc is None else msgspec.json.decode(doc, type=HostState)

    async def states_of(self, host_ids: Sequence[str]) -> dict[str, HostState]:
        rows = await self.pool.fetch(
            "select host_id, doc from host_state where host_id = any($1::text[])", list(host_ids)
        )
        return {row["host_id"]: msgspec.json.decode(row["doc"], type=HostState) for row in rows}

    async def states(self) -> dict[str, HostState]:
        rows = await self.pool.fetch("select host_id, doc from host_state")
        return {row["host_id"]: msgspec.json.decode(row["doc"], type=HostState) for row in rows}

    def remember(self, host_id: str, state: HostState) -> Change:
        return Change(
            """insert into host_state (host_id, doc) values ({0}, {1})
               on conflict (host_id) do update set doc = excluded.doc""",
            (host_id, encode(state).decode()),
            guarded=False,
        )

    async def attachments_of(self, host_id: str) -> list[Row[Attachment, Nothing]]:
        return await ATTACHMENTS.where(self.pool, "host_id = $1", host_id)

    async def attachments(self) -> dict[str, list[Attachment]]:
        """By host."""
        found: dict[str, list[Attachment]] = {}
        for row in await ATTACHMENTS.where(self.pool):
            found.setdefault(row.public.host_id, []).append(row.public)
        return found

    async def attachments_for(self, network_id: str) -> list[Row[Attachment, Nothing]]:
        return await ATTACHMENTS.where(self.pool, "network_id = $1", network_id)

    async def stray_attachments(self) -> list[Row[Attachment, Nothing]]:
        return await ATTACHMENTS.where(
            self.pool, "not exists (select 1 from network where network.id = attachment.network_id)"
        )

    # Addresses

    async def default_pool(self) -> Row[MacPool, PoolPrivate] | None:
        found = await MAC_POOLS.where(self.pool, """private like '%"default":true%'""")
        return found[0] if found else None

    async def pool_ids(self) -> list[str]:
        return [row["id"] for row in await self.pool.fetch("select id from mac_pool order by id")]

    async def used_in(self, pool_id: str) -> int:
        sql = "select count(*) from nic where mac_pool_id = $1"
        return int(await self.pool.fetchval(sql, pool_id))

    async def outside(self, pool_id: str, bounds: Sequence[tuple[int, int]]) -> list[int]:
        """Addresses that the pool gave and that would be in none of these ranges."""
        rows = await self.pool.fetch(
            """select address from nic where mac_pool_id = $1 and not exists (
                   select 1 from unnest($2::bigint[], $3::bigint[]) as r(first, last)
                   where nic.address between r.first and r.last) limit 10""",
            pool_id,
            [first for first, _ in bounds],
            [last for _, last in bounds],
        )
        return [row["address"] for row in rows]

    async def taken(self, addresses: Iterable[int]) -> set[int]:
        rows = await self.pool.fetch(
            "select address from nic where address = any($1::bigint[])", list(addresses)
        )
        return {row["address"] for row in rows}

    async def lowest_free(self, first: int, last: int) -> int | None:
        """The lowest address from `first` to `last` that nobody has: `first`, or the one behind a taken one."""
        if not await self.pool.fetchval("select 1 from nic where address = $1::bigint", first):
            return first
        found = await self.pool.fetchval(
            """select n.address + 1 from nic n where n.address between $1::bigint and $2::bigint - 1
               and not exists (select 1 from nic m where m.address = n.address + 1)
               order by n.address limit 1""",
            first,
            last,
        )
        return None if found is None else int(found)

    async def nic(self, nic_id: str) -> NicRow | None:
        record = await self.pool.fetchrow(f"{_NIC} where id = $1", nic_id)
        return None if record is None else NicRow(**dict(record))

    async def nics_with(self, address: int) -> list[NicRow]:
        return [NicRow(**dict(r)) for r in await self.pool.fetch(f"{_NIC} where address = $1", address)]

    async def nics_of(self, vm_id: str) -> list[NicRow]:
        return [NicRow(**dict(r)) for r in await self.pool.fetch(f"{_NIC} where vm_id = $1", vm_id)]

    async def users_of(self, network_id: str) -> list[str]:
        rows = await self.pool.fetch("select distinct vm_id from nic where network_id = $1", network_id)
        return [row["vm_id"] for row in rows]

    def give(self, nic: NicRow) -> Change:
        return Change(
            """insert into nic (id, vm_id, network_id, mac_pool_id, address, shared)
               values ({0}, {1}, nullif({2}, ''), {3}, {4}, {5}) returning 1""",
            (nic.id, nic.vm_id, nic.network_id, nic.mac_pool_id, nic.address, nic.shared),
        )

    def move(self, before: NicRow, after: NicRow) -> Change:
        return Change(
            """update nic set network_id = nullif({2}, ''), mac_pool_id = {3}, address = {4}, shared = {5}
               where id = {0} and address = {1} returning 1""",
            (
                before.id,
                before.address,
                after.network_id,
                after.mac_pool_id,
                after.address,
                after.shared,
            ),
        )

    def take_back(self, nic_id: str, vm_id: str) -> Change:
        return Change("delete from nic where id = {0} and vm_id = {1}", (nic_id, vm_id), guarded=False)

    def take_back_all(self, vm_id: str) -> Change:
        return Change("delete from nic where vm_id = {0}", (vm_id,), guarded=False)
