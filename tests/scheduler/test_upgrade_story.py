"""A cluster is upgraded host by host: the gateway, inventory and scheduler are real, hosts' agents are scripted."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import msgspec

from services.inventory.service import service as inventory
from services.scheduler import plans
from services.scheduler.state import Scheduler
from tests.api_gateway.scripted import decoded
from tests.inventory.world import World, found_cluster, until
from tests.scheduler.fleets import hosts_known
from tests.scheduler.test_affinity_story import desk, ends
from tests.scheduler.test_maintenance_story import beside
from tests.scheduler.test_plan_story import planning, started, where
from tests.support.runtime import running
from volery.contracts.affinity_group import (
    CREATE_AFFINITY_GROUP,
    LIST_AFFINITY_GROUPS,
    AffinityGroup,
    AffinityRule,
    CreateAffinityGroup,
)
from volery.contracts.base import Owner
from volery.contracts.cluster import UPGRADE_CLUSTER, UpgradeCluster
from volery.contracts.domain_orders import MIGRATE_DOMAIN
from volery.contracts.host import ACTIVATE_HOST, ActivateHost, HostStatus
from volery.contracts.operation import GET_OPERATION, GetOperation, ListQuery, OperationState
from volery.contracts.plan import LIST_PLANS, Plan
from volery.runtime.programs import Settings


async def waits_for(http: httpx.AsyncClient, operation: str, name: str) -> None:
    async def waiting() -> bool:
        now = decoded(await http.get(f"/operations/{operation}"))
        assert now["state"] in ("pending", "running"), now
        return bool(now["result"].get("waiting_for") == name)

    await until(waiting, seconds=30)


async def over(http: httpx.AsyncClient, operation: str) -> Any:
    async def ended() -> Any:
        now = decoded(await http.get(f"/operations/{operation}"))
        return now if now["state"] in ("succeeded", "failed", "cancelled") else None

    return await until(ended)


async def planned(http: httpx.AsyncClient, path: str, moves: int) -> Any:
    """Once the scheduler has heard that so many VMs can move."""

    async def shown() -> Any:
        found = decoded(await http.post(f"{path}?dry_run=true", json={}))["result"]
        return found if len(found["plan"]["steps"]) == moves else None

    return await until(shown)


async def activated(http: httpx.AsyncClient, host: str) -> None:
    op = await ends(http, await http.post(f"/hosts/{host}/activate", json={}))
    assert op["state"] == "succeeded", op


async def test_hosts_are_emptied_one_after_the_other_and_wait_for_their_upgrade(configured: Settings) -> None:
    async with desk(planning(configured, 0)) as (http, world):
        assert world.cluster is not None
        await world.machine("h3")
        await hosts_known(world.bus, 3)
        first, second, third = world.machines
        vm_ids = await started(http, world, first, "a", "b") + await started(http, world, second, "c")
        path = f"/clusters/{world.cluster.id}/upgrade"

        shown = await planned(http, path, 3)
        assert shown["hosts"] == ["h3", "h2", "h1"]
        moves = [(s["turn"], s["vm_name"], s["target_host_id"]) for s in shown["plan"]["steps"]]
        assert moves[0] == (1, "c", third)
        assert {turn for turn, _, _ in moves[1:]} == {2}
        assert await where(http, vm_ids) == [first, first, second]

        begun = decoded(await http.post(path, json={}))
        await waits_for(http, begun["id"], "h3")
        assert decoded(await http.get(f"/clusters/{world.cluster.id}"))["busy_with"] == begun["id"]
        again = await http.post(path, json={})
        assert (again.status_code, begun["id"] in decoded(again)["detail"]) == (409, True)
        assert await where(http, vm_ids) == [first, first, second]
        await activated(http, third)
        await waits_for(http, begun["id"], "h2")
        assert await where(http, vm_ids) == [first, first, third]
        await activated(http, second)
        await waits_for(http, begun["id"], "h1")
        assert first not in await where(http, vm_ids)
        await activated(http, first)

        op = await over(http, begun["id"])
        assert (op["state"], op["progress"]) == ("succeeded", 100.0), op
        assert op["result"] == {"done": ["h3", "h2", "h1"], "waiting_for": ""}
        assert decoded(await http.get(f"/clusters/{world.cluster.id}"))["busy_with"] == ""


async def test_who_would_have_no_place_is_named_and_nothing_begins(configured: Settings) -> None:
    async with desk(planning(configured, 0)) as (http, world):
        assert world.cluster is not None
        first, second = world.machines
        body = {"name": "stays", "cluster_id": world.cluster.id, "memory_bytes": 1 << 30}
        body["migration"] = {"allowed": False}
        stays = (await ends(http, await http.post("/vms", json=body)))["object_id"]
        await ends(http, await http.post(f"/vms/{stays}/start", json={"host_id": first}))
        path = f"/clusters/{world.cluster.id}/upgrade"

        async def refused() -> Any:
            """Once the scheduler has heard that it runs."""
            found = decoded(await http.post(f"{path}?dry_run=true", json={}))
            return found["result"]["plan"]["unplaced"]

        assert [u["vm_name"] for u in await until(refused)] == ["stays"]
        answer = await http.post(path, json={})
        assert answer.status_code == 409
        assert "stays: its migration policy forbids to move it" in decoded(answer)["detail"]
        assert {h["status"] for h in decoded(await http.get("/hosts"))["items"]} == {"up"}

        op = decoded(await http.post(path, json={"host_ids": [second]}))
        await waits_for(http, op["id"], "h2")
        cancelled = await http.post(f"/operations/{op['id']}/cancel", json={})
        assert cancelled.status_code == 202, cancelled.text
        assert (await over(http, op["id"]))["state"] == "cancelled"
        assert decoded(await http.get(f"/hosts/{second}"))["status"] == "maintenance"
        assert decoded(await http.get(f"/clusters/{world.cluster.id}"))["busy_with"] == ""


async def test_bad_questions_are_refused_with_what_to_do(configured: Settings) -> None:
    async with desk(planning(configured, 0)) as (http, world):
        assert world.cluster is not None
        path, known = f"/clusters/{world.cluster.id}/upgrade", next(iter(world.machines))
        for body, status, said in (
            ({"host_ids": [world.cluster.id]}, 400, "is none of cluster"),
            ({"host_ids": [known, known]}, 400, "is named twice"),
            ({"reason": "x" * 100_000}, 400, "reason"),
        ):
            answer = await http.post(path, json=body)
            assert (answer.status_code, said in decoded(answer)["detail"]) == (status, True), answer.text
        plan = {"cluster_id": world.cluster.id, "kind": "upgrade", "host_ids": [known]}
        answer = await http.post("/plans", json=plan)
        assert "the cluster's own upgrade carries it out" in decoded(answer)["detail"]


async def test_nothing_is_mended_meanwhile(configured: Settings) -> None:
    """The leader would move both VMs of the broken group; it does when the upgrade is over."""
    opened: list[Scheduler] = []
    async with beside(configured, opened) as world, running(planning(configured, 0), inventory):
        await found_cluster(world)
        assert world.cluster is not None
        first = await world.machine("h1")
        await hosts_known(world.bus, 1)
        vms = [await world.vm() for _ in range(2)]
        second, third = await world.machine("h2"), await world.machine("h3")
        await hosts_known(world.bus, 3)
        op = await world.bus.ask(UPGRADE_CLUSTER, UpgradeCluster(id=world.cluster.id, host_ids=(third.id,)))
        await world.host_is(third, HostStatus.MAINTENANCE)
        group = CreateAffinityGroup(
            name="there",
            cluster_id=world.cluster.id,
            vm_ids=tuple(vm.id for vm in vms),
            host_ids=(second.id,),
            host_rule=AffinityRule.POSITIVE,
        )
        await world.bus.ask(CREATE_AFFINITY_GROUP, group)
        await until(lambda: is_broken(world))
        await plans._mend(opened[0], world.cluster.id)
        assert not (await world.bus.ask(LIST_PLANS, ListQuery())).items
        await world.ended(await world.bus.ask(ACTIVATE_HOST, ActivateHost(id=third.id)))
        await world.ended(op)
        await plans._mend(opened[0], world.cluster.id)
        (plan,) = (await world.bus.ask(LIST_PLANS, ListQuery())).items
        assert len(msgspec.json.decode(plan, type=Plan).steps) == 2
        assert {(await world.get(vm.id)).host_id for vm in vms} <= {first.id, second.id}


async def is_broken(world: World) -> bool:
    groups = (await world.bus.ask(LIST_AFFINITY_GROUPS, ListQuery())).items
    return any(msgspec.json.decode(group, type=AffinityGroup).broken for group in groups)


async def test_an_inventory_that_comes_back_goes_on_with_the_same_host(configured: Settings) -> None:
    async with beside(configured) as world:
        async with running(planning(configured, 0), inventory):
            await found_cluster(world)
            assert world.cluster is not None
            first = await world.machine("h1")
            await hosts_known(world.bus, 1)
            vms = [await world.vm() for _ in range(2)]
            second = await world.machine("h2")
            await hosts_known(world.bus, 2)
            gate = first.held[MIGRATE_DOMAIN.kind] = asyncio.Event()
            ask = UpgradeCluster(id=world.cluster.id, host_ids=(first.id,))

            async def heard() -> bool:
                dry = UpgradeCluster(id=ask.id, host_ids=ask.host_ids, dry_run=True)
                return len((await world.bus.ask(UPGRADE_CLUSTER, dry)).result["plan"]["steps"]) == 2

            await until(heard)
            op = await world.bus.ask(UPGRADE_CLUSTER, ask)
            await until(first.begun.wait)
        gate.set()
        async with running(planning(configured, 0), inventory):

            async def waiting() -> bool:
                now = await world.bus.ask(GET_OPERATION[Owner.INVENTORY], GetOperation(id=op.id))
                return now.result.get("waiting_for") == "h1"

            await until(waiting)
            assert {(await world.get(vm.id)).host_id for vm in vms} == {second.id}
            await world.ended(await world.bus.ask(ACTIVATE_HOST, ActivateHost(id=first.id)))
            ended = await world.ended(op)
            assert (ended.state, ended.result["done"]) == (OperationState.SUCCEEDED, ["h1"])
