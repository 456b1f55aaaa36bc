"""Plans carried out by the real scheduler beside an inventory that migrates as it is told: taken up again after the leader
ended, raced for, taken over, stopped when things are no longer as they were planned."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
from msgspec.structs import replace

from services.scheduler import affinity_store, boards
from services.scheduler.state import Scheduler
from tests.scheduler.fleets import GIB, cluster, host, hosts_known, network_owner, scheduler, until, vm
from tests.scheduler.test_affinity_groups import need, one
from tests.support.runtime import running
from tests.support.speaker import Speaker
from volery.contracts.base import Owner
from volery.contracts.cluster import CLUSTER_CHANGED, GET_CLUSTER, LIST_CLUSTERS, Balance, Cluster, GetById
from volery.contracts.errors import Kind, Refused, conflict
from volery.contracts.host import GET_HOST, HOST_CHANGED, LIST_HOSTS, Host, HostStatus
from volery.contracts.ids import new_id
from volery.contracts.operation import Operation
from volery.contracts.plan import (
    CANCEL_PLAN,
    GET_PLAN,
    MAKE_PLAN,
    MakePlan,
    Plan,
    PlanKind,
    PlanState,
    PlanStepState,
)
from volery.contracts.protection import DESCRIBE_NEEDS, VmNeed, VmNeeds, VmNeedsAnswer
from volery.contracts.scheduling import (
    CONFIRM_CLAIM,
    PLACE,
    RELEASE_VM_CLAIMS,
    ClaimKey,
    Place,
    Purpose,
    ReleaseVm,
)
from volery.contracts.vm import LIST_VMS, MIGRATE_VM, VM_CHANGED, MigrateVm, Vm, VmStatus
from volery.runtime.bus import Bus, Caller
from volery.runtime.programs import Settings
from volery.runtime.run import Run


@dataclass
class Movers:
    """An inventory whose migrations take as long as `gate` is closed."""

    gate: asyncio.Event = field(default_factory=asyncio.Event)
    moved: list[tuple[str, str]] = field(default_factory=list)
    """VM and host, as often as a migration was carried out."""
    refuses: set[str] = field(default_factory=set)
    """Names of VMs that can't be migrated after all."""
    moving: set[str] = field(default_factory=set)
    placed: set[str] = field(default_factory=set)

    def speaker(self) -> Speaker:
        lists = [(LIST_CLUSTERS, Cluster), (LIST_HOSTS, Host), (LIST_VMS, Vm)]
        answers = [(GET_CLUSTER, one), (GET_HOST, one), (DESCRIBE_NEEDS, self.needs), (MIGRATE_VM, self.ask)]
        return Speaker(Owner.INVENTORY, lists, answers, [("vm.migrate", self.migrate)])

    async def needs(self, owner: Speaker, ask: VmNeeds, caller: Caller) -> VmNeedsAnswer:
        found = [v for v in owner.objects.values() if isinstance(v, Vm) and v.id in ask.vm_ids]
        told = [VmNeed(need=need(v), host_id=v.host_id, settled=v.id not in self.moving) for v in found]
        return VmNeedsAnswer(vms=tuple(told))

    async def ask(self, owner: Speaker, ask: MigrateVm, caller: Caller) -> Operation:
        assert owner.core is not None
        v = owner.objects[ask.id]
        assert isinstance(v, Vm)
        if v.name in self.refuses:
            raise conflict(f"VM {v.name} is stubborn")
        self.moving.add(ask.id)
        op, begun = owner.core.operations.begin(
            "vm.migrate", object_kind="vm", object_id=ask.id, question=ask, caller=caller
        )
        await owner.core.commit(begun, caller=caller, answer=op)
        return op

    async def migrate(self, owner: Speaker, run: Run) -> None:
        assert owner.core is not None
        ask = run.input(MigrateVm)
        v = owner.objects[ask.id]
        assert isinstance(v, Vm)
        question = Place(
            need=need(v), epoch=v.epoch + 1, purpose=Purpose.MIGRATE, excluded_host_ids=(v.host_id,),
            target_host_id=ask.host_id,
        )  # fmt: skip
        placed = await owner.core.bus.ask(PLACE, question, run.caller_for("place"))
        assert placed.host_id == ask.host_id, placed.message
        self.placed.add(ask.id)
        await self.gate.wait()
        self.moved.append((ask.id, ask.host_id))
        new = replace(v, revision=v.revision + 1, host_id=ask.host_id, epoch=v.epoch + 1)
        keep = ReleaseVm(vm_id=v.id, keep_epochs=(new.epoch,))
        await owner.core.bus.ask(CONFIRM_CLAIM, ClaimKey(vm_id=v.id, epoch=new.epoch), run.caller_for("sure"))
        await owner.core.bus.ask(RELEASE_VM_CLAIMS, keep, run.caller_for("rest"))
        self.moving.discard(ask.id)
        self.placed.discard(ask.id)
        await owner.says(VM_CHANGED, new)


