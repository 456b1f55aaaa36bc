"""Affinity groups as a resource: made, changed, deleted, listed; and kept in step with the VMs and hosts they name."""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Iterable, Mapping
from datetime import timedelta
from typing import Any

from msgspec import UNSET
from msgspec.structs import asdict, replace

from services.scheduler import affinity_store as sql
from services.scheduler import store
from services.scheduler.model import ENDED_STATUSES, SeenVm
from services.scheduler.policies import affinity as policy
from services.scheduler.policies.affinity import ClusterRules, Group, Runs
from services.scheduler.state import Scheduler
from services.scheduler.store import GROUPS
from volery.contracts.affinity_group import (
    CREATE_AFFINITY_GROUP,
    DELETE_AFFINITY_GROUP,
    GET_AFFINITY_GROUP,
    LIST_AFFINITY_GROUPS,
    UPDATE_AFFINITY_GROUP,
    AffinityGroup,
    AffinityRule,
    CreateAffinityGroup,
    UpdateAffinityGroup,
)
from volery.contracts.base import Done
from volery.contracts.cluster import GET_CLUSTER, DeleteById, GetById
from volery.contracts.errors import Kind, Refused, conflict, invalid
from volery.contracts.host import GET_HOST
from volery.contracts.ids import new_id
from volery.contracts.operation import ListQuery
from volery.contracts.protection import DESCRIBE_NEEDS, VmNeeds
from volery.runtime import checks
from volery.runtime.bus import Caller
from volery.runtime.clock import utc_now
from volery.runtime.pages import page
from volery.runtime.service import Part
from volery.runtime.tables import Change, Nothing, Stale, Taken

log = logging.getLogger(__name__)

part = Part()

MAX_MEMBERS = 1000
MAX_PRIORITY = 1000.0
ASKED_TOGETHER = 200
"""VMs that inventory tells of at a time."""
LOOK_SECONDS = 2.0
HEARD_MARGIN = timedelta(seconds=10)
"""A VM's row may be committed this long after the moment it is dated with."""
_VM_ID = re.compile(r"\{([0-9a-f-]+)\}")

FIELDS = tuple(name for name in UpdateAffinityGroup.__struct_fields__ if name not in ("id", "if_revision"))


@part.answers(CREATE_AFFINITY_GROUP)
async def create(scheduler: Scheduler, ask: CreateAffinityGroup, caller: Caller) -> Any:
    """Raises Refused(conflict) for a group that contradicts others, which it names."""
    checks.object_id(ask.cluster_id, "cluster")
    now = utc_now()
    made = AffinityGroup(id=new_id(), revision=1, created_at=now, updated_at=now, **asdict(ask))
    _check_fields(made)
    await _rules(scheduler, made.cluster_id, caller)
    await _check_members(scheduler, made, made.vm_ids, made.host_ids, caller)
    while True:
        rules = await _rules(scheduler, made.cluster_id, caller)
        await _check_rules(scheduler, made, rules)
        change = GROUPS.insert(made, Nothing())
        if await _commit(scheduler, made, rules, change, caller, made):
            return made


@part.answers(UPDATE_AFFINITY_GROUP)
async def update(scheduler: Scheduler, ask: UpdateAffinityGroup, caller: Caller) -> Any:
    """Raises Refused as `create`, and stale when it has another revision than `if_revision`."""
    given = {name: value for name in FIELDS if (value := getattr(ask, name)) is not UNSET}
    while True:
        row = await GROUPS.get(scheduler.core.pool, ask.id)
        before = row.public
        checks.revision(before, ask.if_revision, "affinity group")
        new = replace(before, **given)
        _check_fields(new)
        vm_ids, host_ids = set(new.vm_ids) - set(before.vm_ids), set(new.host_ids) - set(before.host_ids)
        await _check_members(scheduler, new, vm_ids, host_ids, caller)
        rules = await _rules(scheduler, new.cluster_id, caller)
        await _check_rules(scheduler, new, rules)
        change = GROUPS.update(row, new)
        if await _commit(scheduler, new, rules, change, caller, change.document):
            return change.document


async def _commit(
    scheduler: Scheduler,
    group: AffinityGroup,
    rules: ClusterRules,
    change: Change,
    caller: Caller,
    answer: Any,
) -> bool:
    """Whether it is done; False: somebody changed a group of the cluster meanwhile."""
    following = sql.next_groups(group.cluster_id, rules.revision)
    try:
        await scheduler.core.commit(following, change, caller=caller, answer=answer)
    except Stale:
        return False
    except Taken as taken:
        if taken.constraint != store.GROUP_NAME:
            raise
        raise conflict(
            f"its cluster has an affinity group named {group.name!r} already; choose another name",
            name=group.name,
        ) from None
    await scheduler.read_rules(group.cluster_id)
    return True


