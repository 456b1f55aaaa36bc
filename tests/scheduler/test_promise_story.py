"""Promises on a real bus and database: starts that would break one are refused, also two that race, and what can't be
refused is announced."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import pytest
from msgspec.structs import replace

from services.scheduler.facts import list_again
from services.scheduler.promise_store import holds
from services.scheduler.state import Scheduler
from tests.scheduler.fleets import (
    GIB,
    MIB,
    OVERHEAD,
    RESERVE,
    cluster,
    host,
    hosts_known,
    placing,
    scheduler,
    until,
)
from tests.support.runtime import running
from tests.support.speaker import Speaker
from volery.contracts.base import Owner
from volery.contracts.cluster import CLUSTER_CHANGED, LIST_CLUSTERS, AdmissionControl, Cluster
from volery.contracts.errors import Kind, Refused
from volery.contracts.host import HOST_CHANGED, LIST_HOSTS, Host, HostStatus
from volery.contracts.ids import new_id
from volery.contracts.operation import ListQuery
from volery.contracts.promise import (
    ADMIT_CHANGE,
    LIST_PROMISES,
    LOSE_HOSTS,
    ClusterPromise,
    LoseHosts,
    PlannedChange,
)
from volery.contracts.protection import DESCRIBE_NEEDS, VmNeed, VmNeeds, VmNeedsAnswer
from volery.contracts.scheduling import PLACE, RELEASE_VM_CLAIMS, Need, Place, Placement, Purpose, ReleaseVm
from volery.contracts.vm import LIST_VMS, Vm
from volery.runtime.bus import Bus, Caller
from volery.runtime.programs import Settings

ROOM = RESERVE // MIB
"""What a host keeps for itself, in MiB."""


def owner_of(needs: dict[str, Need]) -> Speaker:
    """An inventory that says what VMs need."""

    async def told(_: Speaker, ask: VmNeeds, caller: Caller) -> VmNeedsAnswer:
        return VmNeedsAnswer(vms=tuple(VmNeed(need=needs[v]) for v in ask.vm_ids if v in needs))

    return Speaker(
        Owner.INVENTORY,
        [(LIST_CLUSTERS, Cluster), (LIST_HOSTS, Host), (LIST_VMS, Vm)],
        answers=[(DESCRIBE_NEEDS, told)],
    )


@asynccontextmanager
async def site(
    configured: Settings,
    c: Cluster,
    hosts: Sequence[Host],
    *,
    needs: dict[str, Need] | None = None,
    schedulers: int = 1,
    opened: list[Scheduler] | None = None,
) -> AsyncIterator[tuple[Speaker, Bus]]:
    """Schedulers that know a cluster and its hosts, and the inventory that told them."""
    owner = owner_of(needs if needs is not None else {})
    services = [scheduler(opened) for _ in range(schedulers)]
    async with running(configured, owner.service(), *services) as bus:
        await owner.says(CLUSTER_CHANGED, c)
        await owner.says(HOST_CHANGED, *hosts)
        await hosts_known(bus, len(hosts))
        yield owner, bus


def promising(failures: int = 1, **fields: Any) -> Cluster:
    made = {"reserve_host_failures": failures, "admission_control": AdmissionControl.ENFORCE}
    return cluster(**(made | fields))


def hosts_of(c: Cluster, *gib: int) -> list[Host]:
    """Hosts that may promise so many VMs of a GiB each, overhead included."""
    return [
        host(c.id, name=f"h{n}", memory_bytes=RESERVE + size * (GIB + OVERHEAD))
        for n, size in enumerate(gib, start=1)
    ]


def ha(c: Cluster, gib: int = 1, *, place: dict[str, Any] | None = None, **need: Any) -> Place:
    memory = gib * (GIB + OVERHEAD) - OVERHEAD
    return placing(c.id, place=place, **({"memory_bytes": memory, "high_availability": True} | need))


async def promise_of(bus: Bus) -> ClusterPromise | None:
    items = (await bus.ask(LIST_PROMISES, ListQuery())).items
    return msgspec.json.decode(items[0], type=ClusterPromise) if items else None


async def kept(bus: Bus, wanted: bool = True) -> ClusterPromise:
    async def so() -> ClusterPromise | None:
        found = await promise_of(bus)
        return found if found is not None and found.kept is wanted else None

    found: ClusterPromise = await until(so)
    return found


async def place(bus: Bus, ask: Place) -> Placement:
    return await bus.ask(PLACE, ask)


async def test_a_start_that_would_break_the_promise_is_refused_and_says_what_to_do(
    configured: Settings,
) -> None:
    c = promising()
    hosts = hosts_of(c, 4, 4)
    async with site(configured, c, hosts) as (_, bus):
        for number in range(4):
            placed = await place(bus, ha(c, name=f"vm{number}"))
            assert placed.claimed, placed.message
        plain = await place(bus, ha(c, name="plain", high_availability=False))
        assert not plain.host_id, "it would take the room of a protected one"
        refused = await place(bus, ha(c, name="fifth"))
        assert not refused.claimed
        assert "starting VM fifth on any of the 2 best hosts would break a promise" in refused.message
        assert "Cluster Default promises to survive the loss of 1 host, but if h" in refused.message
        assert "would have no place" in refused.message
        assert "admission_control to warn" in refused.message
        assert refused.excluded_by["admission"] == 2
        assert {v.rule for h in refused.hosts for v in h.verdicts} == {"admission"}
        said = await place(bus, ha(c, name="sixth", place={"dry_run": True}))
        assert not said.host_id
        restarted = await place(bus, ha(c, name="back", place={"purpose": Purpose.RESTART}))
        assert restarted.claimed, "a restart is never refused"
        broken = await kept(bus, False)
        assert broken.unprotected_vm_ids
        assert broken.breaking[0].vms[0].message


async def test_two_that_race_through_two_schedulers_dont_break_it_together(configured: Settings) -> None:
    """Room for one more, on either host; many ask at once."""
    c = promising()
    hosts = hosts_of(c, 6, 6)
    async with site(configured, c, hosts, schedulers=2) as (_, bus):
        placed = await asyncio.gather(*(place(bus, ha(c, name=f"vm{n}")) for n in range(16)))
        assert sum(p.claimed for p in placed) == 6
        promise = await kept(bus)
        assert promise.sets_tried == 2
        assert promise.exhaustive


async def test_of_two_that_race_for_the_last_place_one_wins_again_and_again(configured: Settings) -> None:
    c = promising()
    hosts = hosts_of(c, 2, 2)
    async with site(configured, c, hosts, schedulers=2) as (_, bus):
        on = [{"target_host_id": each.id} for each in hosts]
        assert (await place(bus, ha(c, name="first", place=on[0]))).claimed
        for number in range(12):
            asks = [ha(c, name=f"vm{number}", place=each) for each in on]
            placed = await asyncio.gather(*(place(bus, ask) for ask in asks))
            assert sum(p.claimed for p in placed) == 1, "each host had room for one, the promise didn't"
            for ask in asks:
                await bus.ask(RELEASE_VM_CLAIMS, ReleaseVm(vm_id=ask.need.vm_id), Caller("t", new_id()))


async def test_a_start_goes_to_a_host_on_which_the_promise_holds(configured: Settings) -> None:
    """The best host by weights isn't one of them."""
    c = promising()
    hosts = hosts_of(c, 3, 12, 4)
    async with site(configured, c, hosts) as (_, bus):
        big = await place(bus, ha(c, 4, name="big", place={"target_host_id": hosts[2].id}))
        assert big.claimed, big.message
        for n in range(2):
            placed = await place(bus, ha(c, 4, name=f"more{n}"))
            assert placed.host_id == hosts[2 if n else 1].id or not placed.claimed


