"""A host sleeps and is woken, through REST: gateway, inventory, scheduler and ha are real; BMCs end and begin the hosts."""

from __future__ import annotations

import asyncio
from pathlib import Path

from tests.api_gateway.scripted import decoded
from tests.ha.powered import powered, until
from tests.ha.strangers import DOMAIN
from volery.contracts.domain_orders import MIGRATE_DOMAIN, RUN_DOMAIN
from volery.contracts.fencing import PowerAction, PowerState
from volery.runtime.programs import Settings


async def test_a_host_sleeps_and_is_woken(configured: Settings, tmp_path: Path) -> None:
    """Its VM moves first; nobody takes its silence for a death, fences it, or places a VM on it."""
    async with powered(configured, tmp_path) as at:
        web = await at.vm(0, "web")
        shown = decoded(await at.http.post(f"/hosts/{at.machines[0].id}/save-power?dry_run=true", json={}))
        assert [fate["name"] for fate in shown["result"]["plan"]] == ["web"]
        assert (await at.host(0))["power_saving"] == "awake"

        op = await at.does(0, "save-power", {"reason": "night"})
        assert op["state"] == "succeeded", op
        assert at.bmcs[0].power is PowerState.OFF
        assert at.bmcs[0].victims == [()]
        host = await at.is_host(0, power_saving="asleep", status="maintenance", busy_with="")
        assert host["power_saving_reason"] == "night"
        assert host["power_on_proven_at"] is None
        assert await at.where(web) in (at.machines[1].id, at.machines[2].id)

        async def proven() -> bool:
            return (await at.liveness(0))["state"] == "dead"

        await until(proven)
        await asyncio.sleep(4)  # longer than the silence before a fence
        assert (await at.host(0))["status"] == "maintenance"
        assert at.bmcs[0].did(PowerAction.OFF) == 1
        assert at.bmcs[0].did(PowerAction.ON) == 0
        refused = await at.ended(
            decoded(await at.http.post(f"/vms/{web}/migrate", json={"host_id": at.machines[0].id}))
        )
        assert refused["state"] == "failed"

        op = await at.does(0, "activate")
        assert (op["kind"], op["state"]) == ("host.wake", "succeeded"), op
        host = await at.is_host(0, power_saving="awake", status="up", busy_with="", power_saving_reason="")
        assert host["power_on_proven_at"] is not None
        assert at.bmcs[0].did(PowerAction.ON) == 1
        moved = await at.ended(
            decoded(await at.http.post(f"/vms/{web}/migrate", json={"host_id": at.machines[0].id}))
        )
        assert moved["state"] == "succeeded", moved
        records = decoded(await at.http.get("/fence-records"))["items"]
        assert [(r["requested_by"], r["state"]) for r in records] == [("service:inventory", "succeeded")] * 2


async def test_what_cannot_be_woken_is_not_put_to_sleep(configured: Settings, tmp_path: Path) -> None:
    async with powered(configured, tmp_path) as at:
        await at.http.delete(f"/hosts/{at.machines[0].id}/power-management")
        refused = await at.asked(0, "save-power")
        assert refused.status_code == 409
        assert "it has no power management, so nobody could wake it" in decoded(refused)["detail"]
        await at.http.post("/fencing/pause", json={"seconds": 600, "reason": "switch replaced"})
        refused = await at.asked(1, "save-power")
        assert "fencing is paused" in decoded(refused)["detail"]
        await at.http.post("/fencing/resume", json={})
        at.machines[2].agent.beating = False
        await at.is_host(2, status="non_responsive")
        refused = await at.asked(1, "save-power")
        assert "1 other hosts of its cluster are silent" in decoded(refused)["detail"]
        refused = await at.asked(1, "wake")
        assert "doesn't sleep" in decoded(refused)["detail"]
        assert [bmc.did(PowerAction.OFF) for bmc in at.bmcs] == [0, 0, 0]


async def test_a_vm_that_is_being_started_there_goes_elsewhere_or_keeps_it_up(
    configured: Settings, tmp_path: Path
) -> None:
    async with powered(configured, tmp_path) as at:
        assert at.world.cluster is not None
        gate = at.machines[0].held[RUN_DOMAIN.kind] = asyncio.Event()
        body = {"name": "late", "cluster_id": at.world.cluster.id, "memory_bytes": 1 << 30}
        vm_id = (await at.ended(decoded(await at.http.post("/vms", json=body))))["object_id"]
        where = {"host_id": at.machines[0].id}
        start = decoded(await at.http.post(f"/vms/{vm_id}/start", json=where))
        await until(lambda: _begun(at.machines[0].begun))
        op = await at.does(0, "save-power")
        assert op["state"] == "failed"
        assert "is not empty: VMs late" in op["problem"]["message"]
        assert at.bmcs[0].did(PowerAction.OFF) == 0
        await at.is_host(0, power_saving="awake", status="up", busy_with="")
        gate.set()
        assert (await at.ended(start))["state"] == "succeeded"


async def _begun(event: asyncio.Event) -> bool:
    return event.is_set()


async def test_a_domain_that_nobody_knows_of_keeps_a_host_up(configured: Settings, tmp_path: Path) -> None:
    async with powered(configured, tmp_path, hosts=2) as at:
        stranger = at.machines[0]
        known = stranger.agent.reports["inventory"]

        def tell() -> dict[str, object]:
            return known() | {"domains": (DOMAIN,)}

        stranger.agent.reports["inventory"] = tell
        op = await at.does(0, "save-power")
        assert op["state"] == "failed"
        assert "stays up" in op["problem"]["message"]
        assert at.bmcs[0].did(PowerAction.OFF) == 0
        await at.is_host(0, power_saving="awake", status="up")


