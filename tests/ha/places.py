"""Two hosts with ha and the real scheduler, and an inventory that says what VMs need."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from tests.ha.bmcs import AGENT, PASSWORD, Bmc, executing
from tests.ha.site import caller, uuid
from tests.ha.world import (
    CLUSTER,
    CLUSTER_ID,
    Heart,
    Inventory,
    becomes,
    ha,
    hearts,
    host,
    hurried,
    until,
    vm,
)
from tests.scheduler.fleets import network_owner, scheduler
from tests.support.runtime import running
from tests.support.speaker import Speaker
from volery.contracts.agent import HostCapabilities
from volery.contracts.cluster import LIST_CLUSTERS, Cluster, GetById
from volery.contracts.errors import Refused
from volery.contracts.host import HOST_CHANGED, Host
from volery.contracts.power import (
    SET_POWER_MANAGEMENT,
    NewFenceDevice,
    SetPowerManagement,
)
from volery.contracts.protection import (
    DESCRIBE_NEEDS,
    GET_PROTECTION,
    VmNeed,
    VmNeeds,
    VmNeedsAnswer,
    VmProtection,
)
from volery.contracts.scheduling import Need
from volery.contracts.vm import VM_CHANGED, Vm
from volery.runtime.bus import Bus, Caller
from volery.runtime.programs import Settings

GIB = 1024**3
SOON = {
    "VOLERY_HA_PROTECTION_SETTLE_SECONDS": "0.2",
    "VOLERY_HA_PROTECTION_BETWEEN_SECONDS": "0.2",
    "VOLERY_HA_PROTECTION_CAPACITY_SECONDS": "0.5",
    "VOLERY_HA_PROTECTION_LONGEST_SECONDS": "1",
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
    cluster: Cluster
    hearts: list[Heart]

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
async def place(configured: Settings, tmp_path: Path, replicas: int = 1, **more: str) -> AsyncIterator[Place]:
    """Two hosts, a BMC each that was tested, and a VM that runs on the first."""
    owner = Needing()
    hosts = [
        host(
            f"h{n}",
            cluster_id=CLUSTER_ID,
            boot_id="boot-1",
            capabilities=HostCapabilities(
                dmi_uuid=uuid(n), fence_agents=(AGENT,), memory_bytes=8 * GIB, cpus=4, machines=("q35",)
            ),
        )
        for n in range(2)
    ]
    web = vm(host_id=hosts[0].id, memory_bytes=GIB, cluster_id=CLUSTER_ID)
    owner.knows(*hosts, web)
    settings = hurried(configured, VOLERY_HA_KEY_FILE=str(tmp_path / "ha.key"), **(SOON | more))
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
        yield Place(bus, owner, hosts, web, CLUSTER, beating)


async def set_power(bus: Bus, host_id: str, number: int, **fields: Any) -> None:
    device = NewFenceDevice(
        agent=AGENT, address=f"bmc{number}", username="u", secrets={"password": PASSWORD}, timeout_seconds=2
    )
    ask = replace(SetPowerManagement(id=host_id, devices=(device,)), **fields)
    await bus.ask(SET_POWER_MANAGEMENT, ask, caller("set"))
