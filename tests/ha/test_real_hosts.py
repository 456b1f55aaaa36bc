"""ha with everything real: QEMU guests on two hosts, agents as processes, identities, the services together."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest

from services.dwh.service import service as dwh
from services.ha.service import service as ha
from services.inventory.service import service as inventory
from services.scheduler.service import service as scheduler
from services.storage.service import service as storage
from tests.support.libvirt_host import LibvirtHost
from tests.support.plane import (
    Agent,
    Plane,
    default_cluster,
    enrolled_agent,
    plane_servers,
    running_plane,
    succeeded,
    until_host,
)
from volery.contracts.cluster import GetById
from volery.contracts.history import LIST_VERSIONS, ListVersions
from volery.contracts.host import HostStatus
from volery.contracts.liveness import GET_LIVENESS, LIST_RESTARTS, VmRestart
from volery.contracts.operation import ListQuery
from volery.contracts.scheduling import LIST_CLAIMS, Claim
from volery.contracts.vm import (
    CREATE_VM,
    GET_VM,
    START_VM,
    STOP_VM,
    Affinity,
    CreateVm,
    HighAvailability,
    StartVm,
    StopVm,
    Vm,
    VmStatus,
)
from volery.runtime.bus import Bus

MEMORY = 64 * 1024 * 1024


@pytest.fixture
def plane() -> Iterator[Plane]:
    with plane_servers() as made:
        yield made


@pytest.fixture
def machines(tmp_path: Path) -> Iterator[list[LibvirtHost]]:
    hosts = [LibvirtHost(tmp_path / name) for name in ("a", "b")]
    try:
        for host in hosts:
            host.path.mkdir()
            host.start()
        yield hosts
    finally:
        for host in hosts:
            host.stop()


@asynccontextmanager
async def hosted(plane: Plane, machines: list[LibvirtHost]) -> AsyncIterator[tuple[Bus, list[Agent], str]]:
    """All services, and the machines as hosts that are up."""
    async with running_plane(plane, inventory, scheduler, storage, ha, dwh) as bus:
        cluster = await default_cluster(bus)
        agents = []
        try:
            for number, machine in enumerate(machines):
                agent = await enrolled_agent(
                    bus, plane, cluster, f"h{number}", VOLERY_AGENT_LIBVIRT_URI=machine.uri
                )
                agent.start()
                agents.append(agent)
            for agent in agents:
                await until_host(bus, agent.host.id, HostStatus.UP)
            yield bus, agents, cluster.id
        except BaseException:
            for agent in agents:
                print(agent.log()[-3000:])
            raise
        finally:
            for agent in agents:
                agent.stop()


async def highly_available(bus: Bus, cluster_id: str, prefers: str = "") -> Vm:
    ask = CreateVm(
        name="precious",
        cluster_id=cluster_id,
        memory_bytes=MEMORY,
        high_availability=HighAvailability(enabled=True),
        affinity=Affinity(preferred_host_ids=(prefers,) if prefers else ()),
    )
    made = await succeeded(bus, await bus.ask(CREATE_VM, ask))
    await succeeded(bus, await bus.ask(START_VM, StartVm(id=made.object_id)))
    return await vm_that(bus, made.object_id, VmStatus.UP, 1)


async def vm_that(bus: Bus, vm_id: str, status: VmStatus, epoch: int, seconds: float = 30.0) -> Vm:
    """The VM once it is in this status under at least this epoch, and whatever brought it there has ended."""
    found = None
    try:
        async with asyncio.timeout(seconds):
            while True:
                found = await bus.ask(GET_VM, GetById(id=vm_id))
                if found.status is status and found.epoch >= epoch and not found.busy_with:
                    return found
                await asyncio.sleep(0.01)
    except TimeoutError:
        raise AssertionError(f"not {status} under epoch {epoch} within {seconds} s: {found}") from None


async def claims(bus: Bus) -> list[tuple[str, int, str]]:
    page = await bus.ask(LIST_CLAIMS, ListQuery())
    found = [msgspec.json.decode(item, type=Claim) for item in page.items]
    return [(c.host_id, c.epoch, c.state) for c in found]


async def test_a_vm_whose_qemu_is_killed_is_back_at_once_and_its_history_is_kept(
    plane: Plane, machines: list[LibvirtHost]
) -> None:
    async with hosted(plane, machines) as (bus, agents, cluster_id):
        vm = await highly_available(bus, cluster_id)
        names = {agent.host.id: machine for agent, machine in zip(agents, machines, strict=True)}
        (qemu,) = names[vm.host_id].processes("qemu")
        killed = time.monotonic()
        os.kill(qemu, signal.SIGKILL)
        again = await vm_that(bus, vm.id, VmStatus.UP, 2)
        print(f"back after {time.monotonic() - killed:.2f} s")
        assert time.monotonic() - killed < 10
        assert again.restarts == 1
        assert sum(len(machine.processes("qemu")) for machine in machines) == 1
        async with asyncio.timeout(10):
            while await claims(bus) != [(again.host_id, again.epoch, "confirmed")]:
                await asyncio.sleep(0.05)

        page = await bus.ask(LIST_RESTARTS, ListQuery())
        (record,) = [msgspec.json.decode(item, type=VmRestart) for item in page.items]
        assert (record.vm_id, record.attempts, record.gave_up) == (vm.id, 1, False)
        async with asyncio.timeout(10):
            while True:
                kept = await bus.ask(LIST_VERSIONS, ListVersions(noun="vm", id=vm.id, limit=1000))
                if kept.items and kept.items[-1].revision >= again.revision:
                    break
                await asyncio.sleep(0.05)
        assert [v.revision for v in kept.items] == list(range(1, kept.items[-1].revision + 1))
        reasons = {msgspec.json.decode(v.doc)["status_reason"] for v in kept.items}
        assert "crashed" in reasons

        await succeeded(bus, await bus.ask(STOP_VM, StopVm(id=vm.id, force=True)))
        await asyncio.sleep(1.5)  # nobody starts what a person stopped
        assert (await bus.ask(GET_VM, GetById(id=vm.id))).status is VmStatus.DOWN


async def test_a_host_that_refuses_is_passed_over_for_another(
    plane: Plane, machines: list[LibvirtHost]
) -> None:
    async with hosted(plane, machines) as (bus, agents, cluster_id):
        vm = await highly_available(bus, cluster_id, prefers=agents[0].host.id)
        assert vm.host_id == agents[0].host.id
        # From now on this host can't run QEMU.
        machines[0].run("mount", "--bind", "/bin/false", "/usr/bin/qemu-system-x86_64")
        os.kill(machines[0].qemu(vm.id), signal.SIGKILL)
        again = await vm_that(bus, vm.id, VmStatus.UP, 3)
        assert again.host_id == agents[1].host.id
        assert [len(machine.processes("qemu")) for machine in machines] == [0, 1]
        async with asyncio.timeout(10):
            while await claims(bus) != [(again.host_id, again.epoch, "confirmed")]:
                await asyncio.sleep(0.05)


async def test_a_host_that_falls_silent_is_noticed_left_alone_and_welcomed_back(
    plane: Plane, machines: list[LibvirtHost]
) -> None:
    plane.environ |= {"VOLERY_HA_SILENCE_SECONDS": "5"}
    async with hosted(plane, machines) as (bus, agents, cluster_id):
        vm = await highly_available(bus, cluster_id)
        agent = next(a for a in agents if a.host.id == vm.host_id)
        assert agent.process is not None
        os.kill(agent.process.pid, signal.SIGSTOP)
        try:
            await until_host(bus, agent.host.id, HostStatus.CONNECTING)
            await until_host(bus, agent.host.id, HostStatus.NON_RESPONSIVE)
            await vm_that(bus, vm.id, VmStatus.UNKNOWN, 1)
            await asyncio.sleep(2)
            assert (await bus.ask(GET_VM, GetById(id=vm.id))).epoch == 1
            assert sum(len(machine.processes("qemu")) for machine in machines) == 1
        finally:
            os.kill(agent.process.pid, signal.SIGCONT)
        await until_host(bus, agent.host.id, HostStatus.UP)
        assert (await vm_that(bus, vm.id, VmStatus.UP, 1)).epoch == 1
        liveness = await bus.ask(GET_LIVENESS, GetById(id=agent.host.id))
        kinds = {e.kind for e in liveness.evidence}
        assert {"beat", "silence"} <= kinds

        agent.kill()
        left = time.monotonic()
        await until_host(bus, agent.host.id, HostStatus.CONNECTING)
        print(f"a killed agent is suspected after {time.monotonic() - left:.2f} s")
        kinds = {e.kind: e.details for e in (await bus.ask(GET_LIVENESS, GetById(id=agent.host.id))).evidence}
        assert "disconnected" in kinds
        agent.start()
        await until_host(bus, agent.host.id, HostStatus.UP)
        assert (await vm_that(bus, vm.id, VmStatus.UP, 1)).epoch == 1
