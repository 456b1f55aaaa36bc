"""Inventory with hosts in memory: a scheduler that takes the first host, an ha that says what a test wants said."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import msgspec
from msgspec.structs import replace

from services.inventory.service import service as inventory
from tests.inventory.scripted_scheduler import Scheduler
from tests.support.bell import Bell
from tests.support.runtime import running
from tests.support.scripted_agent import ScriptedAgent
from tests.support.speaker import Speaker
from volery.contracts.agent import (
    DOMAIN_CHANGED,
    DomainReport,
    HostCapabilities,
)
from volery.contracts.base import Done, Owner
from volery.contracts.cluster import (
    CREATE_CLUSTER,
    CREATE_DATA_CENTER,
    Cluster,
    CreateCluster,
    CreateDataCenter,
    GetById,
)
from volery.contracts.domain import DomainState
from volery.contracts.domain_orders import (
    ACT_ON_DOMAIN,
    ADMIT_MIGRATION,
    ATTACH_DISK,
    DETACH_DISK,
    DETACH_NIC,
    DISCARD_MEMORY,
    FORGET_DOMAIN,
    MIGRATE_DOMAIN,
    RUN_DOMAIN,
    SAVE_DOMAIN,
    STOP_DOMAIN,
    SWITCH_DISKS,
    DomainRunning,
    DomainStopped,
    MigrationAdmitted,
    MigrationDone,
)
from volery.contracts.errors import Kind, Refused
from volery.contracts.host import CREATE_HOST, GET_HOST, CreateHost, Host, HostStatus
from volery.contracts.ids import new_id
from volery.contracts.liveness import (
    LIVENESS_CHANGED,
    HostLiveness,
    LivenessState,
    Proof,
    ProofKind,
)
from volery.contracts.operation import ENDED, GET_OPERATION, GetOperation, Operation, OperationState
from volery.contracts.vm import CREATE_VM, GET_VM, CreateVm, HighAvailability, Vm, VmStatus
from volery.runtime.bus import Bus
from volery.runtime.database import open_pool
from volery.runtime.programs import Settings
from volery.runtime.service import Service

MIB = 1024 * 1024
SECONDS = 30.0


async def until(true: Callable[[], Awaitable[Any]], what: str = "", seconds: float = SECONDS) -> Any:
    """What it returned, once that is true."""
    async with asyncio.timeout(seconds):
        while not (found := await true()):
            await asyncio.sleep(0.02)
    return found


@dataclass
class Machine:
    """One boot after the other of a host: its agent, and the domains that run there."""

    agent: ScriptedAgent
    others: dict[str, Machine]
    domains: dict[str, DomainReport] = field(default_factory=dict)
    held: dict[str, asyncio.Event] = field(default_factory=dict)
    """Kind of order → it waits for this before it is carried out."""
    refusals: dict[str, Refused] = field(default_factory=dict)
    """Kind of order → how it is refused."""
    begun: asyncio.Event = field(default_factory=asyncio.Event)
    started: list[tuple[str, str]] = field(default_factory=list)
    """(boot, VM) of every domain that wasn't there and was started."""
    storage_work: tuple[str, ...] = ()
    """Kinds of storage's orders that the host is carrying out."""
    shared_cpus: tuple[int, ...] | None = None
    """Those for guests that have none of their own."""
    asked: list[Any] = field(default_factory=list)
    """Every order, as it came."""
    memories: set[str] = field(default_factory=set)
    """Files with the memory of suspended VMs."""

    def __post_init__(self) -> None:
        acts = {
            RUN_DOMAIN: self._run,
            STOP_DOMAIN: self._stop,
            FORGET_DOMAIN: self._forget,
            ACT_ON_DOMAIN: self._act,
            ADMIT_MIGRATION: self._admit,
            MIGRATE_DOMAIN: self.moved,
            DETACH_NIC: self._act,
            SWITCH_DISKS: self._act,
            ATTACH_DISK: self._plug,
            DETACH_DISK: self._unplug,
            SAVE_DOMAIN: self._save,
            DISCARD_MEMORY: self._discard,
        }
        for order, act in acts.items():
            self.agent.does(order, self.gated(order.kind, act))
        self.agent.reports["inventory"] = lambda: {
            "capabilities": HostCapabilities(
                hostname="scripted",
                cpus=8,
                memory_bytes=1 << 34,
                libvirt_uri=self.id,
                libvirt_version=9_000_000,
            ),
            "domains": tuple(self.domains.values()),
            "storage_work": self.storage_work,
        }

    @property
    def id(self) -> str:
        return self.agent.host_id

    def gated(self, kind: str, act: Any) -> Any:
        async def gated(question: Any) -> Any:
            self.begun.set()
            self.asked.append(question)
            if (gate := self.held.get(kind)) is not None:
                await gate.wait()
            if (refusal := self.refusals.get(kind)) is not None:
                raise refusal
            return await act(question)

        return gated

    def _epoch(self, vm_id: str) -> int:
        return self.agent.at_work[vm_id].epoch

    async def tell(self, vm_id: str, state: DomainState, epoch: int, reason: str = "") -> None:
        report = DomainReport(
            vm_id=vm_id, epoch=epoch, order_seq=0, name=vm_id, state=state, reason=reason, installation="test"
        )
        if state in (DomainState.GONE, DomainState.SHUTOFF, DomainState.CRASHED):
            self.domains.pop(vm_id, None)
        else:
            self.domains[vm_id] = report
        await self.agent.say("inventory", DOMAIN_CHANGED, domain=report)

    async def _run(self, ask: Any) -> DomainRunning:
        if ask.vm_id not in self.domains:
            if ask.goes_on:
                raise Refused(Kind.CONFLICT, "it doesn't run here any more")
            self.started.append((self.agent.boot_id, ask.vm_id))
        await self.tell(ask.vm_id, DomainState.RUNNING, self._epoch(ask.vm_id), "booted")
        return DomainRunning(vm_id=ask.vm_id, state=DomainState.RUNNING)

    async def _stop(self, ask: Any) -> DomainStopped:
        if (had := self.domains.get(ask.vm_id)) is not None:
            await self.tell(ask.vm_id, DomainState.SHUTOFF, had.epoch, "shutdown")
        return DomainStopped(vm_id=ask.vm_id)

    async def _save(self, ask: Any) -> Done:
        self.memories.add(ask.path)
        await self.tell(ask.vm_id, DomainState.SHUTOFF, self._epoch(ask.vm_id), "saved")
        return Done()

    async def _discard(self, ask: Any) -> Done:
        self.memories.discard(ask.path)
        return Done()

    async def _forget(self, ask: Any) -> Done:
        if (had := self.domains.get(ask.vm_id)) is not None:
            await self.tell(ask.vm_id, DomainState.GONE, had.epoch)
        return Done()

    async def _act(self, ask: Any) -> Done:
        return Done()

    async def _plug(self, ask: Any) -> Done:
        self._has(ask.vm_id, {*self.domains[ask.vm_id].disk_ids, ask.disk.disk_id})
        return Done()

    async def _unplug(self, ask: Any) -> Done:
        self._has(ask.vm_id, {*self.domains[ask.vm_id].disk_ids} - {ask.disk_id})
        return Done()

    def _has(self, vm_id: str, disk_ids: Iterable[str]) -> None:
        self.domains[vm_id] = replace(self.domains[vm_id], disk_ids=tuple(sorted(disk_ids)))

    async def _admit(self, ask: Any) -> MigrationAdmitted:
        return MigrationAdmitted(shared_cpus=self.shared_cpus)

    async def moved(self, ask: Any) -> MigrationDone:
        await self.arrive(ask.vm_id, self.others[ask.destination_uri], ask.destination_epoch)
        await self.tell(ask.vm_id, DomainState.SHUTOFF, self._epoch(ask.vm_id), "migrated")
        return MigrationDone(vm_id=ask.vm_id)

    async def arrive(self, vm_id: str, there: Machine, epoch: int) -> None:
        await there.tell(vm_id, DomainState.RUNNING, epoch, "migrated")

    # Its life

    async def die(self) -> str:
        """Power lost: nothing of it runs any more. Returns the boot that ended."""
        await self.agent.kill()
        self.domains.clear()
        return self.agent.boot_id

    async def boot(self) -> None:
        """Power comes back. What the journal has open of the former boot ends as failed."""
        self.agent.boot_id = new_id()
        for entry in self.agent.journal.values():
            if entry.outcome is None:
                entry.task = None
                await self.agent.fail_after_reboot(entry)
        await self.agent.start()


