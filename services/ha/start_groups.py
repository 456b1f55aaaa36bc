"""Start groups: made, changed, listed; and whether a VM that is to be brought back has its turn."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from msgspec import UNSET
from msgspec.structs import asdict, replace

from services.ha import store, watched_vms
from services.ha.policies import start_groups as rules
from services.ha.policies.restart_order import WatchedVm
from services.ha.state import Ha
from services.ha.store import START_GROUPS
from volery.contracts.base import Done
from volery.contracts.cluster import GET_CLUSTER, DeleteById, GetById
from volery.contracts.errors import conflict, invalid
from volery.contracts.ids import new_id
from volery.contracts.operation import ListQuery
from volery.contracts.protection import DESCRIBE_NEEDS, VmNeeds
from volery.contracts.start_group import (
    CREATE_START_GROUP,
    DELETE_START_GROUP,
    GET_START_GROUP,
    LIST_START_GROUPS,
    UPDATE_START_GROUP,
    CreateStartGroup,
    StartGroup,
    UpdateStartGroup,
)
from volery.runtime import checks
from volery.runtime.bus import Caller
from volery.runtime.clock import utc_now
from volery.runtime.pages import page
from volery.runtime.service import Part
from volery.runtime.tables import Nothing, Stale, Taken

part = Part()

MAX_VMS = 200
HEARD_SECONDS = 1.0
"""A VM with others before it waits this long in any case: VMs that end together are heard of one after the other."""

Groups = Mapping[str, StartGroup]
"""All start groups, by id."""


@part.answers(CREATE_START_GROUP)
async def create(ha: Ha, ask: CreateStartGroup, caller: Caller) -> Any:
    checks.object_id(ask.cluster_id, "cluster")
    await ha.core.bus.ask(GET_CLUSTER, GetById(id=ask.cluster_id), Caller(caller.principal))
    now = utc_now()
    made = StartGroup(id=new_id(), revision=1, created_at=now, updated_at=now, **asdict(ask))
    await _check_vms(ha, made, caller)
    while True:
        order = await store.start_order(ha.core.pool, made.cluster_id)
        await _check(ha, made)
        try:
            await ha.core.commit(
                START_GROUPS.insert(made, Nothing()),
                store.next_start_order(made.cluster_id, order),
                caller=caller,
                answer=made,
            )
        except Stale:
            continue
        except Taken:
            raise _name_taken(made.name) from None
        return made


@part.answers(UPDATE_START_GROUP)
async def update(ha: Ha, ask: UpdateStartGroup, caller: Caller) -> Any:
    given = {
        name: value
        for name in ("name", "vm_ids", "after", "wait_for", "wait_seconds")
        if (value := getattr(ask, name)) is not UNSET
    }
    while True:
        row = await START_GROUPS.get(ha.core.pool, ask.id)
        checks.revision(row.public, ask.if_revision, "start group")
        order = await store.start_order(ha.core.pool, row.public.cluster_id)
        new = replace(row.public, **given)
        if "vm_ids" in given:
            await _check_vms(ha, new, caller)
        await _check(ha, new)
        change = START_GROUPS.update(row, new)
        try:
            await ha.core.commit(
                change,
                store.next_start_order(new.cluster_id, order),
                caller=caller,
                answer=change.document,
            )
        except Stale:
            continue
        except Taken:
            raise _name_taken(new.name) from None
        return change.document


@part.answers(DELETE_START_GROUP)
async def delete(ha: Ha, ask: DeleteById, caller: Caller) -> Done:
    while True:
        row = await START_GROUPS.get(ha.core.pool, ask.id)
        checks.revision(row.public, ask.if_revision, "start group")
        order = await store.start_order(ha.core.pool, row.public.cluster_id)
        later = [g.name for g in await _of_cluster(ha, row.public.cluster_id) if ask.id in g.after]
        if later:
            raise conflict(
                f"start group {row.public.name} comes before {', '.join(later)}: take it out of their `after` first",
                rule="awaited",
            )
        try:
            await ha.core.commit(
                START_GROUPS.delete(row),
                store.next_start_order(row.public.cluster_id, order),
                caller=caller,
                answer=Done(),
            )
        except Stale:
            continue
        return Done()


async def _of_cluster(ha: Ha, cluster_id: str) -> list[StartGroup]:
    return [r.public for r in await START_GROUPS.where(ha.core.pool, "cluster_id = $1", cluster_id)]


async def _check(ha: Ha, group: StartGroup) -> None:
    checks.name(group.name)
    others = [g for g in await _of_cluster(ha, group.cluster_id) if g.id != group.id]
    rules.check(group, others)


async def _check_vms(ha: Ha, group: StartGroup, caller: Caller) -> None:
    """Raises Refused(invalid) for a VM that doesn't exist, or is of another cluster."""
    if len(group.vm_ids) > MAX_VMS:
        raise invalid(f"a start group has at most {MAX_VMS} VMs, not {len(group.vm_ids)}", field="vm_ids")
    for vm_id in group.vm_ids:
        checks.object_id(vm_id, "VM")
    if not group.vm_ids:
        return
    question = VmNeeds(vm_ids=group.vm_ids)
    answer = await ha.core.bus.ask(DESCRIBE_NEEDS, question, Caller(caller.principal))
    clusters = {vm.need.vm_id: vm.need.cluster_id for vm in answer.vms}
    for vm_id in group.vm_ids:
        if clusters.get(vm_id) != group.cluster_id:
            where = "of another cluster" if vm_id in clusters else "not there"
            raise invalid(
                f"VM {vm_id} can't be in start group {group.name}: it is {where}; a group has VMs of its own cluster",
                field="vm_ids",
                vm_id=vm_id,
            )


def _name_taken(name: str) -> Exception:
    return conflict(f"its cluster has a start group named {name!r} already; choose another name", name=name)


@part.answers(GET_START_GROUP)
async def get(ha: Ha, ask: GetById, caller: Caller) -> Any:
    return await START_GROUPS.raw(ha.core.pool, ask.id)


@part.answers(LIST_START_GROUPS)
async def list_groups(ha: Ha, ask: ListQuery, caller: Caller) -> Any:
    return await page(ha.core.pool, START_GROUPS, ask)


async def known(ha: Ha) -> Groups:
    return {row.id: row.public for row in await START_GROUPS.where(ha.core.pool)}


async def waits_for(ha: Ha, vm: WatchedVm, groups: Groups, silent: Collection[str], waited: float) -> str:
    """Which start group it waits for; "" when it is its turn. `waited` seconds have passed since it could have been;
    `silent` hosts may have taken their VMs with them."""
    earlier = rules.before(vm.id, groups)
    if not earlier:
        return ""
    if waited < HEARD_SECONDS:
        return "it waits a moment for word of the start groups before its own"
    vm_ids = sorted({vm_id for group in earlier for vm_id in group.vm_ids})
    members = await watched_vms.members(ha.core.pool, vm_ids)
    return rules.waits_for(vm.id, groups, members, max(waited, 0.0), silent)
