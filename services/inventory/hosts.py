"""Hosts: list, edit, delete. What they report is heard in `host_facts`, maintenance is in `maintenance`."""

from __future__ import annotations

from typing import Any

from msgspec.structs import replace

from services.inventory import model
from services.inventory.clusters import name_taken
from services.inventory.desk import Inventory
from services.inventory.store import CLUSTERS, HOSTS, VMS
from volery.contracts.base import Done
from volery.contracts.cluster import DeleteById, GetById
from volery.contracts.errors import conflict
from volery.contracts.host import (
    DELETE_HOST,
    GET_HOST,
    LIST_HOSTS,
    UPDATE_HOST,
    HostStatus,
    UpdateHost,
)
from volery.contracts.operation import ListQuery
from volery.runtime import checks
from volery.runtime.bus import Caller
from volery.runtime.operations import busy
from volery.runtime.pages import page
from volery.runtime.service import Part
from volery.runtime.tables import Stale, Taken

part = Part()


@part.answers(GET_HOST)
async def get_host(inv: Inventory, ask: GetById, caller: Caller) -> Any:
    return await HOSTS.raw(inv.core.pool, ask.id)


@part.answers(LIST_HOSTS)
async def list_hosts(inv: Inventory, ask: ListQuery, caller: Caller) -> Any:
    return await page(inv.core.pool, HOSTS, ask)


@part.answers(UPDATE_HOST)
async def update_host(inv: Inventory, ask: UpdateHost, caller: Caller) -> Any:
    while True:
        row = await HOSTS.get(inv.core.pool, ask.id)
        checks.revision(row.public, ask.if_revision, "host")
        new = replace(row.public, **model.given(ask))
        checks.name(new.name)
        checks.text(new.comment, "comment")
        checks.tags(new.tags)
        if new.cluster_id != row.public.cluster_id:
            if row.public.status not in (HostStatus.MAINTENANCE, HostStatus.INSTALLING):
                raise conflict(
                    f"host {new.name} is {row.public.status}; put it into maintenance before it changes its cluster",
                    status=row.public.status,
                )
            cluster = (await CLUSTERS.get(inv.core.pool, checks.object_id(new.cluster_id, "cluster"))).public
            new = replace(new, data_center_id=cluster.data_center_id)
        try:
            update = HOSTS.update(row, new)
            await inv.core.commit(update, caller=caller, answer=update.document)
        except Stale:
            continue
        except Taken:
            raise name_taken("host", new.name) from None
        return update.document


@part.answers(DELETE_HOST)
async def delete_host(inv: Inventory, ask: DeleteById, caller: Caller) -> Done:
    inv.core.quarantine.check()  # what it runs may be known to nobody else, and once its key is revoked it can't say so
    while True:
        row = await HOSTS.get(inv.core.pool, ask.id)
        host = row.public
        checks.revision(host, ask.if_revision, "host")
        busy(host, "host", host.busy_with)
        if host.status not in (HostStatus.MAINTENANCE, HostStatus.INSTALLING):
            raise conflict(
                f"host {host.name} is {host.status}; put it into maintenance before deleting it",
                status=host.status,
            )
        if placed := await inv.store.placements_on(host.id):
            raise conflict(
                f"{len(placed)} VMs may still run on host {host.name}; it can't be deleted before they ended",
                vm_ids=[p.vm_id for p in placed],
            )
        external = [v for v in await inv.store.vms_on(host.id) if v.public.external]
        try:
            await inv.core.commit(
                HOSTS.delete(row),
                inv.store.forget_memory_on(host.id),
                *(VMS.delete(vm) for vm in external),
                caller=caller,
                answer=Done(),
            )
        except Stale:
            continue
        await inv.revoke_keys([row.private.public_key])
        return Done()