@dataclass
class World:
    bus: Bus
    settings: Settings
    scheduler: Scheduler
    ha: Speaker
    cluster: Cluster | None = None
    machines: dict[str, Machine] = field(default_factory=dict)
    livenesses: dict[str, HostLiveness] = field(default_factory=dict)
    vms: int = 0

    async def machine(self, name: str) -> Machine:
        """A host, up."""
        assert self.cluster is not None
        made = await self.bus.ask(CREATE_HOST, CreateHost(name=name, cluster_id=self.cluster.id))
        agent = ScriptedAgent(self.settings.bus.servers, host_id=made.host.id, owners=("inventory",))
        machine = self.machines[made.host.id] = Machine(agent, self.machines)
        self.scheduler.host_ids.append(made.host.id)
        await agent.start()
        await self.host_is(machine, HostStatus.UP)
        return machine

    async def host_is(self, machine: Machine, status: HostStatus) -> Host:
        async def shown() -> Host | None:
            host = await self.bus.ask(GET_HOST, GetById(id=machine.id))
            return host if host.status is status else None

        found: Host = await until(shown)
        return found

    async def vm(self, *, ha: bool = False, start: bool = True, **fields: Any) -> Vm:
        """A VM that runs on the first host."""
        op = await self.create(ha=ha, start=start, **fields)
        assert (await self.ended(op)).state is OperationState.SUCCEEDED
        return await self.get(op.object_id)

    async def create(self, *, ha: bool = False, start: bool = True, **fields: Any) -> Operation:
        assert self.cluster is not None
        self.vms += 1
        ask = CreateVm(
            name=f"vm{self.vms}",
            cluster_id=self.cluster.id,
            memory_bytes=64 * MIB,
            start=start,
            high_availability=HighAvailability(enabled=ha),
            **fields,
        )
        return await self.bus.ask(CREATE_VM, ask)

    async def get(self, vm_id: str) -> Vm:
        return await self.bus.ask(GET_VM, GetById(id=vm_id))

    async def vm_is(self, vm_id: str, status: VmStatus) -> Vm:
        """The VM once it is free and in this state."""

        async def shown() -> Vm | None:
            vm = await self.get(vm_id)
            return vm if vm.status is status and not vm.busy_with else None

        found: Vm = await until(shown)
        return found

    async def operation(self, op: Operation) -> Operation:
        owner = Owner(op.id.split("-", 1)[0])
        return await self.bus.ask(GET_OPERATION[owner], GetOperation(id=op.id))

    async def ended(self, op: Operation) -> Operation:
        async def found() -> Operation | None:
            now = await self.operation(op)
            return now if now.state in ENDED and not now.outcome_pending else None

        end: Operation = await until(found)
        return end

    async def liveness(
        self,
        machine: Machine,
        state: LivenessState,
        *,
        boot_id: str = "",
        proof: Proof | None = None,
        announced: bool = True,
    ) -> None:
        """What ha says of a host. A proof stays until another comes."""
        before = self.livenesses.get(machine.id)
        now = datetime.now(UTC)
        said = HostLiveness(
            id=machine.id,
            revision=before.revision + 1 if before else 1,
            created_at=now,
            updated_at=now,
            state=state,
            boot_id=boot_id or machine.agent.boot_id,
            proof=proof if proof is not None else before.proof if before else None,
        )
        self.livenesses[machine.id] = said
        if announced:
            await self.ha.says(LIVENESS_CHANGED, said)
        else:
            self.ha.knows(said)

    async def proven_dead(self, machine: Machine, boot_id: str, *, announced: bool = True) -> Proof:
        proof = Proof(id=new_id(), kind=ProofKind.BMC_OFF, at=datetime.now(UTC), boot_id=boot_id)
        await self.liveness(machine, LivenessState.DEAD, boot_id=boot_id, proof=proof, announced=announced)
        return proof

    async def void(self, machine: Machine) -> None:
        """A sign of life of the boot that was said to have ended."""
        self.livenesses[machine.id] = msgspec.structs.replace(self.livenesses[machine.id], proof=None)
        await self.liveness(machine, LivenessState.UP)

    async def until_noted(self, machine: Machine, boot_id: str) -> None:
        """Until inventory has done all that follows from a death."""
        marker = Machine(ScriptedAgent("", host_id=new_id()), {})
        async with open_pool(self.settings.database, "inventory") as pool:

            async def noted(host_id: str, boot_id: str) -> bool:
                sql = "select 1 from host_death where host_id = $1 and boot_id = $2"
                return bool(await pool.fetchval(sql, host_id, boot_id))

            await until(lambda: noted(machine.id, boot_id))
            # One after the other: when a death that was said now is noted, what follows from the former was done.
            await self.proven_dead(marker, "marker")
            await until(lambda: noted(marker.id, "marker"))


