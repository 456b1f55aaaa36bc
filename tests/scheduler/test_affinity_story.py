"""An administrator's story through REST: the gateway, inventory and scheduler are real, hosts' agents are scripted."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx

from services.inventory.service import service as inventory
from tests.api_gateway.scripted import decoded, running_gateway
from tests.inventory.scripted_scheduler import Scheduler
from tests.inventory.world import World, found_cluster, until
from tests.scheduler.fleets import hosts_known, network_owner, scheduler
from tests.support.bell import Bell
from tests.support.runtime import running
from volery.contracts.account import CREATE_USER, LOGIN, CreateUser, Login
from volery.runtime.programs import Settings

PASSWORD = "correct horse battery"


@asynccontextmanager
async def desk(configured: Settings) -> AsyncIterator[tuple[httpx.AsyncClient, World]]:
    ha = Bell()
    async with running(configured, inventory, scheduler(), ha.service(), network_owner().service()) as bus:
        world = World(bus, configured, Scheduler(), ha)
        await found_cluster(world)
        try:
            for name in ("h1", "h2"):
                await world.machine(name)
            await hosts_known(bus, 2)
            await bus.ask(CREATE_USER, CreateUser(name="ada", password=PASSWORD))
            issued = await bus.ask(LOGIN, Login(name="ada", password=PASSWORD))
            async with running_gateway(configured.bus.servers) as gateway:
                url = f"http://127.0.0.1:{gateway.port}/api/v1"
                headers = {"authorization": f"Bearer {issued.secret}"}
                async with httpx.AsyncClient(base_url=url, headers=headers, timeout=20) as http:
                    yield http, world
        finally:
            for machine in world.machines.values():
                await machine.agent.kill()


async def ends(http: httpx.AsyncClient, answer: httpx.Response) -> Any:
    """The operation that an answer began, once it has ended."""
    assert answer.status_code == 202, answer.text
    path = f"/operations/{decoded(answer)['id']}"

    async def ended() -> Any:
        op = decoded(await http.get(path))
        return op if op["state"] in ("succeeded", "failed") else None

    return await until(ended)


async def test_two_databases_are_kept_apart_and_what_ran_before_is_named(configured: Settings) -> None:
    async with desk(configured) as (http, world):
        assert world.cluster is not None
        made = []
        for name in ("db1", "db2", "db3"):
            body = {"name": name, "cluster_id": world.cluster.id, "memory_bytes": 1 << 30}
            made.append((await ends(http, await http.post("/vms", json=body)))["object_id"])
        first, second, third = made
        for vm_id in (first, second):
            host_id = next(iter(world.machines))
            await ends(http, await http.post(f"/vms/{vm_id}/start", json={"host_id": host_id}))

        body = {"name": "databases", "cluster_id": world.cluster.id, "vm_ids": made, "vm_rule": "negative"}
        created = await http.post("/affinity-groups", json=body)
        assert created.status_code == 201, created.text
        path = f"/affinity-groups/{decoded(created)['id']}"

        async def broken() -> Any:
            return decoded(await http.get(path))["broken"]

        assert await until(broken) == ["VMs db1, db2 run together on h1"]
        moved = await ends(http, await http.post(f"/vms/{second}/migrate", json={}))
        assert moved["state"] == "succeeded", moved

        async def whole() -> bool:
            return not await broken()

        await until(whole)
        third_start = await ends(http, await http.post(f"/vms/{third}/start", json={}))
        assert third_start["state"] == "failed"
        assert "affinity group databases keeps VM db3 off the host of VM db1, which is on h1" in str(
            third_start
        )
        assert "keeps VM db3 off the host of VM db2, which is on h2" in str(third_start)

        contradiction = body | {"name": "pair", "vm_rule": "positive", "vm_ids": [first, third]}
        refused = await http.post("/affinity-groups", json=contradiction)
        assert refused.status_code == 409
        assert "group databases keeps the two apart" in decoded(refused)["detail"]
        listed = decoded(await http.get(f"/affinity-groups?filter.vm_id={third}"))["items"]
        assert [g["name"] for g in listed] == ["databases"]
        etag = (await http.get(path)).headers["etag"]
        wish = {"vm_enforcing": False}
        stale = await http.patch(path, json=wish, headers={"if-match": '"1"'})
        assert stale.status_code == 412
        changed = await http.patch(path, json=wish, headers={"if-match": etag})
        assert (changed.status_code, decoded(changed)["vm_enforcing"]) == (200, False)
        started = await ends(http, await http.post(f"/vms/{third}/start", json={}))
        assert started["state"] == "succeeded", started
        assert (await http.delete(path)).status_code in (200, 204)
        assert (await http.get(path)).status_code == 404
