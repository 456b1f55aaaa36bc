"""An administrator's story through REST: a cluster promises to survive a host, and what would break that is refused."""

from __future__ import annotations

from typing import Any

import httpx

from tests.api_gateway.scripted import decoded
from tests.inventory.world import until
from tests.scheduler.test_affinity_story import desk, ends
from volery.runtime.programs import Settings

GIB = 1 << 30


async def test_a_promise_is_made_kept_refuses_and_explains(configured: Settings) -> None:
    """Two hosts with 15.75 GiB each, so three VMs of 5 GiB fit on one."""
    async with desk(configured) as (http, world):
        assert world.cluster is not None
        cluster_id = world.cluster.id
        path, first = f"/clusters/{cluster_id}", next(iter(world.machines))
        promised = {"reserve_host_failures": 1, "admission_control": "enforce"}
        made = await http.patch(path, json=promised)
        assert made.status_code == 200, made.text

        async def start(name: str, **fields: Any) -> dict[str, Any]:
            body = {"name": name, "cluster_id": cluster_id, "memory_bytes": 5 * GIB, "start": True}
            body |= {"high_availability": {"enabled": True}} | fields
            found: dict[str, Any] = await ends(http, await http.post("/vms", json=body))
            return found

        vms = [await start(f"vm{number}") for number in range(3)]
        assert [op["state"] for op in vms] == ["succeeded"] * 3, vms
        fourth = await start("fourth")
        assert fourth["state"] == "failed"
        assert "starting VM fourth on any of the 2 best hosts would break a promise" in str(fourth)
        assert "would have no place" in str(fourth)
        shown = decoded(await http.get(f"/vms/{fourth['object_id']}"))
        assert "would break a promise" in shown["fits_nowhere"]

        async def promise() -> Any:
            found = await http.get(f"{path}/protection")
            return decoded(found) if found.status_code == 200 else None

        assert (await until(promise))["kept"] is True
        refused = await http.post(f"/hosts/{first}/maintenance", json={})
        assert refused.status_code == 409, refused.text
        assert "putting host h1 into maintenance would break a promise" in decoded(refused)["detail"]
        rehearsed = await http.post(f"/hosts/{first}/maintenance?dry_run=true", json={})
        assert rehearsed.status_code == 409
        await _refused(http, path, {"memory_overcommit_percent": 60}, "changing cluster")
        await _refused(http, path, {"reserve_host_failures": 2}, "promises to survive the loss of 2 hosts")
        vm = f"/vms/{vms[0]['object_id']}"
        await _refused(http, vm, {"memory_bytes": 15 * GIB}, "changing VM vm0 would break a promise")
        await _refused(http, vm, {"affinity": {"host_ids": [await _host_of(http, vm)]}}, "is pinned to")
        assert (await http.patch(vm, json={"memory_bytes": 4 * GIB})).status_code == 200

        lost = decoded(await http.post(f"{path}/what-if", json={"host_ids": [first]}))
        assert lost["survived"] is True
        assert all(each["host_name"] == "h2" for each in lost["vms"])
        both = decoded(await http.post(f"{path}/what-if", json={"host_ids": list(world.machines)}))
        assert both["survived"] is False
        assert "no host of cluster" in both["vms"][0]["message"]

        assert (await http.patch(path, json={"admission_control": "warn"})).status_code == 200
        assert (await start("fifth"))["state"] == "succeeded"

        async def broken() -> Any:
            found = await promise()
            return found if found is not None and not found["kept"] else None

        said = await until(broken)
        assert said["unprotected_vm_ids"]
        await _refused(http, path, {"admission_control": "enforce"}, "enforcing the promise of cluster")
        listed = decoded(await http.get("/promises?filter.kept=false"))["items"]
        assert [each["cluster_id"] for each in listed] == [world.cluster.id]


async def _host_of(http: httpx.AsyncClient, vm: str) -> str:
    host_id: str = decoded(await http.get(vm))["host_id"]
    return host_id


async def _refused(http: httpx.AsyncClient, path: str, body: dict[str, Any], words: str) -> None:
    answer = await http.patch(path, json=body)
    assert answer.status_code == 409, answer.text
    assert words in decoded(answer)["detail"]
    assert "What would help" in decoded(answer)["detail"]