@dataclass
class Site:
    bus: Bus
    movers: Movers
    owner: Speaker
    cluster: Cluster
    hosts: list[Host]
    vms: list[Vm]
    schedulers: list[Scheduler]

    async def make(self, kind: PlanKind = PlanKind.BALANCE, *hosts: Host, **fields: Any) -> Operation:
        ask = MakePlan(cluster_id=self.cluster.id, kind=kind, host_ids=tuple(h.id for h in hosts), **fields)
        return await self.bus.ask(MAKE_PLAN, ask, Caller("user:ann", new_id(), "x"))

    async def plan(self, op: Operation) -> Plan:
        return await self.bus.ask(GET_PLAN, GetById(id=op.object_id))

    async def becomes(self, op: Operation, state: PlanState) -> Plan:
        async def is_it() -> Plan | None:
            plan = await self.plan(op)
            return plan if plan.state is state else None

        found: Plan = await until(is_it, 20)
        return found

    async def begun(self, count: int) -> None:
        """So many migrations are under way."""

        async def enough() -> bool:
            return len(self.movers.placed) == count  # what a host's loss would refuse has been asked

        await until(enough)

    def at(self) -> list[str]:
        objects: dict[str, Any] = self.owner.objects  # of every noun; these are VMs
        return [objects[v.id].host_id for v in self.vms]


def by_hand(configured: Settings) -> Settings:
    return dataclasses.replace(configured, environ={"VOLERY_SCHEDULER_PLAN_SECONDS": "0"})


@asynccontextmanager
async def site(
    configured: Settings, *, hosts: int = 3, vms: int = 9, replicas: int = 1
) -> AsyncIterator[Site]:
    """All VMs run on the first host, in a cluster that wants as many on each."""
    movers = Movers()
    owner, c = movers.speaker(), cluster(balance=Balance.VM_EVENLY_DISTRIBUTED, cpu_overcommit_ratio=100.0)
    made = [host(c.id, name=f"h{n}", memory_bytes=64 * GIB) for n in range(hosts)]
    ids = sorted(new_id() for _ in range(vms))
    machines = [
        vm(c.id, id=ids[n], name=f"vm{n}", status=VmStatus.UP, host_id=made[0].id, epoch=1, vcpus=1)
        for n in range(vms)
    ]
    async with running(by_hand(configured), owner.service(), network_owner().service()) as bus:
        opened: list[Scheduler] = []
        async with running(by_hand(configured), *(scheduler(opened) for _ in range(replicas))):
            await owner.says(CLUSTER_CHANGED, c)
            await owner.says(HOST_CHANGED, *made)
            await hosts_known(bus, hosts)
            for v in machines:
                asked = Place(need=need(v), epoch=1, target_host_id=made[0].id)
                assert (await bus.ask(PLACE, asked)).host_id
                await bus.ask(CONFIRM_CLAIM, ClaimKey(vm_id=v.id, epoch=1))
            await owner.says(VM_CHANGED, *machines)

            async def known() -> bool:
                found = await affinity_store.seen_vms(opened[0].core.pool, ids)
                return len(found) == vms

            await until(known)
            yield Site(bus, movers, owner, c, made, machines, opened)


async def test_a_plan_is_taken_up_again_and_no_vm_moves_twice(configured: Settings) -> None:
    async with site(configured) as at:
        op = await at.make()
        planned = await at.plan(op)
        assert len(planned.steps) == 6
        await at.begun(2)
        held = at
    # The leader ended in the middle, with its inventory; both come back.
    movers = held.movers
    owner = movers.speaker()
    owner.objects = held.owner.objects
    movers.gate.set()
    async with running(by_hand(configured), owner.service(), network_owner().service()) as bus:
        at = dataclasses.replace(held, bus=bus, owner=owner)
        async with running(by_hand(configured), scheduler()):
            plan = await at.becomes(op, PlanState.SUCCEEDED)
    assert {step.state for step in plan.steps} == {PlanStepState.DONE}
    assert sorted(movers.moved) == sorted((s.vm_id, s.target_host_id) for s in planned.steps)
    assert sorted(at.at().count(h.id) for h in at.hosts) == [3, 3, 3]


async def test_of_plans_that_race_for_the_same_hosts_one_is_begun(configured: Settings) -> None:
    async with site(configured, replicas=2) as at:
        answers = await asyncio.gather(*(at.make() for _ in range(12)), return_exceptions=True)
        begun = [a for a in answers if isinstance(a, Operation)]
        refused = [a for a in answers if isinstance(a, Refused)]
        assert (len(begun), len(refused)) == (1, 11)
        assert {r.kind for r in refused} == {Kind.CONFLICT}
        assert any(begun[0].object_id in r.message for r in refused)
        at.movers.gate.set()
        plan = await at.becomes(begun[0], PlanState.SUCCEEDED)
        assert len(at.movers.moved) == len(plan.steps)
        # What it held is free again.
        again = await at.make()
        assert (await at.becomes(again, PlanState.SUCCEEDED)).steps == ()


