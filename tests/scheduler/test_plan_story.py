"""An administrator's story through REST: plans shown, carried out, cancelled; the gateway, inventory and scheduler are real,
hosts' agents are scripted."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import httpx

from tests.api_gateway.scripted import decoded
from tests.inventory.world import World, until
from tests.scheduler.test_affinity_story import desk, ends
from volery.runtime.programs import Settings


def planning(configured: Settings, seconds: float) -> Settings:
    """How often the scheduler makes plans by itself; 0: never."""
    return replace(configured, environ={"VOLERY_SCHEDULER_PLAN_SECONDS": str(seconds)})


async def started(http: httpx.AsyncClient, world: World, host: str, *names: str) -> list[str]:
    """VMs that run on this host."""
    assert world.cluster is not None
    made = []
    for name in names:
        body = {"name": name, "cluster_id": world.cluster.id, "memory_bytes": 1 << 30}
        vm_id = (await ends(http, await http.post("/vms", json=body)))["object_id"]
        op = await ends(http, await http.post(f"/vms/{vm_id}/start", json={"host_id": host}))
        assert op["state"] == "succeeded", op
        made.append(vm_id)
    return made


async def where(http: httpx.AsyncClient, vm_ids: list[str]) -> list[str]:
    return [decoded(await http.get(f"/vms/{vm_id}"))["host_id"] for vm_id in vm_ids]


async def guests_even(http: httpx.AsyncClient, cluster_id: str) -> None:
    """A policy that balances the number of VMs."""
    listed = decoded(await http.get("/scheduling-policies?filter.name=vm_evenly_distributed"))["items"]
    body = {"policy_id": listed[0]["id"]}
    given = await http.post(f"/clusters/{cluster_id}/scheduling-policy", json=body)
    assert given.status_code == 200, given.text


async def test_a_balance_is_shown_then_carried_out(configured: Settings) -> None:
    async with desk(planning(configured, 0)) as (http, world):
        assert world.cluster is not None
        first, second = world.machines
        vm_ids = await started(http, world, first, "a", "b", "c", "d")
        await guests_even(http, world.cluster.id)
        path = f"/clusters/{world.cluster.id}/balance"

        async def planned() -> Any:
            """Once the scheduler has heard that they run."""
            shown = await http.post(f"{path}?dry_run=true", json={})
            assert shown.status_code in (200, 202), shown.text
            plan = decoded(shown)["result"]["plan"]
            return plan if len(plan["steps"]) == 2 else None

        plan = await until(planned)
        assert {s["target_host_id"] for s in plan["steps"]} == {second}
        assert plan["after"] < plan["before"]
        assert await where(http, vm_ids) == [first] * 4
        assert decoded(await http.get("/plans"))["items"] == []

        op = await ends(http, await http.post(path, json={}))
        assert op["state"] == "succeeded", op
        assert sorted(await where(http, vm_ids)) == sorted([first] * 2 + [second] * 2)
        kept = decoded(await http.get(f"/plans/{op['object_id']}"))
        assert (kept["state"], {s["state"] for s in kept["steps"]}) == ("succeeded", {"done"})
        refused = await http.post(f"/plans/{kept['id']}/cancel", json={})
        assert (refused.status_code, "already succeeded" in decoded(refused)["detail"]) == (409, True)


async def test_a_host_is_emptied_and_who_has_no_place_is_named(configured: Settings) -> None:
    async with desk(planning(configured, 0)) as (http, world):
        assert world.cluster is not None
        first, second = world.machines
        vm_ids = await started(http, world, first, "a", "b")
        body = {"name": "stays", "cluster_id": world.cluster.id, "memory_bytes": 1 << 30}
        body["migration"] = {"allowed": False}
        stays = (await ends(http, await http.post("/vms", json=body)))["object_id"]
        await ends(http, await http.post(f"/vms/{stays}/start", json={"host_id": first}))
        ask = {"cluster_id": world.cluster.id, "kind": "evacuation", "host_ids": [first]}

        async def planned() -> Any:
            plan = decoded(await http.post("/plans?dry_run=true", json=ask))["result"]["plan"]
            return plan if len(plan["steps"]) == 2 and plan["unplaced"] else None

        plan = await until(planned)
        assert [(u["vm_name"], u["reason"]) for u in plan["unplaced"]] == [
            ("stays", "its migration policy forbids to move it")
        ]
        op = await ends(http, await http.post("/plans", json=ask))
        assert op["state"] == "succeeded", op
        assert await where(http, [*vm_ids, stays]) == [second, second, first]


async def test_broken_groups_are_mended_by_the_scheduler_itself(configured: Settings) -> None:
    async with desk(planning(configured, 0.2)) as (http, world):
        assert world.cluster is not None
        first, second = world.machines
        vm_ids = await started(http, world, first, "a", "b")
        vm_ids += await started(http, world, second, "c")
        group = {"name": "pair", "cluster_id": world.cluster.id, "vm_ids": vm_ids, "vm_rule": "positive"}
        group |= {"host_ids": [second], "host_rule": "positive"}
        created = await http.post("/affinity-groups", json=group)
        assert created.status_code == 201, created.text

        async def together() -> bool:
            return await where(http, vm_ids) == [second] * 3

        await until(together, seconds=30)
        plans = decoded(await http.get("/plans?filter.kind=affinity"))["items"]
        assert plans
        assert plans[0]["principal"] == "service:scheduler"


async def test_a_union_moves_one_after_the_other_to_the_host_that_its_rule_names(
    configured: Settings,
) -> None:
    """No member could be the first by itself."""
    async with desk(planning(configured, 0)) as (http, world):
        assert world.cluster is not None
        first, second = world.machines
        vm_ids = await started(http, world, first, "a", "b", "c")
        group = {"name": "three", "cluster_id": world.cluster.id, "vm_ids": vm_ids, "vm_rule": "positive"}
        group |= {"host_ids": [first], "host_rule": "negative"}
        assert (await http.post("/affinity-groups", json=group)).status_code == 201
        alone = await ends(http, await http.post(f"/vms/{vm_ids[0]}/migrate", json={}))
        assert alone["state"] == "failed"
        ask = {"cluster_id": world.cluster.id, "kind": "affinity"}

        async def planned() -> Any:
            plan = decoded(await http.post("/plans?dry_run=true", json=ask))["result"]["plan"]
            return len(plan["steps"]) == 3

        await until(planned)
        op = await ends(http, await http.post("/plans", json=ask))
        assert op["state"] == "succeeded", op
        assert await where(http, vm_ids) == [second] * 3
