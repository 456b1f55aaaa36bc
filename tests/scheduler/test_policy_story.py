"""An administrator's story through REST: a policy of her own, given to a cluster, changed while it runs."""

from __future__ import annotations

from typing import Any

from tests.api_gateway.scripted import decoded
from tests.scheduler.test_affinity_story import desk, ends
from volery.runtime.programs import Settings


async def test_a_policy_is_copied_given_changed_and_named_by_what_it_decided(configured: Settings) -> None:
    async with desk(configured) as (http, world):
        assert world.cluster is not None
        cluster_id = world.cluster.id
        vm_ids = []
        for name in ("web1", "web2", "web3"):
            body = {"name": name, "cluster_id": cluster_id, "memory_bytes": 1 << 30}
            vm_ids.append((await ends(http, await http.post("/vms", json=body)))["object_id"])

        async def start(vm_id: str) -> Any:
            """The newest decision about it, once it runs."""
            op = await ends(http, await http.post(f"/vms/{vm_id}/start", json={}))
            assert op["state"] == "succeeded", op
            newest = decoded(await http.get(f"/vms/{vm_id}/decisions"))["items"][0]
            return decoded(await http.get(f"/decisions/{newest['id']}"))

        units = decoded(await http.get("/scheduling-policy-units"))["units"]
        assert {u["name"] for u in units if u["kind"] == "filter" and not u["mandatory"]} == {
            "cpu", "cpu_overload", "swap", "cluster_maintenance",
        }  # fmt: skip
        listed = decoded(await http.get("/scheduling-policies?filter.built_in=true&order_by=name"))["items"]
        saving = next(p for p in listed if p["name"] == "power_saving")
        first = await start(vm_ids[0])
        assert (first["policy_name"], first["selector"]) == ("evenly_distributed", "weighted_sum")

        body = {"name": "packed", "copy_of": saving["id"], "selector": "rank"}
        created = await http.post("/scheduling-policies", json=body)
        assert created.status_code == 201, created.text
        packed = decoded(created)
        path = f"/scheduling-policies/{packed['id']}"
        assert created.headers["location"].endswith(path)
        given = await http.post(f"/clusters/{cluster_id}/scheduling-policy", json={"policy_id": packed["id"]})
        assert (given.status_code, decoded(given)["cluster_ids"]) == (200, [cluster_id]), given.text
        second = await start(vm_ids[1])
        assert second["host_id"] == first["host_id"]
        assert (second["policy_id"], second["selector"]) == (packed["id"], "rank")
        assert second["policy_revision"] == decoded(given)["revision"]

        etag = (await http.get(path)).headers["etag"]
        change = {"weights": {"guests_even": 1}, "selector": "weighted_sum"}
        stale = await http.patch(path, json=change, headers={"if-match": '"1"'})
        assert stale.status_code == 412
        changed = await http.patch(path, json=change, headers={"if-match": etag})
        assert changed.status_code == 200, changed.text
        third = await start(vm_ids[2])
        assert third["host_id"] != first["host_id"]
        assert third["policy_revision"] == decoded(changed)["revision"]
        assert f"by scheduling policy packed (revision {third['policy_revision']})" in third["message"]
        explained = await http.post(f"/vms/{vm_ids[2]}/migrate?dry_run=true", json={})
        assert decoded(explained)["result"]["placement"]["policy_name"] == "packed", explained.text

        refused = await http.patch(path, json={"weights": {"guests": 1}})
        assert refused.status_code == 400
        assert "no weight 'guests': did you mean guests_even?" in decoded(refused)["detail"]
        in_use = await http.delete(path)
        assert in_use.status_code == 409
        assert "is in use by cluster" in decoded(in_use)["detail"]
        seen = decoded(await http.get(f"/clusters/{cluster_id}/balance"))
        assert (seen["balance"], len(seen["hosts"])) == ("power_saving", 2)
        again = await http.post(f"/clusters/{cluster_id}/scheduling-policy", json={"policy_id": ""})
        assert decoded(again)["name"] == "evenly_distributed"
        assert (await http.delete(path)).status_code in (200, 204)
        holds = decoded(await http.get(f"/clusters/{cluster_id}/scheduling-policy"))
        assert holds["name"] == "evenly_distributed"
