"""Listing inventory again: once per leadership, and after facts were lost."""

from __future__ import annotations

import logging

from services.ha import fencing, fencing_policies, liveness, protection, restarts, rooms, store, watched_vms
from services.ha.state import Ha
from volery.contracts.errors import Refused
from volery.contracts.host import LIST_HOSTS, Host
from volery.contracts.vm import LIST_VMS, Vm
from volery.runtime.listing import pages
from volery.runtime.service import Part
from volery.runtime.tables import Stale, commit

log = logging.getLogger(__name__)

part = Part()

LIST_SECONDS = 2.0


async def leadership_begins(ha: Ha) -> None:
    ha.listed = False
    await liveness.begin(ha)
    await fencing.begin(ha)
    await protection.begin(ha)


async def facts_were_lost(ha: Ha, stream: str) -> None:
    ha.listed = False


@part.every(LIST_SECONDS)
async def list_what_was_missed(ha: Ha) -> None:
    if ha.listed:
        return
    try:
        await _list_hosts(ha)
        await _list_vms(ha)
        await fencing_policies.forget_what_has_no_cluster(ha)
    except Refused as refused:
        log.info("inventory can't be listed yet: %s", refused.message)
    except Stale:
        return
    else:
        ha.listed = True
        protection.fleet_changed(ha)
        rooms.may_have_come(ha)
        ha.core.wake(restarts.KEY)


async def _list_hosts(ha: Ha) -> None:
    before = {row.id: row for row in await store.LIVENESS.where(ha.core.pool)}
    async for hosts in pages(ha.core.bus, LIST_HOSTS, Host):
        for host in hosts:
            before.pop(host.id, None)
            await ha.core.commit(*await liveness.host_changed(ha, host))
    for host_id in before:
        await ha.core.commit(*await liveness.host_gone(ha, host_id))


async def _list_vms(ha: Ha) -> None:
    before = await watched_vms.known(ha.core.pool)
    async for vms in pages(ha.core.bus, LIST_VMS, Vm):
        if vms:
            await commit(ha.core.pool, [watched_vms.saw(vms)])
        before -= {vm.id for vm in vms}
    await commit(ha.core.pool, [watched_vms.gone(sorted(before))])
