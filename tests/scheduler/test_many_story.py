"""An administrator's story through REST: many VMs are started in one call, those of a hard group together or not at all."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import httpx

from tests.api_gateway.scripted import decoded
from tests.inventory.world import World, until
from tests.scheduler.test_affinity_story import desk, ends
from tests.scheduler.test_rounds import fetch
from volery.runtime.config import DatabaseConfig
from volery.runtime.programs import Settings

GIB = 1 << 30


async def make(http: httpx.AsyncClient, world: World, name: str, gib: int, **fields: Any) -> str:
    assert world.cluster is not None
    body = {"name": name, "cluster_id": world.cluster.id, "memory_bytes": gib * GIB} | fields
    op = await ends(http, await http.post("/vms", json=body))
    assert op["state"] == "succeeded", op
    made: str = op["object_id"]
    return made


async def keep_together(http: httpx.AsyncClient, world: World, name: str, vm_ids: Sequence[str]) -> str:
    assert world.cluster is not None
    body = {"name": name, "cluster_id": world.cluster.id, "vm_ids": list(vm_ids), "vm_rule": "positive"}
    made = await http.post("/affinity-groups", json=body)
    assert made.status_code == 201, made.text
    found: str = decoded(made)["id"]
    return found


def by_name(op: Any) -> dict[str, Any]:
    return {each["name"]: each for each in op["result"]["vms"]}


async def test_a_group_that_fits_nowhere_together_is_not_started_and_with_room_all_of_it_is(
    configured: Settings, database: DatabaseConfig
) -> None:
    """Two hosts have 15.75 GiB each: three VMs of 6 GiB don't fit on one, though each alone does."""
    async with desk(configured) as (http, world):
        group = [await make(http, world, name, 6) for name in ("app", "db", "web")]
        alone = await make(http, world, "alone", 1)
        group_id = await keep_together(http, world, "shop", group)
        for vm_id in group:
            said = decoded(await http.post(f"/vms/{vm_id}/explain", json={}))
            assert said["result"]["placement"]["fitting"] == 2

        rehearsed = await http.post("/vms/start?dry_run=true", json={"vm_ids": [*group, alone]})
        assert rehearsed.status_code == 200, rehearsed.text
        assert {n: v["became"] for n, v in by_name(decoded(rehearsed)).items()} == {
            "app": "refused",
            "db": "refused",
            "web": "refused",
            "alone": "placed",
        }

        op = await ends(http, await http.post("/vms/start", json={"vm_ids": [*group, alone]}))
        assert op["state"] == "failed"
        assert "1 of 4 VMs run, 3 don't" in op["problem"]["message"]
        became = by_name(op)
        assert {n: v["became"] for n, v in became.items()} == {
            "app": "refused",
            "db": "refused",
            "web": "refused",
            "alone": "started",
        }
        why = became["db"]["message"]
        assert "no host of cluster" in why
        assert "can take VM app together with db and web" in why
        assert "affinity group shop keeps them on one host" in why
        assert set(became["db"]["together"]) == {group[0], group[2]}
        decision = decoded(await http.get(f"/decisions/{became['db']['decision_id']}"))
        assert {host["name"] for host in decision["hosts"]} == {"h1", "h2"}
        for vm_id in group:
            vm = decoded(await http.get(f"/vms/{vm_id}"))
            assert (vm["status"], vm["epoch"], vm["busy_with"]) == ("down", 0, "")
        claims = await fetch(database, "select vm_id from claim")
        assert [row["vm_id"] for row in claims] == [alone]

        smaller = await http.patch(f"/vms/{group[0]}", json={"memory_bytes": 2 * GIB})
        assert smaller.status_code == 200, smaller.text
        op = await ends(http, await http.post("/vms/start", json={"affinity_group_id": group_id}))
        assert op["state"] == "succeeded", op
        became = by_name(op)
        assert {v["became"] for v in became.values()} == {"started"}
        assert len({v["host_id"] for v in became.values()}) == 1
        vms = [decoded(await http.get(f"/vms/{vm_id}")) for vm_id in group]
        assert {(vm["status"], vm["epoch"]) for vm in vms} == {("up", 1)}
        assert len({vm["host_id"] for vm in vms}) == 1
        own = [decoded(await http.get(f"/operations/{v['operation_id']}")) for v in became.values()]
        assert {(o["kind"], o["state"]) for o in own} == {("vm.start", "succeeded")}

        again = await ends(http, await http.post("/vms/start", json={"vm_ids": group}))
        assert again["state"] == "succeeded"
        assert {v["became"] for v in by_name(again).values()} == {"running"}


