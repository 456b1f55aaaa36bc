"""A whole installation: machines, servers, services, hosts with agents, VMs; and how it is asked for things."""

from __future__ import annotations

import asyncio
import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import msgspec
from nats.aio.msg import Msg

from host_agent.peers import CONNECT_SECONDS
from sim import agents, plane
from sim.bmc import AGENT, Bmc, runner
from sim.clocks import Time
from sim.loop import SimLoop
from sim.machines import HostMachine, Machine
from sim.nats import NatsServer
from sim.oracle import Oracle, Wish
from sim.plane import Outside, Replica
from sim.postgres import Database
from sim.qemu import Daemon, Domain, Guest
from sim.storage import Shelf
from volery.contracts.base import Call, Message, Owner, wildcard
from volery.contracts.cluster import (
    CREATE_CLUSTER,
    CREATE_DATA_CENTER,
    CreateCluster,
    CreateDataCenter,
    GetById,
)
from volery.contracts.enrolment import ENROL_HOST, Enrol, read_token
from volery.contracts.errors import Kind, Refused
from volery.contracts.fencing import PowerAction
from volery.contracts.host import CREATE_HOST, GET_HOST, CreateHost, Host, HostStatus
from volery.contracts.ids import random_id
from volery.contracts.liveness import LIVENESS_CHANGED, HostLiveness
from volery.contracts.operation import ENDED, GET_OPERATION, GetOperation, ListQuery, Operation, Page
from volery.contracts.peers import Door, DoorTried, Reach
from volery.contracts.power import SET_POWER_MANAGEMENT, NewFenceDevice, SetPowerManagement
from volery.contracts.storage import (
    CREATE_STORAGE_DOMAIN,
    GET_STORAGE_DOMAIN,
    CreateStorageDomain,
    DomainKind,
)
from volery.contracts.vm import CREATE_VM, CreateVm, HighAvailability, NewDisk
from volery.runtime.bus import Bus, Caller
from volery.runtime.listing import pages

Q = TypeVar("Q", bound=Message)
A = TypeVar("A")

GIB = 1 << 30
SHARED_PATH = "/shared"
SENTENCES = {
    "which is the most without a person": "brake held",
    "it may be ha that is cut off": "ha cut off",
    "its BMC can't be asked": "fencing held: BMC unreachable",
    "it was ordered off and is still on": "fence failed",
    "most hosts fell silent at once": "storm held",
}
"""Words of ha's about what it does → the state that they tell of."""


class _Event(Message):
    data: HostLiveness


@dataclass(frozen=True)
class Plan:
    """What a seed's world is like."""

    hosts: int
    vms: int
    highly_available: tuple[bool, ...]
    """Per VM."""


