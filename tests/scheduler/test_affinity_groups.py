"""Affinity groups on a real bus and database: made and refused, kept by racing placements, and told when broken."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import msgspec
import pytest
from msgspec.structs import replace

from services.scheduler import affinity, affinity_store
from services.scheduler.policies.bound import FREE
from services.scheduler.state import Scheduler
from tests.scheduler.fleets import (
    GIB,
    MIB,
    OVERHEAD,
    RESERVE,
    cluster,
    host,
    hosts_known,
    network_owner,
    scheduler,
    until,
    vm,
)
from tests.support.runtime import running
from tests.support.speaker import Speaker
from volery.contracts.affinity_group import (
    AFFINITY_GROUP_CHANGED,
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
from volery.contracts.base import Done, Owner
from volery.contracts.cluster import (
    CLUSTER_CHANGED,
    CLUSTER_DELETED,
    GET_CLUSTER,
    LIST_CLUSTERS,
    Cluster,
    DeleteById,
    GetById,
)
from volery.contracts.errors import Kind, Refused, not_found
from volery.contracts.host import GET_HOST, HOST_CHANGED, HOST_DELETED, LIST_HOSTS, Host, HostStatus
from volery.contracts.ids import new_id
from volery.contracts.operation import ListQuery
from volery.contracts.protection import DESCRIBE_NEEDS, VmNeed, VmNeeds, VmNeedsAnswer
from volery.contracts.scheduling import (
    FIND_ROOM,
    PLACE,
    RELEASE_CLAIM,
    ClaimKey,
    FindRoom,
    Need,
    Place,
    Purpose,
    RoomFor,
)
from volery.contracts.vm import LIST_VMS, VM_CHANGED, VM_DELETED, Vm, VmStatus
from volery.runtime.bus import Bus, Caller
from volery.runtime.programs import Settings
from volery.runtime.tables import Stale

TOGETHER: dict[str, Any] = {"vm_rule": AffinityRule.POSITIVE}
APART: dict[str, Any] = {"vm_rule": AffinityRule.NEGATIVE}
CALLER = Caller("user:ann")


async def one(speaker: Speaker, ask: GetById, caller: Caller) -> Any:
    if ask.id not in speaker.objects:
        raise not_found("object", ask.id)
    return speaker.objects[ask.id]


async def needs(speaker: Speaker, ask: VmNeeds, caller: Caller) -> VmNeedsAnswer:
    found = [v for v in speaker.objects.values() if isinstance(v, Vm) and v.id in ask.vm_ids]
    return VmNeedsAnswer(vms=tuple(VmNeed(need=need(v)) for v in found))


def need(v: Vm) -> Need:
    return Need(vm_id=v.id, cluster_id=v.cluster_id, name=v.name, memory_bytes=v.memory_bytes, vcpus=v.vcpus)


@dataclass
class Place_:
    """A cluster with hosts and VMs, and schedulers that place them."""

    bus: Bus
    owner: Speaker
    cluster: Cluster
    hosts: list[Host]
    vms: list[Vm]
    schedulers: list[Scheduler]

    async def group(self, name: str, *vms: Vm, hosts: tuple[Host, ...] = (), **fields: Any) -> AffinityGroup:
        ask = CreateAffinityGroup(
            name=name,
            cluster_id=self.cluster.id,
            vm_ids=tuple(v.id for v in vms),
            host_ids=tuple(h.id for h in hosts),
            **fields,
        )
        return await self.bus.ask(CREATE_AFFINITY_GROUP, ask, Caller("user:ann", new_id(), "x"))

    async def place(self, v: Vm, epoch: int = 1, **fields: Any) -> Any:
        return await self.bus.ask(PLACE, Place(need=need(v), epoch=epoch, **fields))

    async def get(self, group: AffinityGroup) -> AffinityGroup:
        return await self.bus.ask(GET_AFFINITY_GROUP, GetById(id=group.id))

    async def says(self, v: Vm, **fields: Any) -> Vm:
        """What inventory says next of a VM."""
        new = replace(v, revision=v.revision + 1, **fields)
        await self.owner.says(VM_CHANGED, new)
        return new

    def name_of(self, host_id: str) -> str:
        return next((h.name for h in self.hosts if h.id == host_id), "")

    async def heard(self, *vms: Vm) -> None:
        pool = self.schedulers[0].core.pool

        async def known() -> bool:
            found = await affinity_store.seen_vms(pool, [v.id for v in vms])
            return len(found) == len(vms)

        await until(known)


@asynccontextmanager
async def site(
    configured: Settings, hosts: int, vms: int, *, replicas: int = 1, **sizes: Any
) -> AsyncIterator[Place_]:
    answers = [(GET_CLUSTER, one), (GET_HOST, one), (DESCRIBE_NEEDS, needs)]
    lists = [(LIST_CLUSTERS, Cluster), (LIST_HOSTS, Host), (LIST_VMS, Vm)]
    owner, c = Speaker(Owner.INVENTORY, lists, answers), cluster(cpu_overcommit_ratio=1000.0)
    made = [host(c.id, name=f"h{n}", **sizes) for n in range(hosts)]
    ids = sorted(new_id() for _ in range(vms))
    machines = [vm(c.id, id=ids[n], name=f"vm{n}", status=VmStatus.DOWN) for n in range(vms)]
    opened: list[Scheduler] = []
    programs = [scheduler(opened) for _ in range(replicas)]
    async with running(configured, owner.service(), network_owner().service(), *programs) as bus:
        await owner.says(CLUSTER_CHANGED, c)
        await owner.says(HOST_CHANGED, *made)
        await owner.says(VM_CHANGED, *machines)
        await hosts_known(bus, hosts)
        at = Place_(bus, owner, c, made, machines, opened)
        await at.heard(*machines)
        yield at


async def test_a_group_is_made_changed_listed_and_deleted(configured: Settings) -> None:
    async with site(configured, 2, 2) as at:
        a, b = at.vms
        made = await at.group("web", a, hosts=(at.hosts[0],), **TOGETHER, host_rule=AffinityRule.NEGATIVE)
        assert (made.revision, made.vm_ids, made.priority, made.broken) == (1, (a.id,), 1.0, ())
        assert await at.get(made) == made
        ask = UpdateAffinityGroup(id=made.id, if_revision=1, vm_ids=(a.id, b.id), description="two")
        new = await at.bus.ask(UPDATE_AFFINITY_GROUP, ask, CALLER)
        assert (new.revision, new.vm_ids, new.description) == (2, (a.id, b.id), "two")
        assert new.vm_rule is AffinityRule.POSITIVE
        with pytest.raises(Refused) as refused:
            await at.bus.ask(UPDATE_AFFINITY_GROUP, ask, CALLER)
        assert refused.value.kind is Kind.STALE
        other = await at.group("other", b)

        async def listed(**filter_: str) -> list[str]:
            page = await at.bus.ask(LIST_AFFINITY_GROUPS, ListQuery(filter=filter_, order_by="name"))
            return [msgspec.json.decode(item, type=AffinityGroup).name for item in page.items]

        assert await listed(cluster_id=at.cluster.id) == ["other", "web"]
        assert await listed(vm_id=a.id) == ["web"]
        assert await listed(vm_id=b.id) == ["other", "web"]
        assert await listed(host_id=at.hosts[0].id, vm_id=a.id) == ["web"]
        assert await listed(host_id=at.hosts[1].id) == []
        assert await at.bus.ask(DELETE_AFFINITY_GROUP, DeleteById(id=other.id), CALLER) == Done()
        assert await listed(vm_id=b.id) == ["web"]
        with pytest.raises(Refused, match="there is no affinity group"):
            await at.get(other)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no name": ({"name": ""}, "1 to 255 characters"),
    "priority": ({"priority": -1.0}, "priority is 0 to 1000"),
    "a VM twice": ({"vm_ids": ("V", "V")}, "names one of its vm_ids twice"),
    "no id": ({"vm_ids": ("web",)}, "is not the id of a VM"),
    "no such VM": ({"vm_ids": ("?",)}, "it is not there"),
    "a VM of another cluster": ({"vm_ids": ("S",)}, "it is of another cluster"),
    "no such host": ({"host_ids": ("?",)}, "it is not there"),
    "a host of another cluster": ({"host_ids": ("T",)}, "it is of another cluster"),
    "no such cluster": ({"cluster_id": "?"}, "there is no"),
    "its hosts only, and none": ({"vm_ids": ("V",), "host_rule": "positive"}, "and has none"),
    "a name that is taken": ({"name": "taken"}, "named 'taken' already"),
}


async def test_what_can_not_be_is_refused_and_changes_nothing(configured: Settings) -> None:
    async with site(configured, 1, 1) as at:
        await at.group("taken")
        stranger, elsewhere = vm(new_id()), host(new_id(), name="far")
        at.owner.knows(stranger, elsewhere)
        ids = {"V": at.vms[0].id, "S": stranger.id, "T": elsewhere.id}
        for case, (fields, words) in BAD.items():
            given = {
                name: tuple(new_id() if v == "?" else ids.get(v, v) for v in value)
                if isinstance(value, tuple)
                else new_id()
                if value == "?"
                else value
                for name, value in fields.items()
            }
            ask = CreateAffinityGroup(**({"name": "x", "cluster_id": at.cluster.id} | given))
            with pytest.raises(Refused) as refused:
                await at.bus.ask(CREATE_AFFINITY_GROUP, ask, CALLER)
            assert words in refused.value.message, case
        page = await at.bus.ask(LIST_AFFINITY_GROUPS, ListQuery())
        assert len(page.items) == 1


async def test_contradictions_are_refused_by_name_also_when_two_are_written_at_once(
    configured: Settings,
) -> None:
    async with site(configured, 2, 3, replicas=2) as at:
        a, b, c = at.vms
        await at.group("web", a, b, **TOGETHER)
        await at.group("app", b, c, **TOGETHER)
        with pytest.raises(Refused) as refused:
            await at.group("spread", a, c, **APART)
        assert refused.value.kind is Kind.CONFLICT
        assert "VM vm0 must be on one host with VM vm2 and on another" in refused.value.message
        assert "group web with VM vm1, group app with VM vm2; group spread keeps the two apart" in (
            refused.value.message
        )
        wish = await at.group("spread", a, c, **APART, vm_enforcing=False)
        with pytest.raises(Refused, match="would contradict"):
            await at.bus.ask(
                UPDATE_AFFINITY_GROUP, UpdateAffinityGroup(id=wish.id, vm_enforcing=True), CALLER
            )
        licence = {"host_rule": AffinityRule.POSITIVE}
        both = await asyncio.gather(
            at.group("left", a, hosts=(at.hosts[0],), **licence),
            at.group("right", c, hosts=(at.hosts[1],), **licence),
            return_exceptions=True,
        )
        (lost,) = [each for each in both if isinstance(each, Refused)]
        assert "no host is left for VM" in lost.message


async def test_racing_placements_never_share_a_host_nor_split(configured: Settings) -> None:
    async with site(configured, 12, 50, replicas=2, cpus=64, memory_bytes=200 * GIB) as at:
        apart, one_host, loose = at.vms[:20], at.vms[20:40], at.vms[40:]
        await at.group("spread", *apart, **APART)
        await at.group("pair", *one_host[:12], **TOGETHER)
        await at.group("more", *one_host[11:], **TOGETHER)
        placed = await asyncio.gather(*(at.place(v) for v in at.vms))
        by_vm = {p.vm_id: p.host_id for p in placed}
        used = [by_vm[v.id] for v in apart if by_vm[v.id]]
        assert len(used) == len(set(used)) == 12
        assert len({by_vm[v.id] for v in one_host}) == 1
        assert all(by_vm[v.id] for v in (*one_host, *loose))
        refused = next(p for p in placed if not p.host_id)
        assert "affinity group spread keeps VM" in refused.message


async def test_a_group_made_a_moment_ago_binds_every_replica(configured: Settings) -> None:
    """Replicas hear of it by a notification; a placement that comes before that must not miss it."""
    async with site(configured, 4, 40, replicas=2, cpus=64, memory_bytes=200 * GIB) as at:
        for n in range(0, 40, 4):
            some = at.vms[n : n + 4]
            await at.group(f"g{n}", *some, **APART)
            placed = await asyncio.gather(*(at.place(v) for v in some))
            assert len({p.host_id for p in placed}) == 4


async def test_what_was_decided_under_older_groups_is_never_committed(configured: Settings) -> None:
    async with site(configured, 2, 2) as at:
        (mine,), (a, b) = at.schedulers, at.vms
        found, guards = await affinity.bind(mine, need(a))
        assert found == FREE
        await mine.core.commit(*guards)
        await at.group("spread", a, b, **APART)
        with pytest.raises(Stale):
            await mine.core.commit(*guards)

        unheard = cluster()
        found, guards = await affinity.bind(mine, replace(need(a), cluster_id=unheard.id))
        assert found == FREE
        await mine.core.commit(*guards)
        await at.owner.says(CLUSTER_CHANGED, unheard)

        async def known() -> bool:
            return await affinity_store.rules_of(mine.core.pool, unheard.id) is not None

        await until(known)
        with pytest.raises(Stale):
            await mine.core.commit(*guards)


async def test_what_was_claimed_on_another_replica_is_counted_at_commit(configured: Settings) -> None:
    """A replica whose reading is overtaken loses, and reads again."""
    async with site(configured, 2, 2, replicas=2) as at:
        a, b = at.vms
        group = await at.group("spread", a, b, **APART)
        mine = at.schedulers[0]
        await mine.read_rules(at.cluster.id)
        seen = await affinity_store.placements(mine.core.pool, [group.id])
        placed = await at.place(a)
        after = await affinity_store.placements(mine.core.pool, [group.id])
        assert after[group.id] == seen[group.id] + 1
        other = await at.place(b)
        assert {placed.host_id, other.host_id} == {h.id for h in at.hosts}


async def test_migration_keeps_the_rules_and_both_ends_of_one_count(configured: Settings) -> None:
    async with site(configured, 3, 4) as at:
        a, b, c, d = at.vms
        await at.group("spread", a, b, **APART)
        await at.group("pair", c, d, **TOGETHER)
        first = (await at.place(a)).host_id
        a = await at.says(a, status=VmStatus.UP, host_id=first, epoch=1)
        second = (await at.place(a, 2, purpose=Purpose.MIGRATE, excluded_host_ids=(first,))).host_id
        third = (await at.place(b)).host_id
        assert len({first, second, third}) == 3

        home = (await at.place(c)).host_id
        assert (await at.place(d)).host_id == home
        moved = await at.place(d, 2, purpose=Purpose.MIGRATE, excluded_host_ids=(home,))
        assert moved.host_id == ""
        assert "affinity group pair keeps VM vm3 on one host with VM vm2" in moved.message
        await at.bus.ask(RELEASE_CLAIM, ClaimKey(vm_id=d.id, epoch=1))
        await at.says(c, status=VmStatus.MIGRATING, host_id=home, epoch=1)
        away = await at.place(c, 2, purpose=Purpose.MIGRATE, excluded_host_ids=(home,))
        assert away.host_id not in ("", home)
        waits = await at.place(d, 3)
        assert "which is moving" in waits.message


async def test_after_its_hosts_death_a_group_restarts_on_one_host_or_is_named(configured: Settings) -> None:
    two = RESERVE + 2 * (GIB + OVERHEAD) + 100 * MIB
    async with site(configured, 3, 3, memory_bytes=two) as at:
        a, b, other = at.vms
        await at.group("pair", a, b, **TOGETHER)
        dead = (await at.place(a)).host_id
        assert (await at.place(b)).host_id == dead
        half = (await at.place(other)).host_id  # leaves room for one VM there
        a, b = [await at.says(v, status=VmStatus.UP, host_id=dead, epoch=1) for v in (a, b)]
        gone = next(h for h in at.hosts if h.id == dead)
        await at.owner.says(HOST_CHANGED, replace(gone, revision=2, status=HostStatus.DOWN))
        asks = (RoomFor(need=need(a), excluded_host_ids=(dead,)),)
        (room,) = (await at.bus.ask(FIND_ROOM, FindRoom(asks=asks))).rooms
        assert room.fitting == 2
        a, b = [await at.says(v, status=VmStatus.DOWN, host_id="", status_reason="host_died") for v in (a, b)]

        async def both_ended() -> bool:
            found = await affinity_store.seen_vms(at.schedulers[0].core.pool, [a.id, b.id])
            fleets = [scheduler.fleet for scheduler in at.schedulers]
            known = all(fleet.status_of(fleet.rows[dead]) == HostStatus.DOWN for fleet in fleets)
            return known and all(v.status == VmStatus.DOWN for v in found.values())

        await until(both_ended)
        back = await asyncio.gather(*(at.place(v, 2, purpose=Purpose.RESTART) for v in (a, b)))
        (free,) = {h.id for h in at.hosts} - {dead, half}
        assert [p.host_id for p in back] == [free, free], [p.message for p in back]


async def test_room_for_one_only_names_the_other(configured: Settings) -> None:
    one_only = RESERVE + GIB + OVERHEAD + 100 * MIB
    async with site(configured, 2, 2, memory_bytes=one_only) as at:
        a, b = at.vms
        await at.group("pair", a, b, **TOGETHER)
        first = at.name_of((await at.place(a)).host_id)
        second = await at.place(b)
        assert second.host_id == ""
        assert f"{first}: {first} has" in second.message  # not enough memory
        assert f"keeps VM vm1 on one host with VM vm0, which is on {first}" in second.message


async def test_what_is_broken_is_told_and_gone_members_leave(configured: Settings) -> None:
    async with site(configured, 2, 3) as at:
        a, b, c = at.vms
        told: list[list[str]] = []

        async def hear(message: Any) -> None:
            told.append(msgspec.json.decode(message.data)["data"]["broken"])

        h0, h1 = at.hosts
        await at.bus.client.subscribe(AFFINITY_GROUP_CHANGED.subject.replace("{id}", "*"), cb=hear)
        a, b, c = [
            await at.says(v, status=VmStatus.UP, host_id=at_.id, epoch=1)
            for v, at_ in ((a, h0), (b, h0), (c, h1))
        ]
        spread = await at.group("spread", a, b, c, **APART)

        async def is_(*sentences: str) -> bool:
            return (await at.get(spread)).broken == sentences

        await until(lambda: is_("VMs vm0, vm1 run together on h0"))
        assert (await at.get(spread)).warnings[0].startswith("it keeps 3 VMs apart, and its cluster has 2")
        b = await at.says(b, status=VmStatus.DOWN, host_id="")
        await until(is_)

        async def heard() -> bool:
            turns = [t for n, t in enumerate(told) if n == 0 or t != told[n - 1]]
            return turns == [[], ["VMs vm0, vm1 run together on h0"], []]

        await until(heard)  # facts come a moment after what they tell

        bound = await at.group("bound", a, b, hosts=(h0, h1), host_rule=AffinityRule.POSITIVE)
        await at.owner.says(VM_DELETED, replace(b, revision=b.revision + 1))
        await at.owner.says(HOST_DELETED, replace(h1, revision=2))

        async def left() -> bool:
            now = [await at.get(g) for g in (spread, bound)]
            return [g.vm_ids for g in now] == [(a.id, c.id), (a.id,)] and now[1].host_ids == (h0.id,)

        await until(left)
        await at.owner.says(CLUSTER_DELETED, replace(at.cluster, revision=2))

        async def none() -> bool:
            return not (await at.bus.ask(LIST_AFFINITY_GROUPS, ListQuery())).items

        await until(none)
