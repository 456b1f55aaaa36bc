"""The protection of VMs is kept current: with the real scheduler, and an inventory that says what VMs need."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import pytest
from msgspec.structs import replace

from tests.ha.bmcs import AGENT, PASSWORD, Bmc, executing
from tests.ha.site import caller, uuid
from tests.ha.world import Inventory, becomes, ha, hearts, host, hurried, until, vm
from tests.scheduler.fleets import network_owner, scheduler
from tests.support.runtime import running
from tests.support.speaker import Speaker
from volery.contracts.agent import HostCapabilities
from volery.contracts.cluster import LIST_CLUSTERS, Cluster, GetById
from volery.contracts.errors import Refused
from volery.contracts.host import HOST_CHANGED, Host, HostStatus
from volery.contracts.operation import ListQuery
from volery.contracts.power import (
    PAUSE_FENCING,
    RESUME_FENCING,
    SET_POWER_MANAGEMENT,
    NewFenceDevice,
    PauseFencing,
    ResumeFencing,
    SetPowerManagement,
)
from volery.contracts.protection import (
    DESCRIBE_NEEDS,
    GET_PROTECTION,
    LIST_PROTECTION,
    VmNeed,
    VmNeeds,
    VmNeedsAnswer,
    VmProtection,
)
from volery.contracts.scheduling import Need
from volery.contracts.vm import VM_CHANGED, VM_DELETED, HighAvailability, Vm
from volery.runtime.bus import Bus, Caller
from volery.runtime.programs import Settings

GIB = 1024**3
SOON = {
    "VOLERY_HA_PROTECTION_SETTLE_SECONDS": "0.2",
    "VOLERY_HA_PROTECTION_BETWEEN_SECONDS": "0.2",
    "VOLERY_HA_PROTECTION_CAPACITY_SECONDS": "0.5",
    "VOLERY_HA_PROTECTION_LONGEST_SECONDS": "2",
}


@dataclass
class Needing(Inventory):
    """Says what its VMs need."""

    asked_about: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.lists = [*self.lists, (LIST_CLUSTERS, Cluster)]
        self.answers = [*self.answers, (DESCRIBE_NEEDS, self._needs)]

    async def _needs(self, _: Speaker, ask: VmNeeds, caller: Caller) -> VmNeedsAnswer:
        self.asked_about += len(ask.vm_ids)
        found = [self.objects.get(vm_id) for vm_id in ask.vm_ids]
        return VmNeedsAnswer(vms=tuple(need_of(v) for v in found if isinstance(v, Vm)))


def need_of(one: Vm) -> VmNeed:
    need = Need(
        vm_id=one.id,
        cluster_id=one.cluster_id,
        memory_bytes=one.memory_bytes,
        vcpus=one.vcpus,
        name=one.name,
        host_ids=one.affinity.host_ids,
    )
    return VmNeed(
        need=need,
        host_id=one.host_id,
        highly_available=one.high_availability.enabled,
        settled=not one.busy_with,
    )


@dataclass
class Place:
    bus: Bus
    owner: Needing
    hosts: list[Host]
    web: Vm

    async def is_said(self, vm_id: str, *codes: str, protected: bool = False) -> VmProtection:
        """Waits until a VM's protection is this."""
        found: VmProtection | None = None

        async def said() -> VmProtection | None:
            nonlocal found
            try:
                found = await self.bus.ask(GET_PROTECTION, GetById(id=vm_id))
            except Refused:
                return None
            same = [reason.code for reason in found.reasons] == list(codes)
            return found if found.protected is protected and same else None

        try:
            shown: VmProtection = await until(said)
        except AssertionError:
            raise AssertionError(f"not {codes}, protected {protected}: {found}") from None
        return shown

    async def says_host(self, number: int, **fields: Any) -> None:
        at = self.hosts[number]
        self.hosts[number] = replace(at, revision=at.revision + 1, **fields)
        await self.owner.says(HOST_CHANGED, self.hosts[number])

    async def says_vm(self, one: Vm, **fields: Any) -> Vm:
        new = replace(one, revision=one.revision + 1, **fields)
        await self.owner.says(VM_CHANGED, new)
        return new


@asynccontextmanager
async def place(configured: Settings, tmp_path: Path, replicas: int = 1) -> AsyncIterator[Place]:
    """Two hosts, a BMC each that was tested, and a VM that runs on the first."""
    owner = Needing()
    hosts = [
        host(
            f"h{n}",
            boot_id="boot-1",
            capabilities=HostCapabilities(
                dmi_uuid=uuid(n), fence_agents=(AGENT,), memory_bytes=8 * GIB, cpus=4, machines=("q35",)
            ),
        )
        for n in range(2)
    ]
    now = hosts[0].created_at
    cluster = Cluster(id="c", revision=1, created_at=now, updated_at=now, name="c", data_center_id="dc")
    web = vm(host_id=hosts[0].id, memory_bytes=GIB)
    owner.knows(cluster, *hosts, web)
    settings = hurried(configured, VOLERY_HA_KEY_FILE=str(tmp_path / "ha.key"), **SOON)
    services = [owner.service(), network_owner().service(), scheduler(), *(ha() for _ in range(replicas))]
    async with (
        running(settings, *services) as bus,
        executing(bus.client, *(h.id for h in hosts)) as executors,
        hearts(bus.client, *hosts) as beating,
    ):
        for number, each in enumerate(hosts):
            executors.bmcs[f"bmc{number}"] = Bmc(uuid(number))
            beating[number].boot_id = "boot-1"
            await becomes(bus, each.id, "up")
        yield Place(bus, owner, hosts, web)