@part.answers(DELETE_AFFINITY_GROUP)
async def delete(scheduler: Scheduler, ask: DeleteById, caller: Caller) -> Done:
    while True:
        row = await GROUPS.get(scheduler.core.pool, ask.id)
        checks.revision(row.public, ask.if_revision, "affinity group")
        rules = await sql.rules_of(scheduler.core.pool, row.public.cluster_id)
        if rules is None:
            return await _delete_alone(scheduler, ask.id, caller)
        if await _commit(scheduler, row.public, rules, GROUPS.delete(row), caller, Done()):
            return Done()


async def _delete_alone(scheduler: Scheduler, group_id: str, caller: Caller | None) -> Done:
    """Of a cluster that is gone."""
    while (row := await GROUPS.find(scheduler.core.pool, group_id)) is not None:
        try:
            await scheduler.core.commit(GROUPS.delete(row), caller=caller, answer=Done())
        except Stale:
            continue
        break
    return Done()


@part.answers(GET_AFFINITY_GROUP)
async def get(scheduler: Scheduler, ask: GetById, caller: Caller) -> Any:
    return await GROUPS.raw(scheduler.core.pool, ask.id)


@part.answers(LIST_AFFINITY_GROUPS)
async def list_groups(scheduler: Scheduler, ask: ListQuery, caller: Caller) -> Any:
    """Also by a VM or host that the groups name."""
    wanted = dict(ask.filter)
    conditions, arguments = ["true"], list[str]()
    for name, column in (("vm_id", "vm_ids"), ("host_id", "host_ids")):
        if name in wanted:
            arguments.append(checks.object_id(wanted.pop(name), name.removesuffix("_id")))
            conditions.append(f"position(${len(arguments)} in {column}) > 0")
    ask = replace(ask, filter=wanted)
    return await page(scheduler.core.pool, GROUPS, ask, " and ".join(conditions), *arguments)


# Checks


def _check_fields(group: AffinityGroup) -> None:
    checks.name(group.name)
    checks.text(group.description, "description")
    checks.between(group.priority, 0, MAX_PRIORITY, "priority")
    for field_, noun, ids in (("vm_ids", "VM", group.vm_ids), ("host_ids", "host", group.host_ids)):
        if len(ids) > MAX_MEMBERS:
            raise invalid(
                f"an affinity group has at most {MAX_MEMBERS} {noun}s, not {len(ids)}", field=field_
            )
        if len(set(ids)) != len(ids):
            raise invalid(f"affinity group {group.name} names one of its {field_} twice", field=field_)
        for object_id in ids:
            checks.object_id(object_id, noun)
    bound = group.host_rule is AffinityRule.POSITIVE and group.host_enforcing
    if bound and group.vm_ids and not group.host_ids:
        raise invalid(
            f"affinity group {group.name} would let its VMs run on its hosts only, and has none: name its hosts, or "
            "disable its host rule",
            field="host_ids",
        )


async def _rules(scheduler: Scheduler, cluster_id: str, caller: Caller) -> ClusterRules:
    """The groups of a cluster as the database has them now. Raises Refused for a cluster that doesn't exist."""
    rules = await sql.rules_of(scheduler.core.pool, cluster_id)
    if rules is None:
        await scheduler.core.bus.ask(GET_CLUSTER, GetById(id=cluster_id), Caller(caller.principal))
        raise Refused(
            Kind.UNAVAILABLE, f"the scheduler has not heard of cluster {cluster_id} yet; try again shortly"
        )
    return rules


async def _check_members(
    scheduler: Scheduler,
    group: AffinityGroup,
    vm_ids: Iterable[str],
    host_ids: Iterable[str],
    caller: Caller,
) -> None:
    """Raises Refused(invalid) for a VM or host that doesn't exist, or is of another cluster."""
    asker = Caller(caller.principal)
    clusters: dict[str, str] = {}
    new = sorted(vm_ids)
    for start in range(0, len(new), ASKED_TOGETHER):
        some = tuple(new[start : start + ASKED_TOGETHER])
        answer = await scheduler.core.bus.ask(DESCRIBE_NEEDS, VmNeeds(vm_ids=some), asker)
        clusters = dict.fromkeys(some, "") | clusters | {v.need.vm_id: v.need.cluster_id for v in answer.vms}
    for vm_id, cluster_id in clusters.items():
        _check_member(group, "VM", vm_id, cluster_id)
    wanted = sorted(host_ids)
    known = await sql.host_clusters(scheduler.core.pool, wanted)
    for host_id in wanted:
        if host_id not in known:
            known[host_id] = await _cluster_of_host(scheduler, host_id, asker)
        _check_member(group, "host", host_id, known[host_id])