@dataclass(eq=False)
class World:
    loop: SimLoop
    chance: random.Random
    """Decides everything that the seed decides."""
    database: Database
    """Empty, or with every schema."""
    time: Time = field(init=False)

    def __post_init__(self) -> None:
        self.time = Time(self.loop)
        self.database.clock = self.time.utc_now
        self.travels = random.Random(self.chance.getrandbits(64))
        self.database.latency = self._latency
        self.server = NatsServer(self.loop)
        self.shelf = Shelf()
        self.oracle = Oracle(self)
        self.shelf.on_two_writers = self.oracle.two_writers
        self.guests: dict[str, Guest] = {}
        self.control = [self._machine(f"control-{n}") for n in (1, 2)]
        self.outsides = {machine.name: Outside(machine, self.database) for machine in self.control}
        for machine in self.control:
            machine.killed = self.outsides[machine.name].process_gone
        self.replicas: dict[str, Replica] = {}
        self.environ = {
            "VOLERY_HA_START_HOLD_SECONDS": self.chance.choice(("5", "30", "300")),
            "VOLERY_HA_SILENCE_BEFORE_FENCE_SECONDS": self.chance.choice(("35", "35", "60")),
            "VOLERY_HA_TRY_PEERS_SECONDS": "0",
            "VOLERY_HA_SOFT_FENCE_SECONDS": "0",
        }
        for name in ("inventory", "scheduler", "storage", "network"):
            self._replica(name, name, self.control[0])
        self._replica("ha-1", "ha", self.control[0])
        self._replica("ha-2", "ha", self.control[1])
        self.desk = self._machine("desk")
        self.hosts: dict[str, HostMachine] = {}
        self.bmcs: dict[str, Bmc] = {}
        self.managed: set[str] = set()
        """Hosts whose power ha may ask for, and switch."""
        self.at_off: list[Callable[[Bmc], None]] = []
        """Called when a BMC is told to cut a host's power, before it does."""
        self.at_phase: list[Callable[[HostMachine, HostMachine, str], None]] = []
        """Called with source, destination and phase when a migration comes to a phase."""
        self.vms: dict[str, str] = {}
        """Name → id."""
        self.cluster_id = ""
        self.domain_id = ""
        self.timeline: list[tuple[float, str]] = []
        self.digest = hashlib.sha256()
        """Of everything that the oracle saw: the same seed gives the same."""
        self.orders: dict[str, list[tuple[str, bytes, Any]]] = {}
        """Host → what it was ever told, as it was sent."""
        self.server.overhears.append(self._overhear)
        self.restores = 0
        """How often PostgreSQL came back from a backup: what was asked just before is forgotten."""
        self.reached: set[str] = set()
        """States that the seed came to."""
        self.troubles: dict[str, int] = {}
        """Host, or "" for the bus and the database → troubles that last."""
        self.troubled_at: dict[str, float] = {}

    def _overhear(self, subject: str, data: bytes, headers: Any) -> None:
        if subject.startswith("host.") and subject.endswith(".order"):
            self.orders.setdefault(subject.split(".")[1], []).append((subject, data, headers))

    def _latency(self) -> float:
        return 0.001 if self.travels.random() < 0.1 else 0.0

    def go_on_with(self, chance: random.Random) -> None:
        """From here on another seed decides: nothing that its neighbours come to is decided by what they share."""
        self.chance = chance
        self.travels.seed(chance.getrandbits(64))
        self.database.random.seed(chance.getrandbits(64))
        for machine in (*self.control, self.desk, *self.hosts.values()):
            machine.chance.seed(chance.getrandbits(64))
        for guest in self.guests.values():
            guest.draw(chance)

    # What is told

    def note(self, what: str) -> None:
        self.timeline.append((self.time.elapsed, what))
        self.trace(what)

    def trace(self, what: str) -> None:
        self.digest.update(f"{self.time.elapsed:.6f} {what}\n".encode())

    def trouble(self, where: str, change: int) -> None:
        """A trouble begins (1) or ends (-1)."""
        self.troubles[where] = self.troubles.get(where, 0) + change
        self.troubled_at[where] = self.loop.time()

    def quiet_seconds(self, host: HostMachine) -> float | None:
        """For how long nothing has been wrong with a host and its way to us; None: something is."""
        if any(self.troubles.get(where) for where in (host.name, "")):
            return None
        return self.loop.time() - max(self.troubled_at.get(where, 0.0) for where in (host.name, ""))

    def _machine(self, name: str) -> Machine:
        chance = random.Random(self.chance.getrandbits(64))
        return Machine(name, self.loop, self.server, self.time, chance)

    def _replica(self, name: str, service: str, machine: Machine) -> None:
        self.replicas[name] = Replica(
            name, plane.SERVICES[service], machine, self.outsides[machine.name], self.environ
        )

    # Asking

    async def open(self) -> None:
        """Starts the control plane; returns when it answers."""
        client = await Outside(self.desk, self.database).connect(_BUS, "gateway")
        self.bus = Bus(client, "gateway")
        await client.subscribe(wildcard(LIVENESS_CHANGED.subject), cb=self._judged)
        for replica in self.replicas.values():
            replica.start()
        while not all(replica.service.ready for replica in self.replicas.values()):
            await asyncio.sleep(0.05)

    async def _judged(self, message: Msg) -> None:
        """What ha says of hosts counts as reached. The oracle looks at it only where nobody may be believed dead."""
        said = msgspec.json.decode(message.data, type=_Event).data
        if said.proof is not None:
            self.reached.add(f"proof {said.proof.kind}")
            self.oracle.believed_dead(said.host_name, str(said.proof.kind))
        self.reached |= {state for words, state in SENTENCES.items() if words in said.fencing}

    async def ask(self, call: Call[Q, A], question: Q, patience: float = 1500.0) -> A:
        """Asked again under the same id while the answer is unknown, as a client with an idempotency key does."""
        request_id = random_id()
        end = self.loop.time() + patience
        while True:
            try:
                return await self.bus.ask(call, question, Caller("user:sim", request_id, request_id))
            except Refused as refused:
                passing = refused.details.get("lost") or refused.kind in (Kind.TIMEOUT, Kind.UNAVAILABLE)
                if not passing or self.loop.time() > end:
                    raise
            await asyncio.sleep(0.5)

    async def ended(self, operation: Operation, patience: float = 3000.0) -> Operation:
        owner = Owner(operation.id.split("-", 1)[0])
        end = self.loop.time() + patience
        while True:
            found = await self.ask(GET_OPERATION[owner], GetOperation(id=operation.id), patience)
            if found.state in ENDED:
                return found
            if self.loop.time() > end:
                raise TimeoutError(
                    f"operation {operation.kind} {operation.id} of {operation.object_name} goes on"
                )
            await asyncio.sleep(0.5)

    async def listed(self, call: Call[ListQuery, Page], type_: type[A]) -> list[A]:
        return [one async for page in pages(self.bus, call, type_) for one in page]

    # Setting up

    async def furnish(self, plan: Plan) -> None:
        """Hosts, storage, VMs; returns when all of it runs."""
        center = await self.ask(CREATE_DATA_CENTER, CreateDataCenter(name="Default"))
        cluster = await self.ask(CREATE_CLUSTER, CreateCluster(name="Default", data_center_id=center.id))
        self.cluster_id = cluster.id
        await asyncio.gather(*(self._enrol(f"host-{n + 1}") for n in range(plan.hosts)))
        made = await self.ask(
            CREATE_STORAGE_DOMAIN,
            CreateStorageDomain(
                name="shared", kind=DomainKind.DIRECTORY, path=SHARED_PATH, data_center_id=center.id
            ),
        )
        self.domain_id = _succeeded(await self.ended(made)).object_id
        while len((await self.ask(GET_STORAGE_DOMAIN, GetById(id=self.domain_id))).host_ids) < plan.hosts:
            await asyncio.sleep(0.5)
        await asyncio.gather(
            *(self._make_vm(f"vm-{n + 1}", plan.highly_available[n]) for n in range(plan.vms))
        )

    async def _enrol(self, name: str) -> None:
        made = await self.ask(CREATE_HOST, CreateHost(name=name, cluster_id=self.cluster_id))
        chance = random.Random(self.chance.getrandbits(64))
        machine = HostMachine(name, self.loop, self.server, self.time, chance)
        machine.host_id = made.host.id
        machine.executes = self.oracle.vcpus
        machine.died = self._died
        machine.daemon.moves = self._moves
        machine.daemon.guest_of = lambda vm_id: self.guests.setdefault(vm_id, Guest())
        machine.boot_seconds = chance.uniform(15, 45)
        ask = Enrol(
            token=read_token(made.enrolment_token).secret,
            public_key=f"U{name}",
            csr_pem="",
            hostname=name,
            addresses=(),
            capabilities=agents.capabilities(machine),
        )
        await self.ask(ENROL_HOST, ask)
        machine.agent = agents.main_of(
            machine,
            self.shelf,
            plane.owner_keys(),
            self._reach,
            runner(self.bmcs),
            lambda door: self._knock(machine, door),
        )
        self.hosts[name] = machine
        self.bmcs[name] = Bmc(machine, told_off=self._told)
        machine.power_on(0.0)
        while (await self.host(machine)).status is not HostStatus.UP:
            await asyncio.sleep(0.5)
        if chance.random() < 0.85:
            await self._manage_power(machine)
            self.managed.add(name)

    async def _manage_power(self, machine: HostMachine) -> None:
        device = NewFenceDevice(agent=AGENT, address=machine.name, secrets={}, timeout_seconds=10)
        ask = SetPowerManagement(id=machine.host_id, devices=(device,))
        while True:
            try:
                await self.ask(SET_POWER_MANAGEMENT, ask)
                return
            except Refused as refused:
                if refused.kind is not Kind.NOT_FOUND:
                    raise
            await asyncio.sleep(0.5)  # ha has not heard of it yet

    def _told(self, bmc: Bmc, action: PowerAction) -> None:
        self.note(f"the BMC of {bmc.host.name} is told {action}")
        self.reached.add(f"BMC told {action}")
        if action is PowerAction.OFF:
            self.oracle.switched_off(bmc.host, "ha")
            for act in list(self.at_off):
                act(bmc)

    def _moves(self, domain: Domain, target: Daemon, phase: str) -> None:
        self.reached.add(f"migration came to {phase}")
        for act in list(self.at_phase):
            act(self.hosts[domain.daemon.host], self.hosts[target.host], phase)

    def _died(self, machine: HostMachine) -> None:
        for vm_id in machine.daemon.domains:
            self.oracle.ended_by_itself(vm_id, asked=False)

    async def host(self, machine: HostMachine) -> Host:
        return await self.ask(GET_HOST, GetById(id=machine.host_id))

    def _reach(self, source: HostMachine, uri: str) -> Daemon | None:
        target = next((m for m in self.hosts.values() if agents.uri_of(m.name) == uri), None)
        if target is None or not target.reachable or not source.reachable:
            return None
        return target.daemon

    async def _knock(self, source: HostMachine, door: Door) -> DoorTried:
        """`host_agent.peers.knock` between hosts in memory; a frozen one's kernel still takes connections."""
        target = self.hosts[agents.host_of(door)]
        if not target.on or target.link.cut or source.link.cut:
            await asyncio.sleep(CONNECT_SECONDS)
            return DoorTried(name=door.name, reach=Reach.NOTHING)
        speaks = target.audible if door.name == "agent" else target.daemon.up and not target.frozen
        return DoorTried(name=door.name, reach=Reach.ANSWERS if speaks else Reach.TAKEN)

    async def _make_vm(self, name: str, highly_available: bool) -> None:
        ask = CreateVm(
            name=name,
            cluster_id=self.cluster_id,
            memory_bytes=2 * GIB,
            disks=(NewDisk(name=f"{name}-disk", storage_domain_id=self.domain_id, size_bytes=GIB),),
            high_availability=HighAvailability(enabled=highly_available),
            start=True,
        )
        operation = _succeeded(await self.ended(await self.ask(CREATE_VM, ask)))
        vm_id = self.vms[name] = operation.object_id
        self.oracle.want(vm_id, Wish.UP)
        if highly_available:
            self.oracle.highly_available.add(vm_id)
        self.guests[vm_id] = Guest()
        self.guests[vm_id].draw(self.chance)


def _succeeded(operation: Operation) -> Operation:
    if operation.problem is not None:
        raise RuntimeError(f"{operation.kind} failed: {operation.problem.message}")
    return operation


_BUS: Any = msgspec.defstruct("NoBus", [])()