async def set_power(bus: Bus, host_id: str, number: int, **fields: Any) -> None:
    device = NewFenceDevice(
        agent=AGENT, address=f"bmc{number}", username="u", secrets={"password": PASSWORD}, timeout_seconds=2
    )
    ask = replace(SetPowerManagement(id=host_id, devices=(device,)), **fields)
    await bus.ask(SET_POWER_MANAGEMENT, ask, caller("set"))


async def test_a_vm_becomes_protected_step_by_step_and_says_what_is_missing(
    configured: Settings, tmp_path: Path
) -> None:
    """Whichever of two replicas is asked to set something."""
    async with place(configured, tmp_path, replicas=2) as at:
        first, second = at.hosts
        said = await at.is_said(at.web.id, "no_proof")
        assert (said.vm_name, said.cluster_id, said.host_id) == ("web", "c", first.id)
        assert "host h0 has no power management" in said.reasons[0].message
        await set_power(at.bus, first.id, 0)
        await at.is_said(at.web.id, protected=True)

        await at.bus.ask(PAUSE_FENCING, PauseFencing(seconds=600, reason="a new switch"), caller("pause"))
        paused = await at.is_said(at.web.id, "fencing_paused")
        assert "a new switch" in paused.reasons[0].message
        await at.bus.ask(RESUME_FENCING, ResumeFencing(), caller("resume"))
        await at.is_said(at.web.id, protected=True)

        await at.says_host(1, status=HostStatus.MAINTENANCE)
        alone = await at.is_said(at.web.id, "no_other_host")
        assert "h1 is maintenance, not up" in alone.reasons[0].message
        assert alone.reasons[0].change == "activate h1"
        await at.says_host(1, status=HostStatus.UP)
        await at.is_said(at.web.id, protected=True)

        web = await at.says_vm(at.web, memory_bytes=16 * GIB)
        full = await at.is_said(at.web.id, "capacity")
        assert "h1 has" in full.reasons[0].message
        web = await at.says_vm(web, memory_bytes=GIB, host_id=second.id)
        await at.is_said(at.web.id, "no_proof")
        await at.says_vm(web, high_availability=HighAvailability())

        async def forgotten() -> bool:
            return not (await at.bus.ask(LIST_PROTECTION, ListQuery())).items

        await until(forgotten)
        with pytest.raises(Refused, match="there is no protection of VM"):
            await at.bus.ask(GET_PROTECTION, GetById(id=at.web.id))


async def test_what_is_on_its_way_keeps_what_was_said_and_what_is_gone_is_forgotten(
    configured: Settings, tmp_path: Path
) -> None:
    async with place(configured, tmp_path) as at:
        await at.is_said(at.web.id, "no_proof")
        db = vm(name="db", host_id=at.hosts[1].id, memory_bytes=GIB)
        await at.owner.says(VM_CHANGED, db)
        before = await at.is_said(db.id, "no_proof")
        moving = await at.says_vm(db, busy_with="inventory-1", host_id="")
        asked = at.owner.asked_about

        async def asked_again() -> bool:
            return at.owner.asked_about >= asked + 3

        await until(asked_again)
        assert await at.bus.ask(GET_PROTECTION, GetById(id=db.id)) == before
        await at.owner.says(VM_DELETED, replace(moving, revision=9))

        async def only_web() -> bool:
            page = await at.bus.ask(
                LIST_PROTECTION, ListQuery(filter={"cluster_id": "c", "protected": "false"})
            )
            return [msgspec.json.decode(i, type=VmProtection).vm_id for i in page.items] == [at.web.id]

        await until(only_web)


async def test_a_thousand_vms_are_judged_within_seconds_and_written_once(
    configured: Settings, tmp_path: Path
) -> None:
    async with place(configured, tmp_path) as at:
        await at.is_said(at.web.id, "no_proof")
        many = [vm(name=f"vm{n:03}", host_id=at.hosts[0].id, memory_bytes=GIB) for n in range(999)]
        at.owner.knows(*many)
        began = time.monotonic()
        await at.owner.says(VM_CHANGED, *many)

        async def all_said() -> bool:
            found = await at.bus.ask(LIST_PROTECTION, ListQuery(limit=1000, filter={"protected": "false"}))
            return len(found.items) == 1000

        await until(all_said, 60)
        assert time.monotonic() - began < 30
        asked = at.owner.asked_about

        async def all_judged_again() -> bool:
            return at.owner.asked_about >= asked + 2000

        await until(all_judged_again, 60)
        page = await at.bus.ask(LIST_PROTECTION, ListQuery(limit=1000))
        assert {msgspec.json.decode(item, type=VmProtection).revision for item in page.items} == {1}
