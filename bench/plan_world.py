"""A cluster as Ganeti has it, in the scheduler and in inventory: both real, each in a process of its own, asked on the bus."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import asyncpg
import msgspec

from bench.claims_world import Alone, Size, scheduler_alone
from services.inventory.store import CLUSTERS, DATA_CENTERS, HOSTS, VMS, HostPrivate, VmPrivate
from volery.contracts.agent import HostCapabilities
from volery.contracts.base import encode
from volery.contracts.cluster import Cluster, DataCenter
from volery.contracts.host import Host, HostStatus
from volery.contracts.ids import new_id
from volery.contracts.metrics import METRICS_SUBJECT, HostSample, VmSample
from volery.contracts.plan import MAKE_PLAN, MakePlan, Plan
from volery.contracts.scheduling_policy import (
    CREATE_SCHEDULING_POLICY,
    GIVE_SCHEDULING_POLICY,
    CreateSchedulingPolicy,
    GiveSchedulingPolicy,
)
from volery.contracts.vm import DesiredState, HighAvailability, Vm, VmStatus
from volery.runtime.bus import Bus, Caller, open_bus
from volery.runtime.database import open_pool
from volery.runtime.tables import Nothing, commit

MIB = 1024**2
BALANCE = "even_overall_distribution"
"""What hbal counts, nearly."""
VCPU_PERCENT = 40.0
"""How busy a vCPU is: the fullest node has 63 on 32 CPUs."""
SETTINGS = {"VOLERY_SCHEDULER_GUEST_OVERHEAD_MIB": "0", "VOLERY_SCHEDULER_HOST_RESERVE_MIB": "1024"}
"""As the Ganeti cluster counts."""
HEARD_SECONDS = 180


@dataclass(frozen=True, slots=True)
class Running:
    """A VM by number: what it has, and the number of its node."""

    mib: int
    vcpus: int
    node: int


@dataclass(frozen=True, slots=True)
class Planner:
    bus: Bus
    cluster_id: str
    nodes: dict[str, int]
    vms: dict[str, int]

    async def planned(self) -> tuple[list[tuple[int, int]], float]:
        """Moves as (VM, node) in their order, and the seconds from the request on the bus to the plan."""
        ask = MakePlan(cluster_id=self.cluster_id, dry_run=True)
        began = time.perf_counter()
        answer = await self.bus.ask(MAKE_PLAN, ask, _caller())
        seconds = time.perf_counter() - began
        plan = msgspec.convert(answer.result["plan"], Plan, strict=False)
        return [(self.vms[step.vm_id], self.nodes[step.target_host_id]) for step in plan.steps], seconds


def _caller() -> Caller:
    return Caller("admin", new_id(), "bench")


@asynccontextmanager
async def planner(
    nodes: int, mib: int, cpus: int, ratio: float, vms: Sequence[Running]
) -> AsyncIterator[Planner]:
    """The scheduler learns of the cluster from inventory, claims what runs there, and is told how busy it is."""
    async with (
        scheduler_alone(Size(0, 0, []), settings=SETTINGS, filled=_nothing, beside=["inventory"]) as alone,
        open_bus(alone.bus, "gateway") as asking,
        open_bus(alone.bus, "inventory") as telling,
    ):
        now = datetime.now(UTC)
        base: dict[str, Any] = {"revision": 1, "created_at": now, "updated_at": now}
        center = DataCenter(id=new_id(), name="bench", **base)
        cluster = Cluster(
            id=new_id(), name="bench", data_center_id=center.id, cpu_overcommit_ratio=ratio, reserve_host_failures=1, **base
        )  # fmt: skip
        base |= {"data_center_id": center.id, "cluster_id": cluster.id}
        can = HostCapabilities(cpus=cpus, memory_bytes=mib * MIB)
        hosts = [
            Host(id=new_id(), name=f"node{n}", status=HostStatus.UP, capabilities=can, **base)
            for n in range(nodes)
        ]
        made = [
            Vm(
                id=new_id(), name=f"vm{n}", status=VmStatus.UP, desired=DesiredState.UP, host_id=hosts[vm.node].id, epoch=1,
                memory_bytes=vm.mib * MIB, vcpus=vm.vcpus, high_availability=HighAvailability(enabled=True), **base,
            )
            for n, vm in enumerate(vms)
        ]  # fmt: skip
        async with open_pool(alone.services, "inventory") as pool:
            await commit(pool, [DATA_CENTERS.insert(center, Nothing())])
            await commit(pool, [CLUSTERS.insert(cluster, Nothing())])
            await commit(pool, [HOSTS.insert(host, HostPrivate()) for host in hosts])
            await commit(pool, [VMS.insert(vm, VmPrivate()) for vm in made])
        await _claimed(alone, len(made))
        await _busy(telling, hosts, made, cpus)
        await _given(asking, cluster.id)
        yield Planner(
            asking,
            cluster.id,
            {host.id: n for n, host in enumerate(hosts)},
            {vm.id: n for n, vm in enumerate(made)},
        )


async def _nothing(connection: object) -> list[str]:
    return []


async def _claimed(alone: Alone, count: int) -> None:
    """Until the scheduler has claimed capacity for all that runs."""
    connection = await asyncpg.connect(
        alone.database, database="volery", server_settings={"search_path": "scheduler"}
    )
    try:
        async with asyncio.timeout(HEARD_SECONDS):
            while await connection.fetchval("select count(*) from claim") < count:
                await asyncio.sleep(0.5)
    finally:
        await connection.close()


async def _busy(bus: Bus, hosts: Sequence[Host], vms: Sequence[Vm], cpus: int) -> None:
    now = datetime.now(UTC)
    for host in hosts:
        samples = tuple(
            VmSample(vm_id=vm.id, cpu_percent=VCPU_PERCENT * vm.vcpus, memory_bytes=vm.memory_bytes)
            for vm in vms
            if vm.host_id == host.id
        )
        sample = HostSample(
            host_id=host.id, boot_id="b", at=now, cpu_percent=sum(each.cpu_percent for each in samples) / cpus,
            memory_bytes=host.capabilities.memory_bytes, vms=samples,
        )  # fmt: skip
        await bus.client.publish(METRICS_SUBJECT.format(host_id=host.id), encode(sample))
    await bus.client.flush()


async def _given(bus: Bus, cluster_id: str) -> None:
    made = await bus.ask(
        CREATE_SCHEDULING_POLICY, CreateSchedulingPolicy(name="overall", balance=BALANCE), _caller()
    )
    await bus.ask(
        GIVE_SCHEDULING_POLICY, GiveSchedulingPolicy(cluster_id=cluster_id, policy_id=made.id), _caller()
    )
