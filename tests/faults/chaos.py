"""Random operations under random faults, and what must hold afterwards. The seed replays the choices."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from tests.support.libvirt_host import LibvirtHost
from tests.support.plane import ROOT, Agent, Plane
from volery.contracts.base import Call, Message, Owner
from volery.contracts.cluster import Cluster
from volery.contracts.errors import Kind, Refused
from volery.contracts.ids import new_id
from volery.contracts.operation import (
    CANCEL_OPERATION,
    ENDED,
    GET_OPERATION,
    LIST_OPERATIONS,
    CancelOperation,
    GetOperation,
    ListQuery,
    Operation,
)
from volery.contracts.scheduling import LIST_CLAIMS, Claim
from volery.contracts.storage import LIST_DISKS, Disk
from volery.contracts.vm import (
    ACT_ON_VM,
    CREATE_VM,
    DELETE_VM,
    LIST_VMS,
    START_VM,
    STOP_VM,
    ActOnVm,
    CreateVm,
    DeleteVm,
    NewDisk,
    StartVm,
    StopVm,
    Vm,
    VmAction,
    VmStatus,
)
from volery.runtime.bus import Bus, Caller, open_bus
from volery.runtime.relay import stream_name
from volery.runtime.tail import Broken, follow
from volery.setup import embedded

MIB = 1024 * 1024
PROGRAMS = ("inventory", "scheduler", "storage", "network")


@dataclass
class ServiceProcess:
    """One service as a process of its own, restarted as an init would."""

    name: str
    plane: Plane
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        bus, database = self.plane.settings.bus, self.plane.settings.database
        environ = {
            "PATH": os.environ["PATH"],
            "PYTHONPATH": str(ROOT),
            "VOLERY_BUS_SERVERS": bus.servers,
            "VOLERY_BUS_CREDENTIALS_DIR": bus.credentials_dir,
            "VOLERY_BUS_CA_FILE": bus.ca_file,
            "VOLERY_DATABASE_DSN": database.dsn,
            "VOLERY_DATABASE_PASSWORDS_DIR": database.passwords_dir,
            **self.plane.environ,
        }
        with (self.plane.home.path / f"{self.name}.log").open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", f"services.{self.name}"], env=environ, stdout=log, stderr=log, cwd=ROOT
            )

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def signal(self, number: signal.Signals) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def stop(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.terminate()
            try:
                self.process.wait(15)
            except subprocess.TimeoutExpired:
                self.kill()


def kill_child(pid: int) -> None:
    """kill -9, and no zombie that others would take for alive."""
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


@dataclass
class Chaos:
    """A fleet, what is done to it, and what it must look like in the end."""

    plane: Plane
    cluster: Cluster
    domain_id: str
    domain_path: Path
    services: dict[str, ServiceProcess]
    agents: list[Agent]
    machines: list[LibvirtHost]
    rng: random.Random
    operations: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    refusals: dict[str, int] = field(default_factory=dict)

    # --- what users do ---------------------------------------------------------------------------

    async def ask(self, bus: Bus, call: Call[Any, Any], question: Message) -> Any:
        """As a client does: the same request id until there is an answer."""
        caller = Caller("user:chaos", new_id(), "hash")
        until = time.monotonic() + 60
        while True:
            try:
                return await bus.ask(call, question, caller)
            except Refused as refused:
                again = refused.kind in (Kind.TIMEOUT, Kind.UNAVAILABLE, Kind.EXHAUSTED, Kind.INTERNAL)
                if not again or time.monotonic() > until:
                    raise
            await asyncio.sleep(0.1)

    async def user(self, bus: Bus, number: int, stop: asyncio.Event) -> None:
        """One user with two VMs, doing things to them."""
        mine: list[str] = []
        turn = 0
        while not stop.is_set():
            turn += 1
            try:
                op = await self.turn(bus, mine, number, turn)
            except Refused as refused:
                self.refusals[str(refused.kind)] = self.refusals.get(str(refused.kind), 0) + 1
                await asyncio.sleep(0.05)
                continue
            if op is not None:
                self.operations.append(op.id)
                if self.rng.random() < 0.1:
                    await self.cancel(bus, op)
                if self.rng.random() < 0.7:
                    await self.ended(bus, op)

    async def turn(self, bus: Bus, mine: list[str], number: int, turn: int) -> Operation | None:
        if len(mine) < 2:
            disks = (NewDisk(storage_domain_id=self.domain_id, size_bytes=4 * MIB),)
            op = await self.ask(
                bus,
                CREATE_VM,
                CreateVm(
                    name=f"u{number}-{turn}",
                    cluster_id=self.cluster.id,
                    memory_bytes=32 * MIB,
                    disks=disks if self.rng.random() < 0.5 else (),
                ),
            )
            mine.append(op.object_id)
            return op
        vm_id = self.rng.choice(mine)
        choice = self.rng.choices([self._start, self._stop, self._act, self._delete], weights=[5, 4, 2, 1])[0]
        return await choice(bus, vm_id, mine)

    async def _start(self, bus: Bus, vm_id: str, mine: list[str]) -> Operation:
        return await self.ask(bus, START_VM, StartVm(id=vm_id))

    async def _stop(self, bus: Bus, vm_id: str, mine: list[str]) -> Operation:
        return await self.ask(bus, STOP_VM, StopVm(id=vm_id, force=True))

    async def _act(self, bus: Bus, vm_id: str, mine: list[str]) -> Operation:
        action = self.rng.choice([VmAction.RESET, VmAction.PAUSE, VmAction.UNPAUSE])
        return await self.ask(bus, ACT_ON_VM, ActOnVm(id=vm_id, action=action))

    async def _delete(self, bus: Bus, vm_id: str, mine: list[str]) -> Operation:
        op = await self.ask(bus, DELETE_VM, DeleteVm(id=vm_id))
        mine.remove(vm_id)
        return op

    async def cancel(self, bus: Bus, op: Operation) -> None:
        try:
            owner = Owner(op.id.split("-", 1)[0])
            await self.ask(bus, CANCEL_OPERATION[owner], CancelOperation(id=op.id))
        except Refused:
            return

    async def ended(self, bus: Bus, op: Operation, seconds: float = 120.0) -> Operation:
        owner = Owner(op.id.split("-", 1)[0])
        async with asyncio.timeout(seconds):
            while True:
                found = await self.ask(bus, GET_OPERATION[owner], GetOperation(id=op.id))
                if found.state in ENDED:
                    return found
                await asyncio.sleep(0.05)

    # --- what happens to them -----------------------------------------------------------------------

    async def fault(self) -> None:
        """One fault, and its repair where an init would repair it."""
        kinds: list[tuple[int, Callable[[], Awaitable[str]]]] = [
            (4, self._kill_service),
            (2, self._pause_service),
            (3, self._kill_agent),
            (2, self._pause_agent),
            (1, self._kill_libvirtd),
            (2, self._kill_nats),
            (2, self._kill_postgres),
            (1, self._wipe_nats),
        ]
        chosen = self.rng.choices([k for _, k in kinds], weights=[w for w, _ in kinds])[0]
        self.faults.append(await chosen())

    async def _pause(self, low: float = 0.1, high: float = 1.5) -> None:
        await asyncio.sleep(self.rng.uniform(low, high))

    async def _kill_service(self) -> str:
        service = self.services[self.rng.choice(list(self.services))]
        service.kill()
        await self._pause()
        service.start()
        return f"kill {service.name}"

    async def _pause_service(self) -> str:
        service = self.services[self.rng.choice(list(self.services))]
        service.signal(signal.SIGSTOP)
        await self._pause(0.5, 4.0)
        service.signal(signal.SIGCONT)
        return f"pause {service.name}"

    async def _kill_agent(self) -> str:
        agent = self.rng.choice(self.agents)
        agent.kill()
        await self._pause()
        agent.start()
        return f"kill agent {agent.host.name}"

    async def _pause_agent(self) -> str:
        agent = self.rng.choice(self.agents)
        assert agent.process is not None
        agent.process.send_signal(signal.SIGSTOP)
        await self._pause(0.5, 4.0)
        agent.process.send_signal(signal.SIGCONT)
        return f"pause agent {agent.host.name}"

    async def _kill_libvirtd(self) -> str:
        machine = self.rng.choice(self.machines)
        await asyncio.to_thread(machine.kill_daemon)
        await self._pause()
        await asyncio.to_thread(machine.start_daemon)
        return f"kill libvirtd {self.machines.index(machine)}"

    async def _kill_nats(self) -> str:
        kill_child(self.plane.nats.pid)
        await self._pause()
        await asyncio.to_thread(self.restart_nats)
        return "kill NATS"

    async def _wipe_nats(self) -> str:
        """Its whole store is gone, streams and all."""
        kill_child(self.plane.nats.pid)
        await asyncio.to_thread(embedded.stop, self.plane.home, "nats")
        store = self.plane.home.nats / "jetstream"
        assert store.is_dir()
        await asyncio.to_thread(subprocess.run, ["rm", "-rf", str(store)], check=True)
        await asyncio.to_thread(self.restart_nats)
        return "wipe NATS"

    def restart_nats(self) -> None:
        from volery.setup import servers

        embedded.stop(self.plane.home, "nats")
        self.plane.nats = embedded.start_nats(self.plane.home, servers.nats_options(self.plane.home))

    async def _kill_postgres(self) -> str:
        kill_child(self.plane.postgres.pid)
        await self._pause()
        await asyncio.to_thread(self.restart_postgres)
        return "kill PostgreSQL"

    def restart_postgres(self) -> None:
        embedded.stop(self.plane.home, "postgres")
        self.plane.postgres = embedded.start_postgres(self.plane.home)

    # --- what must hold ---------------------------------------------------------------------------------

    async def settle(self, bus: Bus, seconds: float = 180.0) -> None:
        """Until every operation has ended."""
        async with asyncio.timeout(seconds):
            while True:
                open_ones = []
                for owner in (Owner.INVENTORY, Owner.STORAGE):
                    page = await self.ask(bus, LIST_OPERATIONS[owner], ListQuery(limit=1000, order_by="-id"))
                    found = [msgspec.json.decode(item, type=Operation) for item in page.items]
                    open_ones += [op for op in found if op.state not in ENDED]
                if not open_ones:
                    return
                await asyncio.sleep(0.25)

    async def everything(self, bus: Bus, call: Any, type_: Any) -> list[Any]:
        items, page = [], ""
        while True:
            found = await self.ask(bus, call, ListQuery(limit=1000, page=page))
            items += [msgspec.json.decode(item, type=type_) for item in found.items]
            if not (page := found.next):
                return items

    async def eventually(self, check: Callable[[], Awaitable[str]], seconds: float = 60.0) -> None:
        """The check's complaint must become empty."""
        until = time.monotonic() + seconds
        while complaint := await check():
            if time.monotonic() > until:
                raise AssertionError(complaint)
            await asyncio.sleep(0.5)

    async def check(self, bus: Bus) -> None:
        await self.settle(bus)
        await self.eventually(lambda: self.vms_agree(bus))
        await self.eventually(lambda: self.claims_agree(bus))
        await self.eventually(lambda: self.disks_agree(bus))
        for owner in (Owner.INVENTORY, Owner.STORAGE, Owner.SCHEDULER):
            await self.history_is_whole(bus, owner)

    def domains(self) -> dict[str, list[int]]:
        """VM → indices of machines on which libvirt shows it."""
        found: dict[str, list[int]] = {}
        for index, machine in enumerate(self.machines):
            listing = subprocess.run(
                ["virsh", "-q", "-c", machine.uri, "list", "--uuid"],
                capture_output=True,
                text=True,
                check=True,
            )
            for line in listing.stdout.split():
                found.setdefault(line.strip(), []).append(index)
        return found

    async def vms_agree(self, bus: Bus) -> str:
        """What REST shows is what libvirt has; nothing runs twice, nothing unknown runs."""
        domains = await asyncio.to_thread(self.domains)
        vms: list[Vm] = await self.everything(bus, LIST_VMS, Vm)
        index = {agent.host.id: number for number, agent in enumerate(self.agents)}
        for vm_id, places in domains.items():
            if len(places) != 1:
                raise AssertionError(f"VM {vm_id} runs on {places}")
        for vm in vms:
            places = domains.pop(vm.id, [])
            if vm.busy_with:
                return f"VM {vm.name} is still busy with {vm.busy_with}"
            if vm.status in (VmStatus.UP, VmStatus.PAUSED):
                if places != [index[vm.host_id]]:
                    return f"VM {vm.name} is {vm.status} on {vm.host_id}, libvirt has it on {places}"
            elif vm.status is VmStatus.DOWN:
                if places:
                    return f"VM {vm.name} is down, libvirt has it on {places}"
            else:
                return f"VM {vm.name} is {vm.status}"
        return f"nobody knows the domains {list(domains)}" if domains else ""

    async def claims_agree(self, bus: Bus) -> str:
        claims: list[Claim] = await self.everything(bus, LIST_CLAIMS, Claim)
        vms: list[Vm] = await self.everything(bus, LIST_VMS, Vm)
        wanted = {(vm.id, vm.host_id) for vm in vms if vm.host_id and vm.status is not VmStatus.DOWN}
        held = [(claim.vm_id, claim.host_id) for claim in claims]
        if len(held) != len(set(held)) or set(held) != wanted:
            return f"claims {sorted(held)} but placed {sorted(wanted)}"
        return ""

    async def disks_agree(self, bus: Bus) -> str:
        """Every disk has its file, every file its disk, every attachment its VM."""
        disks: list[Disk] = await self.everything(bus, LIST_DISKS, Disk)
        vms: list[Vm] = await self.everything(bus, LIST_VMS, Vm)
        files = {path.stem for path in self.domain_path.rglob("*.qcow2") if "staging" not in path.parts}
        if files != {disk.id for disk in disks}:
            return f"disks {sorted(d.id for d in disks)} but files {sorted(files)}"
        used = {(use.vm_id, disk.id) for disk in disks for use in disk.uses}
        attached = {(vm.id, attachment.disk_id) for vm in vms for attachment in vm.disks}
        if used != attached:
            return f"uses {sorted(used)} but attached {sorted(attached)}"
        orphans = [disk.id for disk in disks if not disk.uses or disk.busy_with]
        return f"orphaned or busy disks {orphans}" if orphans else ""

    async def history_is_whole(self, bus: Bus, owner: Owner) -> None:
        """The stream has every position once, and every object's revisions without a gap, in order."""
        until = time.monotonic() + 30
        while True:
            events = await self.history(bus, owner)
            positions = [position for position, _ in events]
            if positions and positions == list(range(positions[0], positions[0] + len(positions))):
                break
            if time.monotonic() > until:
                raise AssertionError(f"{owner}: positions {positions[:5]}…{positions[-5:]} have gaps")
            await asyncio.sleep(0.5)
        revisions: dict[str, int] = {}
        for _, event in events:
            key, revision = event["subject"], event["data"]["revision"]
            before = revisions.get(key)
            if before is not None and revision <= before:
                raise AssertionError(f"{owner}: {key} goes from revision {before} to {revision}")
            revisions[key] = revision

    async def history(self, bus: Bus, owner: Owner) -> list[tuple[int, dict[str, Any]]]:
        found: list[tuple[int, dict[str, Any]]] = []
        try:
            async with follow(bus.client, stream_name(owner), 0) as tail:
                if tail.standing.last == 0:
                    return []
                async for heard in tail:
                    found.append((heard.position, json.loads(heard.body)))
                    if heard.position >= tail.standing.last:
                        return found
        except Broken:
            return []
        return found


async def storm(chaos: Chaos, users: int, faults: int) -> None:
    """Users and faults at once, then quiet, then the checks."""
    async with open_bus(chaos.plane.settings.bus, "gateway") as bus:
        stop = asyncio.Event()
        working = [asyncio.create_task(chaos.user(bus, number, stop)) for number in range(users)]
        for _ in range(faults):
            await asyncio.sleep(chaos.rng.uniform(0.2, 2.0))
            await chaos.fault()
        stop.set()
        await asyncio.gather(*working)
        await chaos.check(bus)
