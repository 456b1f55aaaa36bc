"""Every table and SQL statement of inventory."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import asyncpg

from volery.contracts.account import (
    READER_CHANGED,
    READER_DELETED,
    TOKEN_CHANGED,
    TOKEN_DELETED,
    USER_CHANGED,
    USER_DELETED,
    EventReader,
    Token,
    User,
)
from volery.contracts.base import Message
from volery.contracts.cluster import (
    CLUSTER_CHANGED,
    CLUSTER_DELETED,
    DATA_CENTER_CHANGED,
    DATA_CENTER_DELETED,
    Cluster,
    DataCenter,
)
from volery.contracts.host import HOST_CHANGED, HOST_DELETED, Host
from volery.contracts.template import TEMPLATE_CHANGED, TEMPLATE_DELETED, Template
from volery.contracts.vm import VM_CHANGED, VM_DELETED, RunOnce, Vm
from volery.runtime.core import Pace
from volery.runtime.tables import Change, Nothing, Row, Table, not_there


class HostPrivate(Message):
    token_sha256: str = ""
    """Of the enrolment token's secret; "" once used or when none was issued."""
    token_expires_at: datetime | None = None
    public_key: str = ""
    """The agent's nkey."""
    liveness: str = "up"
    """ha's last word."""
    maintenance: bool = False
    reported: bool = False
    evacuation: str = ""
    """The operation that moves its highly available VMs away, since it has lost something."""


class VmPrivate(Message):
    saved_path: str = ""
    """Where the memory of a suspended VM is."""
    saved_host_id: str = ""
    """The host whose file that is, and the only one on which the VM starts; "" in what a former release wrote."""
    excluded_host_ids: tuple[str, ...] = ()
    """Hosts that failed to start it, for the current attempt."""
    stop_asked: bool = False
    """A stop is under way: its ending is no crash."""
    stop_forced: bool = False
    """Whoever asked for it wanted it forced off if need be: so it is when it is asked again."""
    killing: bool = False
    """It is being ended since an I/O error has kept it paused for too long."""
    run_once: RunOnce | None = None
    unplugging: tuple[str, ...] = ()
    """Disks and NICs whose guest was asked to let go, and didn't in time: it may yet."""
    had_agent: bool = False
    delete_disks: bool = True
    """What the one who deletes it wants for its disks."""


class UserPrivate(Message):
    password_hash: str = ""


class TokenPrivate(Message):
    secret_sha256: str = ""


DATA_CENTERS: Table[DataCenter, Nothing] = Table(
    "data_center",
    DataCenter,
    Nothing,
    columns={"name": "name"},
    changed=DATA_CENTER_CHANGED,
    deleted=DATA_CENTER_DELETED,
    noun="data center",
)
CLUSTERS: Table[Cluster, Nothing] = Table(
    "cluster",
    Cluster,
    Nothing,
    columns={"name": "name", "data_center_id": "data_center_id"},
    changed=CLUSTER_CHANGED,
    deleted=CLUSTER_DELETED,
)
HOSTS: Table[Host, HostPrivate] = Table(
    "host",
    Host,
    HostPrivate,
    columns={
        "name": "name",
        "cluster_id": "cluster_id",
        "data_center_id": "data_center_id",
        "status": "status",
        "power_saving": "power_saving",
    },
    changed=HOST_CHANGED,
    deleted=HOST_DELETED,
)
VMS: Table[Vm, VmPrivate] = Table(
    "vm",
    Vm,
    VmPrivate,
    columns={
        "name": "name",
        "cluster_id": "cluster_id",
        "data_center_id": "data_center_id",
        "host_id": "host_id",
        "status": "status",
        "desired": "desired",
        "busy_with": "busy_with",
        "external": "external",
    },
    changed=VM_CHANGED,
    deleted=VM_DELETED,
    noun="VM",
)
TEMPLATES: Table[Template, Nothing] = Table(
    "template",
    Template,
    Nothing,
    columns={"name": "name"},
    changed=TEMPLATE_CHANGED,
    deleted=TEMPLATE_DELETED,
)
USERS: Table[User, UserPrivate] = Table(
    "app_user",
    User,
    UserPrivate,
    columns={"name": "name"},
    changed=USER_CHANGED,
    deleted=USER_DELETED,
    noun="user",
)
TOKENS: Table[Token, TokenPrivate] = Table(
    "token",
    Token,
    TokenPrivate,
    columns={"user_id": "user_id"},
    changed=TOKEN_CHANGED,
    deleted=TOKEN_DELETED,
)
READERS: Table[EventReader, Nothing] = Table(
    "reader",
    EventReader,
    Nothing,
    columns={"name": "name"},
    changed=READER_CHANGED,
    deleted=READER_DELETED,
    noun="event reader",
)