async def test_maintenance_over_commit_and_edits_are_checked_and_hold_until_they_are_heard_of(
    configured: Settings,
) -> None:
    c = promising()
    hosts = hosts_of(c, 4, 4, 4)
    needs: dict[str, Need] = {}
    async with site(configured, c, hosts, needs=needs, schedulers=2) as (_, bus):
        asks = [ha(c, name=f"vm{n}") for n in range(4)]
        needs.update({ask.need.vm_id: ask.need for ask in asks})
        first = await place(bus, asks[0])
        for ask in asks[1:]:
            assert (await place(bus, ask)).claimed

        async def admit(**fields: Any) -> str:
            planned = PlannedChange(cluster_id=c.id, what="this", **fields)
            with pytest.raises(Refused) as refused:
                await bus.ask(ADMIT_CHANGE, planned, Caller("t", new_id()))
            assert refused.value.kind is Kind.CONFLICT
            return refused.value.message

        pinned = replace(asks[0].need, host_ids=(first.host_id,))
        assert "VM web" in await admit(vms=(replace(pinned, name="web", storage_host_ids=()),))
        assert "is pinned to" in await admit(vms=(pinned,))
        assert "this would break a promise" in await admit(memory_overcommit_percent=50)
        assert "if h" in await admit(reserve_host_failures=3)
        more = PlannedChange(cluster_id=c.id, what="this", reserve_host_failures=2)
        await bus.ask(ADMIT_CHANGE, more, Caller("t", new_id()))  # and for seconds it counts as made
        assert not (await place(bus, ha(c, name="late"))).claimed
        assert "this would break a promise" in await admit(leaving_host_ids=(hosts[0].id,))