async def _cluster_of_host(scheduler: Scheduler, host_id: str, asker: Caller) -> str:
    """ "" when there is no such host."""
    try:
        return (await scheduler.core.bus.ask(GET_HOST, GetById(id=host_id), asker)).cluster_id
    except Refused as refused:
        if refused.kind is not Kind.NOT_FOUND:
            raise
        return ""


def _check_member(group: AffinityGroup, noun: str, object_id: str, cluster_id: str) -> None:
    if cluster_id != group.cluster_id:
        where = "of another cluster" if cluster_id else "not there"
        raise invalid(
            f"{noun} {object_id} can't be in affinity group {group.name}: it is {where}; a group has {noun}s of its "
            "own cluster",
            field=f"{noun.lower()}_ids",
            id=object_id,
        )


async def _check_rules(scheduler: Scheduler, group: AffinityGroup, rules: ClusterRules) -> None:
    """Raises Refused(conflict) for a contradiction that the group is part of, naming groups and VMs. One that was there
    before, since a host left, doesn't keep other groups from being changed."""
    others = [g for g in rules.groups if g.id != group.id]
    found = policy.conflicts([*others, Group.of(group)])
    if not found:
        return
    if policy.conflicts(others):
        found = [each for each in found if any(g.id == group.id for g in each.groups)]
    if found:
        named = await sql.seen_vms(scheduler.core.pool, _VM_ID.findall(found[0].why))
        why = _VM_ID.sub(lambda at: named[at[1]].name if at[1] in named else at[1], found[0].why)
        raise conflict(
            f"affinity group {group.name} would contradict what is there: {why}. Take a VM out of one of these groups, "
            "or make one of these rules a wish (not enforcing)",
            rule="contradiction",
            groups=[g.id for g in found[0].groups],
        )


# In step with what the groups name


@part.every(LOOK_SECONDS)
async def look(scheduler: Scheduler) -> None:
    """Which rules are broken now; a VM or host that was deleted leaves its groups, and groups leave with their cluster.
    Looks at groups whose VMs, hosts or neighbours changed since the last look."""
    pool, looked = scheduler.core.pool, scheduler.looked
    for group_id in await sql.groups_without_cluster(pool):
        await _delete_alone(scheduler, group_id, None)
    grouped = {cluster_id: rules for cluster_id, rules in scheduler.rules.items() if rules.groups}
    if not grouped:
        return
    now = await store.now(pool)
    heard = await sql.heard_since(pool, None if looked.at is None else looked.at - HEARD_MARGIN)
    hosts = await sql.hosts_by_cluster(pool)
    again: set[str] = set()
    for cluster_id, rules in grouped.items():
        own = hosts.get(cluster_id, {})
        changed = looked.clusters.get(cluster_id) != (rules.revision, own)
        looked.clusters[cluster_id] = (rules.revision, own)
        wanted = [g for g in rules.groups if changed or g.vms & heard or g.id in looked.again]
        again |= await _look_at(scheduler, wanted, rules, own)
    looked.at, looked.again = now, again


async def _look_at(
    scheduler: Scheduler, groups: Collection[Group], rules: ClusterRules, hosts: Mapping[str, str]
) -> set[str]:
    """The groups that have to be looked at again."""
    if not groups:
        return set()
    pool = scheduler.core.pool
    vms = await sql.seen_vms(pool, {vm_id for group in groups for vm_id in group.vms})
    gone = await sql.gone_hosts(pool)
    rows = await GROUPS.where(pool, "id = any($1::text[])", sorted(group.id for group in groups))
    again = set()
    for row in rows:
        new = as_it_is(row.public, vms, gone, rules, hosts)
        if new == row.public:
            continue
        changes = [GROUPS.update(row, new)]
        if (new.vm_ids, new.host_ids) != (row.public.vm_ids, row.public.host_ids):
            changes.append(sql.next_groups(new.cluster_id, rules.revision))
        try:
            await scheduler.core.commit(*changes)
        except Stale:
            again.add(row.id)
            continue
        log.info("affinity group %s: %s", new.name, "; ".join(new.broken) or "its rules are kept")
    return again


def as_it_is(
    group: AffinityGroup,
    vms: Mapping[str, SeenVm],
    gone: Collection[str],
    rules: ClusterRules,
    hosts: Mapping[str, str],
) -> AffinityGroup:
    """A group without members that are gone, and with what can be said of the others."""
    group = replace(
        group,
        vm_ids=tuple(v for v in group.vm_ids if v not in vms or not vms[v].deleted),
        host_ids=tuple(host_id for host_id in group.host_ids if host_id not in gone),
    )
    running = {
        vm.id: Runs(vm.name, vm.host_id)
        for vm in vms.values()
        if vm.host_id and not vm.deleted and vm.status not in ENDED_STATUSES
    }
    seen = Group.of(group)
    return replace(
        group,
        broken=policy.broken(seen, running, hosts),
        warnings=policy.warnings(seen, rules, hosts.keys()),
    )