@dataclass(frozen=True, slots=True)
class PlacementRow:
    """Where a VM may run. `destination_id` is set while it moves: then both hosts may run it."""

    vm_id: str
    epoch: int
    host_id: str
    state: str
    destination_id: str
    boot_id: str = ""
    """Of `host_id`, under which it runs; "" until that is known."""


def nowhere(vm_id: str) -> PlacementRow:
    """The placement of what was never placed."""
    return PlacementRow(vm_id, 0, "", "none", "")


def placement_of(vm_id: str, found: asyncpg.Record) -> PlacementRow:
    """Of a VM joined with its placement, if it has one."""
    if found["epoch"] is None:
        return nowhere(vm_id)
    columns = (found["epoch"], found["host_id"], found["state"], found["destination_id"], found["boot_id"])
    return PlacementRow(vm_id, *columns)


@dataclass(frozen=True, slots=True)
class Store:
    """What Table does not say by itself."""

    pool: asyncpg.Pool[asyncpg.Record]
    wake: Callable[[str], None]
    """Has the reconcile loop look at a key, once what concerns it is committed."""
    shown: Pace
    """Likewise, for what is only shown."""

    async def placement(self, vm_id: str) -> PlacementRow:
        row = await self.pool.fetchrow(
            "select vm_id, epoch, host_id, state, destination_id, boot_id from placement where vm_id = $1",
            vm_id,
        )
        if row is None:
            return nowhere(vm_id)
        return PlacementRow(**dict(row))

    async def placed(self, vm_id: str) -> tuple[Row[Vm, VmPrivate], PlacementRow]:
        """A VM and where it may run, in one round trip. Raises Refused(not_found)."""
        found = await self.pool.fetchrow(
            """select v.doc, v.private, p.epoch, p.host_id, p.state, p.destination_id, p.boot_id
               from vm v left join placement p on p.vm_id = v.id where v.id = $1""",
            vm_id,
        )
        if found is None:
            raise not_there(VMS.noun, vm_id)
        return VMS.row(found), placement_of(vm_id, found)

    async def domain_on(
        self, host_id: str, vm_id: str
    ) -> tuple[Row[Vm, VmPrivate] | None, PlacementRow] | None:
        """What is known of a domain that a host speaks of: its VM, if it is one, and where that may run. None: there is
        no such host. One round trip, since every event of every domain asks it."""
        found = await self.pool.fetchrow(
            """select v.doc, v.private, p.epoch, p.host_id, p.state, p.destination_id, p.boot_id
               from host h left join vm v on v.id = $2 left join placement p on p.vm_id = $2 where h.id = $1""",
            host_id,
            vm_id,
        )
        if found is None:
            return None
        row = VMS.row(found) if found["doc"] is not None else None
        return row, placement_of(vm_id, found)

    async def next_epoch(self, before: PlacementRow) -> int:
        """Above every epoch that a host can have seen, also by a database that was since restored."""
        return max(before.epoch, await self.restored_to()) + 1

    async def restored_to(self) -> int:
        """Epochs up to here were given before this database was restored; 0 when it never was."""
        return int(await self.pool.fetchval("select base from restore_base"))

    async def placements_on(self, host_id: str) -> list[PlacementRow]:
        rows = await self.pool.fetch(
            """select vm_id, epoch, host_id, state, destination_id, boot_id from placement
               where host_id = $1 or destination_id = $1""",
            host_id,
        )
        return [PlacementRow(**dict(row)) for row in rows]

    async def lost_placements(self) -> list[PlacementRow]:
        """VMs that run, as far as is written, under a boot that has ended by proof."""
        rows = await self.pool.fetch(
            """select p.vm_id, p.epoch, p.host_id, p.state, p.destination_id, p.boot_id
               from placement p join host_death d on d.host_id = p.host_id and d.boot_id = p.boot_id
               where p.state = 'running' order by p.vm_id"""
        )
        return [PlacementRow(**dict(row)) for row in rows]

    async def hosts_of_unknown_boots(self) -> list[str]:
        """Hosts on which a VM runs of which nobody has said under which boot."""
        rows = await self.pool.fetch(
            "select distinct host_id from placement where state = 'running' and boot_id = ''"
        )
        return [row["host_id"] for row in rows]

    def place(
        self,
        before: PlacementRow,
        *,
        epoch: int,
        host_id: str,
        state: str,
        destination_id: str = "",
        boot_id: str = "",
        claims_after_seconds: float = 0.0,
    ) -> Change:
        """The next placement, if it still stands as `before` says. Epochs never go down. What it held before is given back
        after so many seconds."""
        assert epoch >= before.epoch

        def wake() -> None:
            for host in dict.fromkeys((before.host_id, host_id)):
                if host:
                    self.shown.add(f"host/{host}")
            if state == "none" or before.state == "moving":
                later = asyncio.get_running_loop().call_later
                later(claims_after_seconds, self.wake, f"claims/{before.vm_id}")
            if state == "running":
                self.wake(f"lost/{host_id}")

        return Change(
            """insert into placement (vm_id, epoch, host_id, state, destination_id, boot_id)
               select {0}, {1}::bigint, {2}, {3}, {4}, {8}
               on conflict (vm_id) do update set epoch = excluded.epoch, host_id = excluded.host_id,
                   state = excluded.state, destination_id = excluded.destination_id, boot_id = excluded.boot_id
               where placement.epoch = {5}::bigint and placement.state = {6} and placement.host_id = {7}
               returning 1""",
            (
                before.vm_id,
                epoch,
                host_id,
                state,
                destination_id,
                before.epoch,
                before.state,
                before.host_id,
                boot_id,
            ),
            then=wake,
        )

    def takes_vms(self, host_id: str) -> Change:
        """Guards that a VM comes to a host: nobody takes it out of use. Who sends it there waits until this is committed."""
        return Change(
            """select 1 from host where id = {0} and power_saving = 'awake'
                   and status not in ('preparing_for_maintenance', 'maintenance') for share""",
            (host_id,),
        )

    async def is_in_use(self, host_id: str) -> bool:
        """False also for one that is no more."""
        sql = """select 1 from host where id = $1 and power_saving = 'awake'
                     and status not in ('preparing_for_maintenance', 'maintenance')"""
        return bool(await self.pool.fetchval(sql, host_id))

    def forget_placement(self, vm_id: str) -> Change:
        return Change("delete from placement where vm_id = {0}", (vm_id,), guarded=False)

    def raised(self, before: PlacementRow, epoch: int) -> Change:
        """The same placement under a later epoch, which a host has seen."""
        return self.place(
            before,
            epoch=epoch,
            host_id=before.host_id,
            state=before.state,
            destination_id=before.destination_id,
            boot_id=before.boot_id,
        )

    # Memory that was given up

    def discard_memory(self, host_id: str, path: str, vm_id: str) -> Change:
        return Change(
            """insert into discarded_memory (host_id, path, vm_id) values ({0}, {1}, {2})
               on conflict (host_id, path) do nothing""",
            (host_id, path, vm_id),
            guarded=False,
        )

    def memory_discarded(self, host_id: str, path: str) -> Change:
        sql = "delete from discarded_memory where host_id = {0} and path = {1}"
        return Change(sql, (host_id, path), guarded=False)

    def forget_memory_on(self, host_id: str) -> Change:
        """Of a host that was deleted."""
        return Change("delete from discarded_memory where host_id = {0}", (host_id,), guarded=False)

    async def discarded_memory(self, host_id: str) -> list[tuple[str, str]]:
        """Path and VM of what this host still has."""
        sql = "select path, vm_id from discarded_memory where host_id = $1 order by path"
        return [(row["path"], row["vm_id"]) for row in await self.pool.fetch(sql, host_id)]

    async def hosts_with_discarded_memory(self) -> list[str]:
        rows = await self.pool.fetch("select distinct host_id from discarded_memory")
        return [row["host_id"] for row in rows]

    async def promised(self, host_id: str) -> tuple[int, int]:
        """How many VMs are on a host, and how much memory they were promised."""
        found = await self.pool.fetchrow(
            """select count(*) as vms, coalesce(sum((doc::json ->> 'memory_bytes')::bigint), 0)::bigint as memory_bytes
               from vm where host_id = $1""",
            host_id,
        )
        assert found is not None
        return found["vms"], found["memory_bytes"]

    async def hosts_shown_wrong(self) -> list[str]:
        """Hosts whose documents say other figures than `promised` would."""
        rows = await self.pool.fetch(
            """select h.id from host h
               left join (select host_id, count(*) as vms,
                                 sum((doc::json ->> 'memory_bytes')::bigint)::bigint as memory_bytes
                          from vm where host_id <> '' group by host_id) v on v.host_id = h.id
               where (coalesce(v.vms, 0), coalesce(v.memory_bytes, 0)) is distinct from
                     (coalesce((h.doc::json ->> 'vm_count')::bigint, 0),
                      coalesce((h.doc::json ->> 'memory_committed_bytes')::bigint, 0))"""
        )
        return [row["id"] for row in rows]

    async def hosts_of_machine(self, hardware_uuid: str) -> list[Row[Host, HostPrivate]]:
        return await HOSTS.where(
            self.pool, "doc::json -> 'capabilities' ->> 'hardware_uuid' = $1", hardware_uuid
        )

    async def vms_on(self, host_id: str) -> list[Row[Vm, VmPrivate]]:
        return await VMS.where(self.pool, "host_id = $1", host_id)

    async def vms_with(self, vm_ids: Sequence[str]) -> list[Row[Vm, VmPrivate]]:
        return await VMS.where(self.pool, "id = any($1::text[])", list(vm_ids))

    async def vms_that_rest(self, cluster_id: str, statuses: Sequence[str]) -> list[Row[Vm, VmPrivate]]:
        """Volery's own in one of these states, of a cluster or ("") of all."""
        return await VMS.where(
            self.pool,
            "status = any($1::text[]) and not external and ($2::text = '' or cluster_id = $2::text)",
            list(statuses),
            cluster_id,
        )

    async def vms_in_cluster(self, cluster_id: str) -> int:
        return int(await self.pool.fetchval("select count(*) from vm where cluster_id = $1", cluster_id))

    async def host_ids_in_cluster(self, cluster_id: str) -> list[str]:
        rows = await self.pool.fetch("select id from host where cluster_id = $1 order by id", cluster_id)
        return [row["id"] for row in rows]

    async def hosts_in_cluster(self, cluster_id: str) -> int:
        return int(await self.pool.fetchval("select count(*) from host where cluster_id = $1", cluster_id))

    async def clusters_in(self, data_center_id: str) -> int:
        sql = "select count(*) from cluster where data_center_id = $1"
        return int(await self.pool.fetchval(sql, data_center_id))

    async def unsettled_vms(self) -> list[str]:
        """VMs whose state is not the desired one and that no operation is at work on."""
        rows = await self.pool.fetch(
            """select id from vm where busy_with = '' and not external
               and ((desired = 'up' and status in ('down', 'suspended'))
                    or (desired = 'down' and status in ('up', 'powering_up', 'paused'))
                    or status = 'deleting')"""
        )
        return [row["id"] for row in rows]

    async def vms_unplugging(self) -> list[str]:
        """VMs with a device that their guest may still let go of."""
        rows = await self.pool.fetch("""select id from vm where position('"unplugging":["' in private) > 0""")
        return [row["id"] for row in rows]

    async def paused_vms(self) -> list[Row[Vm, VmPrivate]]:
        """Those that no operation is at work on, and that are wanted to run."""
        return await VMS.where(
            self.pool, "status = 'paused' and desired = 'up' and busy_with = '' and not external"
        )

    async def reader_positions(self, reader: str) -> dict[str, int]:
        rows = await self.pool.fetch("select stream, position from reader_position where reader = $1", reader)
        return {row["stream"]: row["position"] for row in rows}

    async def note_reader(self, reader: str, stream: str, position: int) -> None:
        await self.pool.execute(
            """insert into reader_position (reader, stream, position) values ($1, $2, $3)
               on conflict (reader, stream) do update set position = excluded.position""",
            reader,
            stream,
            position,
        )

    def forget_reader(self, reader: str) -> Change:
        return Change("delete from reader_position where reader = {0}", (reader,), guarded=False)

    async def user_by_name(self, name: str) -> Row[User, UserPrivate] | None:
        found = await USERS.where(self.pool, "name = $1", name)
        return found[0] if found else None

    async def users(self) -> int:
        return int(await self.pool.fetchval("select count(*) from app_user"))

    async def expired_tokens(self) -> list[Any]:
        return await TOKENS.where(
            self.pool, "(doc::json ->> 'expires_at')::timestamptz < now() - interval '1 day'"
        )

    async def host_with_token(self, token_sha256: str) -> Row[Host, HostPrivate] | None:
        found = await HOSTS.where(self.pool, "private::json ->> 'token_sha256' = $1", token_sha256)
        return found[0] if found else None

    async def hosts_concerned(self, object_id: str, host_ids: Sequence[str]) -> list[Row[Host, HostPrivate]]:
        """These, and those with a problem about this object."""
        return await HOSTS.where(
            self.pool, "id = any($1::text[]) or position($2 in doc) > 0", list(host_ids), object_id
        )

    async def non_operational_hosts(self) -> list[str]:
        rows = await self.pool.fetch("select id from host where status = 'non_operational'")
        return [row["id"] for row in rows]

    async def hosts(self) -> list[Row[Host, HostPrivate]]:
        return await HOSTS.where(self.pool)