async def test_what_is_planned_holds_though_the_cluster_is_heard_of_as_it_was(configured: Settings) -> None:
    """A leader lists everything again when it begins, and after facts were lost."""
    c, opened = promising(), list[Scheduler]()
    async with site(configured, c, hosts_of(c, 4, 4, 4), opened=opened) as (owner, bus):
        for n in range(4):
            assert (await place(bus, ha(c, name=f"vm{n}"))).claimed
        more = PlannedChange(cluster_id=c.id, what="this", reserve_host_failures=2)
        await bus.ask(ADMIT_CHANGE, more, Caller("t", new_id()))
        await list_again(opened[0], Owner.INVENTORY)
        assert not (await place(bus, ha(c, name="late"))).claimed
        await owner.says(CLUSTER_CHANGED, replace(c, revision=2, reserve_host_failures=2))

        async def done() -> bool:
            return not await holds(opened[0].core.pool, c.id)

        await until(done)


async def test_a_leaving_host_counts_as_gone_from_the_answer_on(configured: Settings) -> None:
    c = promising()
    hosts = hosts_of(c, 4, 4, 4)
    async with site(configured, c, hosts, schedulers=2) as (_, bus):
        for n in range(4):
            assert (await place(bus, ha(c, name=f"vm{n}"))).claimed
        leaves = PlannedChange(cluster_id=c.id, what="this", leaving_host_ids=(hosts[0].id,))
        await bus.ask(ADMIT_CHANGE, leaves, Caller("t", new_id()))
        assert not (await place(bus, ha(c, name="late"))).claimed


async def test_what_cant_be_refused_is_announced_and_clears_itself(configured: Settings) -> None:
    c = promising()
    hosts = hosts_of(c, 4, 4, 4)
    async with site(configured, c, hosts) as (owner, bus):
        for n in range(8):
            assert (await place(bus, ha(c, name=f"vm{n}"))).claimed
        await kept(bus)
        shrunk = replace(hosts[2], revision=2, status=HostStatus.NON_OPERATIONAL)
        await owner.says(HOST_CHANGED, shrunk)
        broken = await kept(bus, False)
        assert "if h" in broken.message
        assert broken.change
        loss = await bus.ask(LOSE_HOSTS, LoseHosts(id=c.id, host_ids=(hosts[0].id, hosts[1].id)))
        assert not loss.survived
        assert loss.vms[0].message.startswith("no host of cluster Default can take VM")
        await owner.says(HOST_CHANGED, replace(shrunk, revision=3, status=HostStatus.UP))
        assert (await kept(bus)).unprotected_vm_ids == ()
        loss = await bus.ask(LOSE_HOSTS, LoseHosts(id=c.id, host_ids=(hosts[0].id,)))
        assert loss.survived
        assert all(v.host_id and v.host_id != hosts[0].id for v in loss.vms)
        with pytest.raises(Refused, match="isn't one of cluster Default"):
            await bus.ask(LOSE_HOSTS, LoseHosts(id=c.id, host_ids=("nobody",)))
        await owner.says(CLUSTER_CHANGED, replace(c, revision=2, admission_control=AdmissionControl.OFF))

        async def gone() -> bool:
            return await promise_of(bus) is None

        await until(gone)


