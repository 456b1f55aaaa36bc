"""What hosts' reports are judged by, and what they prove: statements about many hosts at once."""

from __future__ import annotations

from collections.abc import Sequence

from services.inventory.store import HOSTS, VMS, HostPrivate, PlacementRow, Store, VmPrivate, placement_of
from volery.contracts.host import Host
from volery.contracts.vm import Vm
from volery.runtime.tables import Change, Row, text_columns


async def hosts_with(store: Store, host_ids: Sequence[str]) -> dict[str, Row[Host, HostPrivate]]:
    return {row.id: row for row in await HOSTS.where(store.pool, "id = any($1::text[])", list(host_ids))}


async def vms_by_host(store: Store, host_ids: Sequence[str]) -> dict[str, list[Row[Vm, VmPrivate]]]:
    """Those that are shown there."""
    found: dict[str, list[Row[Vm, VmPrivate]]] = {}
    for row in await VMS.where(store.pool, "host_id = any($1::text[])", list(host_ids)):
        found.setdefault(row.public.host_id, []).append(row)
    return found


async def domains_of(
    store: Store, host_ids: Sequence[str], vm_ids: Sequence[str]
) -> dict[str, tuple[Row[Vm, VmPrivate] | None, PlacementRow]]:
    """Every VM that may run or is shown on one of these hosts, and those that they speak of: what is written of it, and where
    it may run."""
    hosts = list(host_ids)
    placed = await store.pool.fetch(
        """select vm_id as id from placement
           where host_id = any($1::text[]) or (destination_id <> '' and destination_id = any($1::text[]))""",
        hosts,
    )
    shown = await store.pool.fetch("select id from vm where host_id = any($1::text[])", hosts)
    rows = await store.pool.fetch(
        """select n.id, v.doc, v.private, p.epoch, p.host_id, p.state, p.destination_id, p.boot_id
           from unnest($1::text[]) as n(id)
           left join vm v on v.id = n.id left join placement p on p.vm_id = n.id""",
        sorted({*vm_ids, *(row["id"] for row in placed), *(row["id"] for row in shown)}),
    )
    return {
        found["id"]: (
            VMS.row(found) if found["doc"] is not None else None,
            placement_of(found["id"], found),
        )
        for found in rows
    }


def under_boots(store: Store, running: Sequence[tuple[PlacementRow, str]]) -> list[Change]:
    """These VMs run under these boots, if all of their placements still stand as they are given."""
    if not running:
        return []

    def wake() -> None:
        for host_id in dict.fromkeys(placement.host_id for placement, _ in running):
            store.shown.add(f"host/{host_id}")
            store.wake(f"lost/{host_id}")

    rows = [(each.vm_id, each.epoch, each.host_id, boot_id) for each, boot_id in running]
    known = Change(
        """update placement p set boot_id = n.boot_id
           from unnest({0}::text[], {1}::text[], {2}::text[], {3}::text[]) as n(vm_id, epoch, host_id, boot_id)
           where p.vm_id = n.vm_id and p.epoch = n.epoch::bigint and p.host_id = n.host_id
             and p.state = 'running'
           returning 1""",
        text_columns(rows),
        guarded=False,
        then=wake,
    )
    all_stood = Change(
        "select 1 from (select count(*) as n from {prev}) as done where done.n = {0}::bigint", (len(rows),)
    )
    return [known, all_stood]