async def test_emptying_a_host_goes_before_a_balance_and_not_the_other_way_round(
    configured: Settings,
) -> None:
    async with site(configured) as at:
        balance = await at.make()
        await at.begun(2)
        emptied = await at.make(PlanKind.EVACUATION, at.hosts[0])
        stopped = await at.becomes(balance, PlanState.STOPPED)
        assert "goes before it (evacuation)" in stopped.reason
        with pytest.raises(Refused) as refused:
            await at.make()
        assert emptied.object_id in refused.value.message
        at.movers.gate.set()
        await at.becomes(emptied, PlanState.SUCCEEDED)

        async def empty() -> bool:
            return at.hosts[0].id not in at.at()

        await until(empty)
        assert len(at.movers.moved) == len({vm_id for vm_id, _ in at.movers.moved}) == 9


async def test_a_plan_stops_when_a_host_of_its_cluster_is_lost(configured: Settings) -> None:
    async with site(configured, hosts=4) as at:
        op = await at.make()
        plan = await at.plan(op)
        await at.begun(2)
        lost = replace(at.hosts[3], revision=2, status=HostStatus.NON_RESPONSIVE)
        await at.owner.says(HOST_CHANGED, lost)

        async def heard() -> bool:
            fleet = at.schedulers[0].fleet
            return fleet.status_of(fleet.rows[lost.id]) == HostStatus.NON_RESPONSIVE

        await until(heard)
        at.movers.gate.set()
        stopped = await at.becomes(op, PlanState.STOPPED)
        assert "host h3 is no longer up" in stopped.reason
        assert len(at.movers.moved) == 2 < len(plan.steps)


async def test_a_plan_goes_on_when_the_host_that_it_empties_goes_into_maintenance(
    configured: Settings,
) -> None:
    """So also for the maintenance itself, which the scheduler may hear of only after the plan began."""
    async with site(configured, vms=3) as at:
        op = await at.make(PlanKind.EVACUATION, at.hosts[0])
        await at.begun(2)
        cleared = replace(at.hosts[0], revision=2, status=HostStatus.PREPARING_FOR_MAINTENANCE)
        await at.owner.says(HOST_CHANGED, cleared)

        async def heard() -> bool:
            return all(boards.is_cleared(each, cleared.id) for each in at.schedulers)

        await until(heard)
        at.movers.gate.set()
        plan = await at.becomes(op, PlanState.SUCCEEDED)
        assert {step.wave for step in plan.steps} == {0, 1}
        assert cleared.id not in at.at()


async def test_a_plan_stops_when_a_vm_is_not_where_it_was(configured: Settings) -> None:
    async with site(configured) as at:
        op = await at.make()
        last = (await at.plan(op)).steps[-1]
        await at.begun(2)
        v = at.owner.objects[last.vm_id]
        assert isinstance(v, Vm)
        await at.owner.says(VM_CHANGED, replace(v, revision=9, status=VmStatus.DOWN, host_id=""))
        at.movers.gate.set()
        stopped = await at.becomes(op, PlanState.STOPPED)
        assert f"VM {last.vm_name} no longer runs settled on h0" in stopped.reason
        assert last.vm_id not in {vm_id for vm_id, _ in at.movers.moved}


async def test_a_move_that_is_refused_stops_the_plan_with_its_sentence(configured: Settings) -> None:
    async with site(configured) as at:
        at.movers.gate.set()
        at.movers.refuses = {v.name for v in at.vms}
        stopped = await at.becomes(await at.make(), PlanState.STOPPED)
        assert stopped.reason.endswith("is stubborn")
        assert PlanStepState.FAILED in {s.state for s in stopped.steps}
        assert at.movers.moved == []


async def test_what_is_on_its_way_arrives_when_a_plan_is_cancelled(configured: Settings) -> None:
    async with site(configured) as at:
        op = await at.make()
        await at.begun(2)
        await at.bus.ask(CANCEL_PLAN, GetById(id=op.object_id), Caller("user:ann", new_id(), "x"))
        at.movers.gate.set()
        await at.becomes(op, PlanState.CANCELLED)
        assert len(at.movers.moved) == 2


async def test_what_makes_no_sense_is_refused_with_what_would(configured: Settings) -> None:
    async with site(configured, hosts=1, vms=1) as at:
        for kind, hosts, words in (
            (PlanKind.EVACUATION, (), "names the hosts that it empties"),
            (PlanKind.BALANCE, (at.hosts[0],), "host_ids are named for evacuation or upgrade or saving only"),
            (PlanKind.EVACUATION, (replace(at.hosts[0], id=new_id()),), "is none of cluster"),
        ):
            with pytest.raises(Refused) as refused:
                await at.make(kind, *hosts)
            assert words in refused.value.message
        shown = await at.make(PlanKind.EVACUATION, at.hosts[0], dry_run=True)
        (unplaced,) = shown.result["plan"]["unplaced"]
        assert unplaced["reason"] == "none of the 0 other hosts suits VM vm0 by its filters"