async def test_vms_that_cannot_leave_keep_a_host_up_and_so_does_whoever_cancels(
    configured: Settings, tmp_path: Path
) -> None:
    async with powered(configured, tmp_path, hosts=2) as at:
        await at.vm(0, "stays", migration={"allowed": False})
        op = await at.does(0, "save-power")
        assert (op["state"], "stays: " in op["problem"]["message"]) == ("failed", True), op
        await at.is_host(0, power_saving="awake", status="up", busy_with="")

        await at.vm(1, "slow")
        gate = at.machines[1].held[MIGRATE_DOMAIN.kind] = asyncio.Event()
        begun = await at.begun(1, "save-power")

        async def moving() -> bool:
            return any(type(ask).__name__ == "MigrateDomain" for ask in at.machines[1].asked)

        await until(moving)
        cancelled = await at.http.post(f"/operations/{begun['id']}/cancel", json={})
        assert cancelled.status_code in (200, 202), cancelled.text
        gate.set()
        op = await at.ended(begun)
        assert op["state"] == "cancelled", op
        await at.is_host(1, power_saving="awake", status="up", busy_with="")
        assert [bmc.did(PowerAction.OFF) for bmc in at.bmcs] == [0, 0]


async def test_a_bmc_that_does_nothing_leaves_the_host_up(configured: Settings, tmp_path: Path) -> None:
    """It says on, and no order can come true any more."""
    async with powered(configured, tmp_path, hosts=2) as at:
        at.bmcs[0].obeys = False
        op = await at.does(0, "save-power")
        assert op["state"] == "failed"
        assert "stays up" in op["problem"]["message"], op
        await at.is_host(0, power_saving="awake", status="up", busy_with="")
        assert at.bmcs[0].did(PowerAction.OFF) == 1


async def test_a_bmc_that_falls_silent_leaves_it_asleep_and_it_can_be_woken(
    configured: Settings, tmp_path: Path
) -> None:
    """Nobody knows whether it is off: so it gets no VM."""
    async with powered(configured, tmp_path, hosts=2, VOLERY_INVENTORY_POWER_SECONDS="4") as at:
        at.bmcs[0].obeys = False
        at.bmcs[0].broken = {PowerAction.OFF, PowerAction.STATUS}
        op = await at.does(0, "save-power")
        assert op["state"] == "failed"
        assert "isn't certain whether" in op["problem"]["message"], op
        await at.is_host(0, power_saving="asleep", status="maintenance", busy_with="")
        at.bmcs[0].broken, at.bmcs[0].obeys = set(), True
        await asyncio.sleep(3)
        op = await at.does(0, "wake")
        assert op["state"] in ("succeeded", "failed"), op
        if op["state"] == "failed":  # the order to switch off could still have come true
            assert "sleeps on" in op["problem"]["message"], op
            await asyncio.sleep(4)
            op = await at.does(0, "wake")
        assert op["state"] == "succeeded", op
        host = await at.is_host(0, power_saving="awake", status="up")
        assert host["power_on_proven_at"] is None  # it was on all the time


async def test_a_host_that_does_not_report_is_said_to_be_lost(configured: Settings, tmp_path: Path) -> None:
    async with powered(configured, tmp_path, hosts=2, VOLERY_INVENTORY_WAKE_SECONDS="2") as at:
        await at.sleeps(0)
        at.bmcs[0].starts = False
        op = await at.does(0, "wake")
        assert op["state"] == "failed"
        assert "has not reported for 2 s" in op["problem"]["message"]
        host = await at.is_host(0, power_saving="awake", busy_with="")
        assert host["status"] in ("down", "non_responsive", "connecting")
        assert "could not be woken" in host["power_saving_reason"]
        assert host["power_on_proven_at"] is None
        await at.machines[0].boot()
        await at.is_host(0, status="up")


async def test_a_bmc_that_cannot_switch_on_leaves_it_asleep_without_proof(
    configured: Settings, tmp_path: Path
) -> None:
    async with powered(configured, tmp_path, hosts=2, VOLERY_INVENTORY_POWER_SECONDS="3") as at:
        await at.sleeps(0)
        assert (await at.does(0, "wake"))["state"] == "succeeded"
        assert (await at.host(0))["power_on_proven_at"] is not None
        await at.is_host(0, status="up")
        await at.sleeps(0)
        at.bmcs[0].broken = {PowerAction.ON}
        op = await at.does(0, "wake")
        assert op["state"] == "failed"
        assert "could not be woken, and sleeps on" in op["problem"]["message"]
        host = await at.is_host(0, power_saving="asleep", status="maintenance")
        assert host["power_on_proven_at"] is None


async def test_a_host_that_somebody_switches_on_stays_in_maintenance(
    configured: Settings, tmp_path: Path
) -> None:
    async with powered(configured, tmp_path, hosts=2) as at:
        await at.sleeps(0)
        at.bmcs[0].power = PowerState.ON
        await at.machines[0].boot()
        host = await at.is_host(0, power_saving="awake", status="maintenance")
        assert "activate it" in host["power_saving_reason"]
        op = await at.does(0, "activate")
        assert (op["kind"], op["state"]) == ("host.activate", "succeeded")
        await at.is_host(0, status="up")