async def test_all_or_nothing_and_a_selection(configured: Settings, database: DatabaseConfig) -> None:
    async with desk(configured) as (http, world):
        assert world.cluster is not None
        small = [await make(http, world, f"s{n}", 1, tags=["night"] if n else []) for n in range(3)]
        await make(http, world, "huge", 64)
        every = {"cluster_id": world.cluster.id, "all_or_nothing": True}
        op = await ends(http, await http.post("/vms/start", json=every))
        assert op["state"] == "failed"
        assert {v["became"] for v in by_name(op).values()} == {"refused"}
        assert "all or none were asked for" in by_name(op)["s0"]["message"]
        assert await fetch(database, "select vm_id from claim") == []
        op = await ends(http, await http.post("/vms/start", json={"tag": "night"}))
        assert op["state"] == "succeeded", op
        assert set(by_name(op)) == {"s1", "s2"}
        op = await ends(http, await http.post("/vms/start", json={"cluster_id": world.cluster.id}))
        assert {n: v["became"] for n, v in by_name(op).items()} == {"s0": "started", "huge": "refused"}
        vm = decoded(await http.get(f"/vms/{small[0]}"))
        assert vm["status"] == "up"


async def test_bad_questions_are_refused_with_a_sentence(configured: Settings) -> None:
    unknown = "0199c0de-0000-7000-8000-000000000002"
    cases: list[tuple[dict[str, Any], int, str]] = [
        ({}, 400, "no VM is to be started"),
        ({"vm_ids": ["web"]}, 400, "is not the id of a VM"),
        ({"vm_ids": [unknown]}, 404, "there is no VM"),
        ({"vm_ids": [unknown] * 2}, 400, "is named twice"),
        ({"vm_ids": [f"0199c0de-0000-7000-8000-{n:012d}" for n in range(501)]}, 400, "at most 500 VMs"),
        ({"affinity_group_id": unknown}, 404, "affinity group"),
        ({"vms": []}, 400, "vms"),
    ]
    async with desk(configured) as (http, _):
        for body, status, words in cases:
            answer = await http.post("/vms/start", json=body)
            assert answer.status_code == status, answer.text
            assert words in answer.text


async def test_500_starts_in_one_call_never_exceed_any_hosts_memory(
    configured: Settings, database: DatabaseConfig
) -> None:
    """Far more than there is room for on two hosts; and another call asks for the same VMs meanwhile."""
    async with desk(configured) as (http, world):
        assert world.cluster is not None
        await http.patch(f"/clusters/{world.cluster.id}", json={"cpu_overcommit_ratio": 100.0})
        gate = asyncio.Semaphore(16)

        async def made(number: int) -> str:
            async with gate:
                return await make(http, world, f"vm{number}", 1)

        vm_ids = await asyncio.gather(*(made(number) for number in range(500)))
        groups = [vm_ids[n : n + 3] for n in range(0, 30, 3)]
        for n, group in enumerate(groups):
            await keep_together(http, world, f"g{n}", group)
        first = await http.post("/vms/start", json={"vm_ids": vm_ids})
        second = await http.post("/vms/start", json={"vm_ids": vm_ids[::-1]})
        op, other = await ends(http, first), await ends(http, second)
        limit = (16 << 30) - (256 << 20)
        query = "select host_id, vm_id, (doc::json->>'memory_bytes')::bigint as memory from claim"
        rows = await fetch(database, query)
        used: dict[str, int] = {}
        for row in rows:
            used[row["host_id"]] = used.get(row["host_id"], 0) + row["memory"]
        assert len(used) == 2
        assert all(limit - 1.1 * GIB < memory <= limit for memory in used.values()), used
        listed = decoded(await http.get("/vms?filter.status=up&limit=1000"))["items"]
        up = {vm["id"]: vm["host_id"] for vm in listed}
        assert up == {row["vm_id"]: row["host_id"] for row in rows}
        for group in groups:
            assert len({up.get(vm_id) for vm_id in group}) == 1
        told = [v for each in (op, other) for v in each["result"]["vms"]]
        assert len(told) == 1000
        assert {v["vm_id"] for v in told if v["became"] in ("started", "running")} == set(up)
        assert all(v["message"] for v in told if v["became"] in ("refused", "failed"))
        await until(lambda: settled(database, len(up)))


async def settled(database: DatabaseConfig, count: int) -> bool:
    return len(await fetch(database, "select 1 from claim where state = 'confirmed'")) == count
