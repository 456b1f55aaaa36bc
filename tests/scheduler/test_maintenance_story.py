"""A host goes into maintenance by a plan: the gateway, inventory and scheduler are real, hosts' agents are scripted."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx

from services.inventory.service import service as inventory
from services.scheduler.state import Scheduler as State
from tests.api_gateway.scripted import decoded
from tests.inventory.scripted_scheduler import Scheduler
from tests.inventory.world import World, found_cluster, until
from tests.scheduler.fleets import hosts_known, network_owner, scheduler
from tests.scheduler.test_affinity_story import desk, ends
from tests.scheduler.test_plan_story import planning, started, where
from tests.support.bell import Bell
from tests.support.runtime import running
from volery.contracts.base import Owner
from volery.contracts.domain_orders import MIGRATE_DOMAIN
from volery.contracts.host import MAINTAIN_HOST, HostStatus, MaintainHost
from volery.contracts.operation import (
    CANCEL_OPERATION,
    CancelOperation,
    ListQuery,
    OperationState,
)
from volery.contracts.plan import LIST_PLANS
from volery.runtime.database import open_direct
from volery.runtime.programs import Settings

GIB = 1 << 30


async def runs(http: httpx.AsyncClient, world: World, host: str, name: str, gib: int, **fields: Any) -> str:
    assert world.cluster is not None
    body = {"name": name, "cluster_id": world.cluster.id, "memory_bytes": gib * GIB, **fields}
    vm_id: str = (await ends(http, await http.post("/vms", json=body)))["object_id"]
    op = await ends(http, await http.post(f"/vms/{vm_id}/start", json={"host_id": host}))
    assert op["state"] == "succeeded", op
    return vm_id


async def shown(http: httpx.AsyncClient, host: str, moves: int) -> list[Any]:
    """What a dry run says, once the scheduler has heard that so many VMs can move."""

    async def planned() -> Any:
        answer = await http.post(f"/hosts/{host}/maintenance?dry_run=true", json={})
        plan = decoded(answer)["result"]["plan"]
        return plan if sum(" in wave " in fate["message"] for fate in plan) == moves else None

    found: list[Any] = await until(planned)
    return found


async def maintained(http: httpx.AsyncClient, host: str) -> Any:
    return await ends(http, await http.post(f"/hosts/{host}/maintenance", json={}))


def titles(op: Any) -> str:
    return "; ".join(step["title"] for step in op["steps"])


async def test_vms_that_fit_in_one_order_only_are_all_moved(configured: Settings) -> None:
    """The large one suits the second host only, where a small one has to make way."""
    async with desk(planning(configured, 0)) as (http, world):
        await world.machine("h3")
        await hosts_known(world.bus, 3)
        first, second, third = world.machines
        large = await runs(http, world, first, "large", 10)
        small = await runs(http, world, second, "small", 6)
        assert world.cluster is not None
        group = {"name": "here", "cluster_id": world.cluster.id, "vm_ids": [large]}
        group |= {"host_ids": [first, second], "host_rule": "positive"}
        assert (await http.post("/affinity-groups", json=group)).status_code == 201

        plan = await shown(http, first, 2)
        assert [(fate["name"], fate["host_id"]) for fate in plan] == [("small", third), ("large", second)]
        assert "to make way, from h2" in plan[0]["message"]
        assert await where(http, [large, small]) == [first, second]

        op = await maintained(http, first)
        assert op["state"] == "succeeded", op
        assert await where(http, [large, small]) == [second, third]
        assert op["result"] == {"moved": ["large"]}
        kept = decoded(await http.get("/plans"))["items"]
        assert [(p["kind"], p["state"], p["principal"]) for p in kept] == [
            ("evacuation", "succeeded", op["principal"])
        ]
        assert f"Following plan {kept[0]['id']}" in titles(op)


async def test_vms_that_must_be_together_leave_together(configured: Settings) -> None:
    async with desk(planning(configured, 0)) as (http, world):
        assert world.cluster is not None
        first, second = world.machines
        vm_ids = await started(http, world, first, "a", "b", "c")
        group = {"name": "three", "cluster_id": world.cluster.id, "vm_ids": vm_ids, "vm_rule": "positive"}
        assert (await http.post("/affinity-groups", json=group)).status_code == 201
        alone = await ends(http, await http.post(f"/vms/{vm_ids[0]}/migrate", json={}))
        assert alone["state"] == "failed"
        await shown(http, first, 3)
        op = await maintained(http, first)
        assert op["state"] == "succeeded", op
        assert await where(http, vm_ids) == [second] * 3


async def test_who_has_no_place_is_named_before_anything_moves(configured: Settings) -> None:
    async with desk(planning(configured, 0)) as (http, world):
        first, second = world.machines
        stays = await runs(http, world, first, "stays", 1, migration={"allowed": False})
        goes = await runs(http, world, first, "goes", 1)
        plan = await shown(http, first, 1)
        why = "its migration policy forbids to move it"
        assert [(f["name"], f["host_id"], f["message"]) for f in plan] == [
            ("goes", second, "moves to h2 in wave 1"),
            ("stays", "", why),
        ]
        gate = world.machines[first].held[MIGRATE_DOMAIN.kind] = asyncio.Event()
        begun = decoded(await http.post(f"/hosts/{first}/maintenance", json={}))

        async def named() -> bool:
            now = decoded(await http.get(f"/operations/{begun['id']}"))
            return f"1 VMs have no place (stays: {why})" in titles(now)

        await until(named)
        assert await where(http, [stays, goes]) == [first, first]
        gate.set()

        async def ended() -> Any:
            now = decoded(await http.get(f"/operations/{begun['id']}"))
            return now if now["state"] == "failed" else None

        op = await until(ended)
        assert "these VMs can't leave host h1: stays: " in op["problem"]["message"]
        assert op["result"] == {"moved": ["goes"]}
        assert await where(http, [stays, goes]) == [first, second]


async def test_a_plan_that_stops_leaves_the_rest_to_be_moved_without_it(configured: Settings) -> None:
    """A person cancels the plan, not the maintenance."""
    async with desk(planning(configured, 0)) as (http, world):
        await world.machine("h3")
        await hosts_known(world.bus, 3)
        first, second, third = world.machines
        vm_ids = await started(http, world, first, "a", "b", "c", "d")
        await shown(http, first, 4)
        gate = world.machines[first].held[MIGRATE_DOMAIN.kind] = asyncio.Event()
        begun = decoded(await http.post(f"/hosts/{first}/maintenance", json={}))

        async def plans() -> Any:
            found = decoded(await http.get("/plans"))["items"]
            moving = [s for p in found for s in p["steps"] if s["state"] == "moving"]
            return found if len(moving) == 2 else None

        (plan,) = await until(plans)
        other = await http.post(f"/plans/{plan['id']}/cancel", json={})
        assert other.status_code == 202, other.text
        gate.set()

        async def ended() -> Any:
            now = decoded(await http.get(f"/operations/{begun['id']}"))
            return now if now["state"] in ("succeeded", "failed") else None

        op = await until(ended)
        assert op["state"] == "succeeded", op
        assert first not in await where(http, vm_ids)
        assert sorted(op["result"]["moved"]) == ["a", "b", "c", "d"]
        assert decoded(await http.get(f"/plans/{plan['id']}"))["state"] == "cancelled"
        assert {second, third} >= set(await where(http, vm_ids))


async def ended(http: httpx.AsyncClient, begun: Any) -> Any:
    async def found() -> Any:
        now = decoded(await http.get(f"/operations/{begun['id']}"))
        return now if now["state"] in ("succeeded", "failed", "cancelled") else None

    return await until(found)


async def moves(http: httpx.AsyncClient) -> list[Any]:
    found = decoded(await http.get("/plans"))["items"]
    return [s for p in found for s in p["steps"] if s["state"] == "moving"]


@asynccontextmanager
async def two_leaving(configured: Settings) -> AsyncIterator[tuple[httpx.AsyncClient, World, list[str], Any]]:
    """Four VMs of the first host, two of which are on their way to the third, and one of the second, which is to leave too."""
    async with desk(planning(configured, 0)) as (http, world):
        await world.machine("h3")
        await hosts_known(world.bus, 3)
        first, second, third = world.machines
        vm_ids = await started(http, world, first, "a", "b", "c", "d")
        vm_ids += await started(http, world, second, "e")
        assert world.cluster is not None
        group = {"name": "here", "cluster_id": world.cluster.id, "vm_ids": vm_ids[:4]}
        group |= {"host_ids": [first, third], "host_rule": "positive"}
        assert (await http.post("/affinity-groups", json=group)).status_code == 201
        await shown(http, first, 4)
        await shown(http, second, 1)
        world.machines[first].held[MIGRATE_DOMAIN.kind] = asyncio.Event()
        begun = decoded(await http.post(f"/hosts/{first}/maintenance", json={}))
        await until(lambda: two_move(http))
        yield http, world, vm_ids, begun


async def two_move(http: httpx.AsyncClient) -> bool:
    return len(await moves(http)) == 2


async def test_a_second_host_joins_the_first_in_one_plan(configured: Settings) -> None:
    """It needn't wait for what is on its way already, and what isn't yet goes by the plan of both."""
    async with two_leaving(configured) as (http, world, vm_ids, begun):
        first, second, third = world.machines
        other = decoded(await http.post(f"/hosts/{second}/maintenance", json={}))
        gate = world.machines[first].held.pop(MIGRATE_DOMAIN.kind)

        async def both() -> Any:
            plans = decoded(await http.get("/plans"))["items"]
            return plans if len(plans) == 2 else None

        was, now = sorted(await until(both), key=lambda plan: str(plan["id"]))
        assert (was["state"], was["continued_by"], was["host_ids"]) == ("stopped", now["id"], [first])
        assert (now["kind"], now["host_ids"]) == ("evacuation", [second, first])
        assert sorted(step["vm_name"] for step in now["steps"]) == ["c", "d", "e"]
        assert (await ended(http, other))["state"] == "succeeded"
        gate.set()
        op = await ended(http, begun)
        assert op["state"] == "succeeded", op
        assert f"Following plan {now['id']}" in titles(op)
        assert sorted(op["result"]["moved"]) == ["a", "b", "c", "d"]
        assert await where(http, vm_ids) == [third] * 5
        assert len(await until(both)) == 2, "all of it was planned"


async def test_hosts_that_leave_at_the_same_moment_share_a_plan(configured: Settings) -> None:
    """Each plan was drawn up before the other was there."""
    async with desk(planning(configured, 0)) as (http, world):
        await world.machine("h3")
        await hosts_known(world.bus, 3)
        first, second, third = world.machines
        vm_ids = await started(http, world, first, "a") + await started(http, world, second, "b")
        for host in (first, second):
            await shown(http, host, 1)
            world.machines[host].held[MIGRATE_DOMAIN.kind] = asyncio.Event()
        async with open_direct(configured.database, Owner.SCHEDULER) as tables:

            async def both_wait() -> bool:
                sql = "select count(distinct pid) from pg_locks where not granted"
                return int(await tables.fetchval(sql)) == 2

            async with tables.transaction():
                await tables.execute("lock table plan_hold in share mode")
                begun = [
                    decoded(await http.post(f"/hosts/{host}/maintenance", json={}))
                    for host in (first, second)
                ]
                await until(both_wait)

        async def shared() -> Any:
            found = decoded(await http.get("/plans"))["items"]
            return [plan for plan in found if sorted(plan["host_ids"]) == sorted((first, second))]

        (plan,) = await until(shared)
        for host in (first, second):
            world.machines[host].held.pop(MIGRATE_DOMAIN.kind).set()
        outcomes = [await ended(http, op) for op in begun]
        assert [op["state"] for op in outcomes] == ["succeeded"] * 2, outcomes
        assert f"Following plan {plan['id']}" in "; ".join(map(titles, outcomes))
        assert await where(http, vm_ids) == [third, third]


async def test_a_plan_that_a_host_leaves_is_made_anew_without_it(configured: Settings) -> None:
    """The one that leaves has its VMs shut down, so no plan is made for it."""
    async with two_leaving(configured) as (http, world, vm_ids, begun):
        first, second, third = world.machines
        body = {"stop_vms": True}
        other = decoded(await http.post(f"/hosts/{second}/maintenance", json=body))
        assert (await ended(http, other))["state"] == "succeeded"

        async def heard() -> bool:
            answer = await http.post(f"/vms/{vm_ids[2]}/migrate?dry_run=true", json={"host_id": second})
            return "maintenance" in answer.text

        await until(heard)
        world.machines[first].held.pop(MIGRATE_DOMAIN.kind).set()
        op = await ended(http, begun)
        assert (op["state"], sorted(op["result"]["moved"])) == ("succeeded", ["a", "b", "c", "d"])
        plans = sorted(decoded(await http.get("/plans"))["items"], key=lambda plan: str(plan["id"]))
        assert [(plan["state"], plan["continued_by"]) for plan in plans] == [
            ("stopped", ""),
            ("succeeded", ""),
        ]
        assert "host h2 is no longer up" in plans[0]["reason"]
        assert [step["vm_name"] for step in plans[1]["steps"]] == ["c", "d"]
        assert (await where(http, vm_ids))[:4] == [third] * 4


async def test_who_cancels_a_joined_maintenance_cancels_the_plan_that_goes_on_with_it(
    configured: Settings,
) -> None:
    """Also at a moment at which it still waits for the end of its own; the other host leaves without a plan then."""
    async with two_leaving(configured) as (http, world, vm_ids, begun):
        first, second, _ = world.machines
        there = world.machines[second].held[MIGRATE_DOMAIN.kind] = asyncio.Event()
        other = decoded(await http.post(f"/hosts/{second}/maintenance", json={}))

        async def joined() -> Any:
            found = decoded(await http.get("/plans"))["items"]
            return [plan for plan in found if len(plan["host_ids"]) == 2]

        (plan,) = await until(joined)
        assert (await http.post(f"/operations/{begun['id']}/cancel", json={})).status_code in (200, 202)
        there.set()
        assert (await ended(http, begun))["state"] == "cancelled"
        assert (await ended(http, other))["state"] == "succeeded"
        assert decoded(await http.get(f"/plans/{plan['id']}"))["state"] == "cancelled"
        at = await where(http, vm_ids)
        assert (at[:4], at[4] != second) == ([first] * 4, True)


@asynccontextmanager
async def beside(configured: Settings, opened: list[State] | None = None) -> AsyncIterator[World]:
    """All but inventory, which each test begins and ends."""
    ha = Bell()
    services = (scheduler(opened), ha.service(), network_owner().service())
    async with running(planning(configured, 0), *services) as bus:
        world = World(bus, configured, Scheduler(), ha)
        try:
            yield world
        finally:
            for machine in world.machines.values():
                await machine.agent.kill()


async def test_an_inventory_that_comes_back_follows_the_same_plan(configured: Settings) -> None:
    async with beside(configured) as world:
        async with running(planning(configured, 0), inventory):
            await found_cluster(world)
            first = await world.machine("h1")
            await hosts_known(world.bus, 1)
            vms = [await world.vm() for _ in range(3)]
            second = await world.machine("h2")
            await hosts_known(world.bus, 2)
            gate = first.held[MIGRATE_DOMAIN.kind] = asyncio.Event()

            async def planned() -> bool:
                ask = MaintainHost(id=first.id, dry_run=True)
                plan = (await world.bus.ask(MAINTAIN_HOST, ask)).result["plan"]
                return sum(" in wave " in fate["message"] for fate in plan) == 3

            await until(planned)
            op = await world.bus.ask(MAINTAIN_HOST, MaintainHost(id=first.id))
            await until(first.begun.wait)
            await until(lambda: plans_of(world, 1))
        gate.set()
        async with running(planning(configured, 0), inventory):
            assert (await world.ended(op)).state is OperationState.SUCCEEDED
            assert {(await world.get(vm.id)).host_id for vm in vms} == {second.id}
            await world.host_is(first, HostStatus.MAINTENANCE)
            assert await plans_of(world, 1)


async def plans_of(world: World, count: int) -> bool:
    return len((await world.bus.ask(LIST_PLANS, ListQuery())).items) == count


async def test_a_maintenance_that_is_cancelled_cancels_its_plan(configured: Settings) -> None:
    async with desk(planning(configured, 0)) as (http, world):
        first, second = world.machines
        vm_ids = await started(http, world, first, "a", "b", "c", "d")
        await shown(http, first, 4)
        world.machines[first].held[MIGRATE_DOMAIN.kind] = asyncio.Event()  # no move ends by itself
        op = await world.bus.ask(MAINTAIN_HOST, MaintainHost(id=first))

        async def moving() -> Any:
            found = decoded(await http.get("/plans"))["items"]
            return [s for p in found for s in p["steps"] if s["state"] == "moving"]

        assert len(await until(moving)) <= 2
        await world.bus.ask(CANCEL_OPERATION[Owner.INVENTORY], CancelOperation(id=op.id))

        assert (await world.ended(op)).state is OperationState.CANCELLED
        plan = decoded(await http.get("/plans"))["items"][0]
        assert plan["state"] == "cancelled"
        await world.host_is(world.machines[first], HostStatus.UP)
        at = await where(http, vm_ids)
        assert at.count(second) == 0, "what was on its way was stopped, nothing more began"
