"""An administrator's story through REST: a cluster that has its hosts switched off and on by itself, as its policy says. BMCs
end and begin the hosts; gateway, inventory, scheduler and ha are real."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tests.api_gateway.scripted import decoded
from tests.ha.powered import Powered, powered, until
from tests.support.tasks import ended
from volery.contracts.base import encode
from volery.contracts.domain_orders import MIGRATE_DOMAIN
from volery.contracts.fencing import PowerAction, PowerState
from volery.contracts.metrics import METRICS_SUBJECT, HostSample
from volery.runtime.database import open_pool
from volery.runtime.programs import Settings

SOON = {
    "VOLERY_SCHEDULER_SAVING_SECONDS": "0.5",
    "VOLERY_SCHEDULER_SAVING_PAUSE_SECONDS": "3",
    "VOLERY_SCHEDULER_SAVING_HEARD_SECONDS": "3",
    "VOLERY_SCHEDULER_PLAN_AFTER_SECONDS": "1",
}
NEVER = {"VOLERY_SCHEDULER_SAVING_SECONDS": "0"}
OFF = PowerState.OFF


@asynccontextmanager
async def measured(at: Powered, *busy: int) -> AsyncIterator[None]:
    """Hosts that live say how busy they are: these very, the others not."""

    async def say() -> None:
        client = at.world.bus.client
        while True:
            for number, machine in enumerate(at.machines):
                sample = HostSample(
                    host_id=machine.id,
                    boot_id=machine.agent.boot_id,
                    at=datetime.now(UTC),
                    cpu_percent=60.0 if number in busy else 2.0,
                )
                if machine.agent.client is not None and machine.agent.beating:
                    await client.publish(METRICS_SUBJECT.format(host_id=machine.id), encode(sample))
            await asyncio.sleep(0.3)

    saying = asyncio.create_task(say())
    try:
        yield
    finally:
        await ended(saying)


async def has_policy(at: Powered, **parameters: float) -> None:
    """The cluster gets a policy of its own that saves power."""
    assert at.world.cluster is not None
    listed = decoded(await at.http.get("/scheduling-policies?filter.name=power_saving"))["items"]
    body = {"name": "night", "copy_of": listed[0]["id"], "parameters": parameters}
    made = await at.http.post("/scheduling-policies", json=body)
    assert made.status_code == 201, made.text
    given = {"policy_id": decoded(made)["id"]}
    answer = await at.http.post(f"/clusters/{at.world.cluster.id}/scheduling-policy", json=given)
    assert answer.status_code == 200, answer.text


async def plan(at: Powered, dry_run: bool = False, **fields: Any) -> Any:
    assert at.world.cluster is not None
    body = {"cluster_id": at.world.cluster.id, "kind": "saving", **fields}
    answer = await at.http.post(f"/plans?dry_run={str(dry_run).lower()}", json=body)
    assert answer.status_code in (200, 202), answer.text
    return decoded(answer)


async def shown(at: Powered, words: str, **fields: Any) -> Any:
    """What a dry run says, once it says this."""
    found: Any = None

    async def said() -> Any:
        nonlocal found
        found = (await plan(at, True, **fields))["result"]["plan"]
        return found if words in found["message"] else None

    try:
        return await until(said)
    except TimeoutError:
        raise AssertionError(f"not {words}: {found}") from None


async def asleep(at: Powered) -> list[int]:
    return [n for n in range(len(at.machines)) if (await at.host(n))["power_saving"] == "asleep"]


async def test_a_plan_is_shown_then_empties_a_host_and_switches_it_off(
    configured: Settings, tmp_path: Path
) -> None:
    async with powered(configured, tmp_path, **NEVER) as at:
        await has_policy(at, HostsInReserve=0)
        few = [await at.vm(0, "a")]
        many = [await at.vm(1, name) for name in ("b", "c")]
        many += [await at.vm(2, name) for name in ("d", "e", "f")]
        seen = await shown(at, "moves 1 VM away from h0 and switches it off")
        assert [(s["vm_name"], s["source_host_name"]) for s in seen["steps"]] == [("a", "h0")]
        assert seen["host_ids"] == [at.machines[0].id]
        assert at.bmcs[0].did(PowerAction.OFF) == 0

        op = await at.ended(await plan(at))
        assert op["state"] == "succeeded", op
        await at.is_host(0, power_saving="asleep", status="maintenance", busy_with="")
        assert (at.bmcs[0].power, at.bmcs[0].victims) == (OFF, [()])
        assert [await at.where(vm) for vm in many[:2]] == [at.machines[1].id] * 2
        assert await at.where(few[0]) != at.machines[0].id
        kept = decoded(await at.http.get(f"/plans/{op['object_id']}"))
        assert (kept["kind"], kept["state"]) == ("saving", "succeeded")

        refused = await at.http.post(
            "/plans",
            json={"cluster_id": kept["cluster_id"], "kind": "saving", "wake_host_ids": [at.machines[1].id]},
        )
        assert (refused.status_code, "doesn't sleep" in decoded(refused)["detail"]) == (409, True)
        op = await at.ended(await plan(at, wake_host_ids=[at.machines[0].id]))
        assert op["state"] == "succeeded", op
        await at.is_host(0, power_saving="awake", status="up")


async def test_a_reserve_stays_up_and_who_keeps_a_host_up_is_named(
    configured: Settings, tmp_path: Path
) -> None:
    async with powered(configured, tmp_path, **NEVER) as at:
        await has_policy(at, HostsInReserve=2)
        await at.vm(0, "stays", migration={"allowed": False})
        await shown(at, "switches nothing off: without h1 1 empty hosts would be left, and 2 stay in reserve")
        await shown(at, "VM stays can't leave h0", host_ids=[at.machines[0].id])
        op = await at.ended(await plan(at))
        assert (op["state"], await asleep(at)) == ("succeeded", [])
        await at.http.delete(f"/hosts/{at.machines[1].id}/power-management")
        body = {"cluster_id": decoded(await at.http.get("/clusters"))["items"][0]["id"], "kind": "saving"}
        refused = await at.http.post("/plans", json=body | {"host_ids": [at.machines[1].id]})
        assert "nobody could wake it" in decoded(refused)["detail"]


async def test_a_plan_stops_when_reality_differs(configured: Settings, tmp_path: Path) -> None:
    """A VM has come to the host while its last one moved away: it stays up."""
    async with powered(configured, tmp_path, **NEVER) as at:
        await has_policy(at)
        await at.vm(0, "a")
        await at.vm(1, "b")
        await at.vm(1, "c")
        await at.vm(2, "d", migration={"allowed": False})
        await shown(at, "moves 1 VM away from h0")
        gate = at.machines[0].held[MIGRATE_DOMAIN.kind] = asyncio.Event()
        begun = await plan(at)
        await until(lambda: _moves_from(at, 0))
        late = await at.vm(0, "late", migration={"allowed": False})
        gate.set()
        op = await at.ended(begun)
        assert op["state"] == "failed"
        assert "things are no longer as they were planned" in op["problem"]["message"], op
        assert await at.where(late) == at.machines[0].id
        assert (await asleep(at), at.bmcs[0].did(PowerAction.OFF)) == ([], 0)
        kept = decoded(await at.http.get(f"/plans/{op['object_id']}"))
        assert kept["state"] == "stopped"


async def test_a_plan_that_gave_way_to_another_switches_nothing_off(
    configured: Settings, tmp_path: Path
) -> None:
    """While its last VM moves away an evacuation needs the host as a destination."""
    async with powered(configured, tmp_path, **NEVER) as at:
        await has_policy(at)
        await at.vm(0, "a")
        for name in ("b", "c"):
            await at.vm(1, name)
        for name in ("d", "e", "f"):
            await at.vm(2, name, migration={"allowed": False})
        await shown(at, "moves 1 VM away from h0")
        gate = at.machines[0].held[MIGRATE_DOMAIN.kind] = asyncio.Event()
        other = at.machines[1].held[MIGRATE_DOMAIN.kind] = asyncio.Event()
        begun = await plan(at)
        await until(lambda: _moves_from(at, 0))
        evacuation = await plan(at, kind="evacuation", host_ids=[at.machines[1].id])
        stopped = decoded(await at.http.get(f"/plans/{begun['object_id']}"))
        assert (stopped["state"], "goes before it" in stopped["reason"]) == ("stopped", True)
        gate.set()
        op = await at.ended(begun)
        assert (op["state"], op["problem"]["message"]) == ("failed", stopped["reason"])
        other.set()
        await at.ended(evacuation)
        assert (await asleep(at), at.bmcs[0].did(PowerAction.OFF)) == ([], 0)
        assert (await at.host(0))["power_saving"] == "awake"


async def _moves_from(at: Powered, number: int) -> bool:
    return any(type(ask).__name__ == "MigrateDomain" for ask in at.machines[number].asked)


async def test_the_scheduler_switches_hosts_off_down_to_its_reserve_and_on_again(
    configured: Settings, tmp_path: Path
) -> None:
    async with powered(configured, tmp_path, hosts=4, **SOON) as at, measured(at, 0):
        await at.vm(0, "a")
        await asyncio.sleep(3)
        assert await asleep(at) == []  # no policy says so
        await has_policy(at, HostsInReserve=1, EnableAutomaticHostPowerManagement=1, LowUtilization=20)

        async def two() -> bool:
            return len(await asleep(at)) == 2

        await until(two)
        await asyncio.sleep(5)
        resting = await asleep(at)
        assert len(resting) == 2  # one empty host stays
        assert 0 not in resting
        spare = next(n for n in range(1, 4) if n not in resting)
        plans = decoded(await at.http.get("/plans"))["items"]
        assert {(p["kind"], p["state"], p["principal"]) for p in plans} == {
            ("saving", "succeeded", "service:scheduler")
        }
        # The reserve is used: another host is woken, and only one.
        await at.vm(spare, "b")

        async def one() -> bool:
            return len(await asleep(at)) == 1

        await until(one)
        still = await asleep(at)
        woken = next(n for n in resting if n not in still)
        await at.is_host(woken, status="up")
        assert (await at.host(woken))["power_on_proven_at"] is not None
        assert all(victims == () for bmc in at.bmcs for victims in bmc.victims)


async def test_a_vm_without_a_place_wakes_a_host(configured: Settings, tmp_path: Path) -> None:
    """At once, whatever the pause."""
    slow = SOON | {"VOLERY_SCHEDULER_SAVING_PAUSE_SECONDS": "600"}
    async with powered(configured, tmp_path, hosts=3, **slow) as at, measured(at):
        assert at.world.cluster is not None
        await at.vm(0, "a")
        await has_policy(at, EnableAutomaticHostPowerManagement=1, LowUtilization=20)

        async def one() -> bool:
            return len(await asleep(at)) == 1

        await until(one)
        up = [n for n in range(3) if n not in await asleep(at)]
        body = {"cluster_id": at.world.cluster.id, "memory_bytes": 14 << 30}
        big = []
        for name in ("big1", "big2", "big3"):
            made = decoded(await at.http.post("/vms", json=body | {"name": name}))
            big.append((await at.ended(made))["object_id"])
        ends = [await at.ended(decoded(await at.http.post(f"/vms/{vm}/start", json={}))) for vm in big]
        assert [op["state"] for op in ends].count("failed") >= 1
        assert len(up) == 2

        async def none() -> bool:
            return await asleep(at) == []

        await until(none)

        async def runs() -> bool:
            failed = [vm for vm, op in zip(big, ends, strict=True) if op["state"] == "failed"]
            op = await at.ended(decoded(await at.http.post(f"/vms/{failed[0]}/start", json={})))
            return bool(op["state"] == "succeeded")

        await until(runs)


async def test_vms_that_find_no_place_together_wake_a_host(configured: Settings, tmp_path: Path) -> None:
    """Each by itself would have one."""
    slow = SOON | {"VOLERY_SCHEDULER_SAVING_PAUSE_SECONDS": "600"}
    async with powered(configured, tmp_path, hosts=3, **slow) as at, measured(at):
        assert at.world.cluster is not None
        for number in (0, 1):
            await at.vm(number, f"large{number}", memory_bytes=8 << 30)
        await has_policy(at, EnableAutomaticHostPowerManagement=1, LowUtilization=20)

        async def third() -> bool:
            return await asleep(at) == [2]

        await until(third)
        cluster = {"cluster_id": at.world.cluster.id}
        pair = []
        for name in ("a", "b"):
            made = await at.http.post("/vms", json=cluster | {"name": name, "memory_bytes": 7 << 30})
            pair.append((await at.ended(decoded(made)))["object_id"])
        group = cluster | {"name": "pair", "vm_ids": pair, "vm_rule": "positive"}
        assert (await at.http.post("/affinity-groups", json=group)).status_code == 201
        op = await at.ended(decoded(await at.http.post("/vms/start", json={"vm_ids": pair})))
        assert op["state"] == "failed"

        async def none() -> bool:
            return await asleep(at) == []

        await until(none)

        async def runs() -> bool:
            op = await at.ended(decoded(await at.http.post("/vms/start", json={"vm_ids": pair})))
            return bool(op["state"] == "succeeded")

        await until(runs)
        assert [await at.where(vm) for vm in pair] == [at.machines[2].id] * 2


async def test_nothing_is_done_while_a_host_is_silent_or_the_scheduler_is_away(
    configured: Settings, tmp_path: Path
) -> None:
    patient = SOON | {
        "VOLERY_HA_SILENCE_BEFORE_FENCE_SECONDS": "600"
    }  # whom ha would fence sleeps for another reason
    async with powered(configured, tmp_path, hosts=4, **patient) as at, measured(at):
        await at.vm(0, "a")
        at.machines[3].agent.beating = False
        await at.is_host(3, status="non_responsive")
        await has_policy(at, EnableAutomaticHostPowerManagement=1, LowUtilization=20)
        await asyncio.sleep(4)
        assert (await asleep(at), [bmc.did(PowerAction.OFF) for bmc in at.bmcs]) == ([], [0, 0, 0, 0])
        await at.inventory.end()
        await at.ha.end()
        at.machines[3].agent.beating = True
        await asyncio.sleep(4)
        assert [bmc.did(PowerAction.OFF) for bmc in at.bmcs] == [0, 0, 0, 0]
        await at.ha.begin()
        await at.inventory.begin()

        async def some() -> bool:
            return bool(await asleep(at))

        await until(some, seconds=60.0)


async def test_a_sleeping_host_counts_for_a_promise_once_it_was_seen_to_wake(
    configured: Settings, tmp_path: Path
) -> None:
    """And not where nobody would wake it, nor when that was too long ago."""
    async with powered(configured, tmp_path, **NEVER) as at:
        assert at.world.cluster is not None
        path = f"/clusters/{at.world.cluster.id}"
        promised = {"reserve_host_failures": 1, "admission_control": "enforce"}
        await has_policy(at, EnableAutomaticHostPowerManagement=1)
        await at.sleeps(2)
        assert (await at.http.patch(path, json=promised)).status_code == 200
        # Two hosts with 15.75 GiB each are up: the third VM of 7 GiB would have no place if one died.
        big = {"memory_bytes": 7 << 30, "high_availability": {"enabled": True}}
        for number, name in enumerate(("a", "b")):
            await at.vm(number, name, **big)

        async def starts(name: str) -> str:
            body = {"name": name, "cluster_id": at.world.cluster.id, "start": True, **big}
            op = await at.ended(decoded(await at.http.post("/vms", json=body)))
            return op["state"] if op["problem"] is None else f"failed: {op['problem']['message']}"

        assert "would break a promise" in await starts("c")
        assert (await at.does(2, "wake"))["state"] == "succeeded"
        await at.is_host(2, status="up", busy_with="")
        await at.sleeps(2)
        await until(lambda: _heard_asleep(at))
        async with open_pool(at.world.settings.database, "scheduler") as tables:
            await tables.execute("update host_sleep set proven_at = now() - interval '8 days'")
            assert "would break a promise" in await starts("d")
            await tables.execute("update host_sleep set proven_at = now() - interval '6 days'")
        assert await starts("e") == "succeeded"


async def test_that_no_host_may_sleep_for_a_promise_is_said_of_the_one_that_is_easiest_to_empty(
    configured: Settings, tmp_path: Path
) -> None:
    """Not why the last one that is tried can't be emptied."""
    async with powered(configured, tmp_path, **NEVER) as at:
        assert at.world.cluster is not None
        await has_policy(at)
        promised = {"reserve_host_failures": 2, "admission_control": "enforce"}
        answer = await at.http.patch(f"/clusters/{at.world.cluster.id}", json=promised)
        assert answer.status_code == 200
        await at.vm(0, "a", high_availability={"enabled": True})
        found = await shown(at, "switching host h1 off")
        assert found["message"].startswith("switches nothing off: ")
        assert "VM a" in found["message"]
        assert found["host_ids"] == []


async def _heard_asleep(at: Powered) -> bool:
    """Whether the scheduler has heard all that is to be said of the host."""
    host = await at.host(2)
    async with open_pool(at.world.settings.database, "scheduler") as tables:
        sql = "select revision from host_sleep where host_id = $1 and power_saving = 'asleep'"
        heard = await tables.fetchval(sql, host["id"]) == host["revision"]
    async with open_pool(at.world.settings.database, "inventory") as tables:
        dead = await tables.fetchval("select position('dead' in private) from host where id = $1", host["id"])
    return bool(heard and dead)