@asynccontextmanager
async def surroundings(configured: Settings, *beside: Service) -> AsyncIterator[World]:
    """Everything but inventory, which is run by `inventory_of` and may be ended and run again. `beside`: more services."""
    scheduler = Scheduler()
    ha = Bell()
    async with running(configured, scheduler.service(), ha.service(), *beside) as bus:
        world = World(bus, configured, scheduler, ha)
        try:
            yield world
        finally:
            for machine in world.machines.values():
                await machine.agent.kill()


@asynccontextmanager
async def inventory_of(world: World) -> AsyncIterator[None]:
    async with running(world.settings, inventory):
        yield


@asynccontextmanager
async def world_of(
    configured: Settings, *beside: Service, hosts: int = 2
) -> AsyncIterator[tuple[World, list[Machine]]]:
    """A cluster with hosts that are up."""
    async with AsyncExitStack() as stack:
        world = await stack.enter_async_context(surroundings(configured, *beside))
        await stack.enter_async_context(inventory_of(world))
        await found_cluster(world)
        yield world, [await world.machine(f"h{number}") for number in range(1, hosts + 1)]


async def found_cluster(world: World) -> None:
    center = await world.bus.ask(CREATE_DATA_CENTER, CreateDataCenter(name="Default"))
    ask = CreateCluster(name="Default", data_center_id=center.id)
    world.cluster = await world.bus.ask(CREATE_CLUSTER, ask)