async def test_restarts_go_to_the_places_that_the_promise_was_made_for(configured: Settings) -> None:
    """By weights the small VM, brought back first, would take the only host that the large one fits on."""
    c = promising()
    hosts = hosts_of(c, 8, 6, 3)
    async with site(configured, c, hosts) as (owner, bus):
        on_first = {"target_host_id": hosts[0].id}
        small, large = ha(c, 2, name="small", place=on_first), ha(c, 6, name="large", place=on_first)
        assert (await place(bus, small)).claimed
        placed = await place(bus, large)
        assert placed.claimed, placed.message
        await kept(bus)
        await owner.says(HOST_CHANGED, replace(hosts[0], revision=2, status=HostStatus.DOWN))

        async def down() -> bool:
            return not (await place(bus, ha(c, 7, name="any", place={"dry_run": True}))).host_id

        await until(down)
        more = {loss.host_names: loss.vms[0].name for loss in (await kept(bus, False)).breaking}
        assert more == {("h2",): "large", ("h3",): "small"}, "whoever is lost next, too, has no place"
        again = [replace(ask, epoch=2, purpose=Purpose.RESTART, target_host_id="") for ask in (small, large)]
        assert (await place(bus, again[0])).host_id == hosts[2].id
        assert (await place(bus, again[1])).host_id == hosts[1].id


async def test_who_waits_for_its_restart_keeps_its_place_whatever_starts_meanwhile(
    configured: Settings,
) -> None:
    c = promising()
    hosts = hosts_of(c, 8, 6, 7, 9)
    async with site(configured, c, hosts) as (owner, bus):
        large = ha(c, 6, name="large", place={"target_host_id": hosts[0].id})
        assert (await place(bus, large)).claimed
        await kept(bus)
        await owner.says(HOST_CHANGED, replace(hosts[0], revision=2, status=HostStatus.DOWN))

        async def down() -> bool:
            ask = ha(c, name="any", place={"dry_run": True, "target_host_id": hosts[0].id})
            return not (await place(bus, ask)).host_id

        await until(down)
        small = await place(bus, ha(c, name="small", place={"target_host_id": hosts[2].id}))
        assert small.claimed, small.message
        again = replace(large, epoch=2, purpose=Purpose.RESTART, target_host_id="")
        assert (await place(bus, again)).host_id == hosts[1].id


async def test_who_was_placed_before_is_placed_again_and_its_refuge_is_another(configured: Settings) -> None:
    """What it asks and where it would go are known of it already, and both are written anew."""
    c = promising()
    async with site(configured, c, hosts_of(c, 2, 2, 2)) as (_, bus):
        first = ha(c)
        for epoch in (1, 2, 3):
            assert (await place(bus, replace(first, epoch=epoch))).claimed
        await kept(bus)


async def test_a_stop_makes_room_for_the_next_start(configured: Settings) -> None:
    c = promising()
    hosts = hosts_of(c, 2, 2)
    async with site(configured, c, hosts, schedulers=2) as (_, bus):
        first = ha(c, name="first")
        for ask in (first, ha(c, name="second")):
            assert (await place(bus, ask)).claimed
        assert not (await place(bus, ha(c, name="third"))).claimed
        await bus.ask(RELEASE_VM_CLAIMS, ReleaseVm(vm_id=first.need.vm_id), Caller("t", new_id()))
        assert (await place(bus, ha(c, name="third"))).claimed
