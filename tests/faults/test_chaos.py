"""Nothing acknowledged is lost, nothing happens twice: whatever is killed, paused or wiped, whenever.

VOLERY_TEST_SEED replays a run, VOLERY_TEST_ROUNDS does several.
"""

from __future__ import annotations

import random
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import libvirt
import pytest

from tests.faults.asking import Patient, logged_in
from tests.faults.chaos import LOGS, ROUNDS, SEED, Round
from tests.faults.faults import Faults
from tests.faults.history import Witness
from tests.faults.invariants import Invariants, Machine
from tests.faults.processes import ServiceProcess, service_processes
from tests.faults.users import Place, Promises
from tests.support.libvirt_host import LibvirtHost
from tests.support.plane import Agent, Plane, enrolled_agent, plane_servers, until_host
from volery.client import api
from volery.client.session import Session
from volery.client.transport import AsyncClient
from volery.contracts.cluster import Cluster, CreateCluster, CreateDataCenter, DataCenter
from volery.contracts.host import HostStatus
from volery.contracts.operation import Operation
from volery.contracts.storage import CreateStorageDomain, DomainKind
from volery.runtime.bus import Bus, open_bus

pytestmark = pytest.mark.timeout(900)
OPERATIONS, FAULTS, USERS = 300, 12, 10


@pytest.fixture
def plane() -> Iterator[Plane]:
    with plane_servers() as made:
        yield made


@pytest.fixture
def machines() -> Iterator[list[LibvirtHost]]:
    """Two that run QEMU, and one for libvirt's test driver, which costs nothing."""
    base = Path(tempfile.mkdtemp(prefix="volery-chaos-", dir="/tmp"))
    made = []
    try:
        for number in range(3):
            host = LibvirtHost(base / f"h{number}")
            host.path.mkdir()
            host.start()
            made.append(host)
        yield made
    finally:
        for host in made:
            host.stop()
        shutil.rmtree(base, ignore_errors=True)


def uri(machine: LibvirtHost, number: int) -> str:
    if number < 2:
        return machine.uri
    return f"test+unix:///default?socket={machine.path}/run/libvirt-sock"


@dataclass
class Stage:
    """A control plane in processes, three hosts, one shared directory."""

    plane: Plane
    services: dict[str, ServiceProcess]
    machines: list[LibvirtHost]
    agents: list[Agent]
    rest: Patient
    bus: Bus
    cluster: Cluster
    domain_id: str
    shared: Path

    def machine(self, number: int) -> Machine:
        return Machine(self.agents[number].host.id, partial(uri, self.machines[number], number))

    def keep_logs(self, seed: int) -> None:
        LOGS.mkdir(exist_ok=True)
        logs = [*self.plane.home.path.glob("*.log"), *(a.state_dir / "agent.log" for a in self.agents)]
        for log in logs:
            shutil.copy(log, LOGS / f"{seed}-{log.parent.name}-{log.name}")


@pytest.fixture
async def stage(plane: Plane, machines: list[LibvirtHost]) -> AsyncIterator[Stage]:
    services, url = service_processes(plane)
    agents: list[Agent] = []
    shared = Path(tempfile.mkdtemp(prefix="volery-shared-", dir="/tmp"))
    # The test driver forgets its domains with its last connection; agents come and go.
    kept = libvirt.open(uri(machines[2], 2))
    try:
        for service in services.values():
            service.start()
        ca_file, password = str(plane.home.ca_certificate), plane.home.admin_password.read_text().strip()
        rest = await logged_in(url, ca_file, password)
        center: DataCenter = await rest.send(api.DATA_CENTERS.create(CreateDataCenter(name="Default")))
        ask = CreateCluster(name="Default", data_center_id=center.id)
        cluster: Cluster = await rest.send(api.CLUSTERS.create(ask))
        async with open_bus(plane.settings.bus, "gateway") as bus:
            for number, machine in enumerate(machines):
                agent = await enrolled_agent(
                    bus, plane, cluster, f"h{number}", VOLERY_AGENT_LIBVIRT_URI=uri(machine, number)
                )
                agent.start()
                agents.append(agent)
            for agent in agents:
                await until_host(bus, agent.host.id, HostStatus.UP)
            domain = CreateStorageDomain(
                name="shared", kind=DomainKind.DIRECTORY, data_center_id=center.id, path=str(shared)
            )
            made = await rest.succeeded(await rest.send(api.STORAGE_DOMAINS.create(domain, Operation)))
            yield Stage(plane, services, machines, agents, rest, bus, cluster, made.object_id, shared)
        await rest.client.http.aclose()
    finally:
        kept.close()
        for agent in agents:
            agent.stop()
        for service in services.values():
            service.stop()
        shutil.rmtree(shared, ignore_errors=True)


@pytest.mark.parametrize("round_", range(ROUNDS))
async def test_a_storm_leaves_everything_in_order(stage: Stage, round_: int) -> None:
    seed = SEED + round_
    print(f"VOLERY_TEST_SEED={seed}", time.strftime("%H:%M:%S"))
    faults = Faults(random.Random(f"{seed}/kinds"), stage.plane, stage.services, stage.agents, stage.machines)
    invariants = Invariants(
        rest=stage.rest,
        bus=stage.bus,
        dsn=stage.plane.postgres.dsn.replace("/postgres?", "/volery?"),
        machines=[stage.machine(number) for number in range(len(stage.machines))],
        files=stage.shared,
        promises=Promises(),
    )
    known = stage.rest.client.session
    watcher = AsyncClient(Session(url=f"{known.url}/api/v1", ca_file=known.ca_file, token=known.token))
    witness = Witness(watcher.http, random.Random(f"{seed}/witness"))
    storm = Round(
        seed,
        stage.rest,
        Place(cluster_id=stage.cluster.id, domain_id=stage.domain_id),
        invariants,
        faults.strike,
        faults.done,
    )
    try:
        await storm.run(users=USERS, faults=FAULTS, operations=OPERATIONS, witness=witness)
    except BaseException:
        stage.keep_logs(seed)
        raise
    finally:
        print(storm.summary())
        await watcher.http.aclose()
