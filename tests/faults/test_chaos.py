"""Nothing acknowledged is lost, nothing happens twice: whatever is killed, paused or wiped, whenever.

VOLERY_TEST_SEED replays a run, VOLERY_TEST_ROUNDS does several.
"""

from __future__ import annotations

import os
import random
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from tests.faults.chaos import PROGRAMS, Chaos, ServiceProcess, storm
from tests.support.libvirt_host import LibvirtHost
from tests.support.plane import (
    Plane,
    default_cluster,
    enrolled_agent,
    plane_servers,
    succeeded,
    until_host,
)
from volery.contracts.errors import Kind, Refused
from volery.contracts.host import HostStatus
from volery.contracts.operation import ListQuery
from volery.contracts.storage import (
    CREATE_STORAGE_DOMAIN,
    LIST_STORAGE_DOMAINS,
    CreateStorageDomain,
    DomainKind,
)
from volery.contracts.vm import LIST_VMS
from volery.runtime.bus import Bus, open_bus

pytestmark = pytest.mark.timeout(900)
SEED = int(os.environ.get("VOLERY_TEST_SEED", "0")) or random.SystemRandom().randrange(1, 10**9)
ROUNDS = int(os.environ.get("VOLERY_TEST_ROUNDS", "1"))


@pytest.fixture
def plane() -> Iterator[Plane]:
    with plane_servers() as made:
        yield made


@pytest.fixture
def machines() -> Iterator[list[LibvirtHost]]:
    base = Path(tempfile.mkdtemp(prefix="volery-chaos-", dir="/tmp"))
    made = []
    try:
        for number in range(2):
            host = LibvirtHost(base / f"h{number}")
            host.path.mkdir()
            host.start()
            made.append(host)
        yield made
    finally:
        for host in made:
            host.stop()
        shutil.rmtree(base, ignore_errors=True)


async def answering(bus: Bus) -> None:
    for call in (LIST_VMS, LIST_STORAGE_DOMAINS):
        while True:
            try:
                await bus.ask(call, ListQuery())
                break
            except Refused as refused:
                if refused.kind not in (Kind.UNAVAILABLE, Kind.TIMEOUT):
                    raise


@pytest.fixture
async def chaos(plane: Plane, machines: list[LibvirtHost], tmp_path: Path) -> AsyncIterator[Chaos]:
    services = {name: ServiceProcess(name, plane) for name in PROGRAMS}
    agents = []
    shared = Path(tempfile.mkdtemp(prefix="volery-shared-", dir="/tmp"))
    try:
        for service in services.values():
            service.start()
        async with open_bus(plane.settings.bus, "gateway") as bus:
            await answering(bus)
            cluster = await default_cluster(bus)
            for number, machine in enumerate(machines):
                agent = await enrolled_agent(
                    bus, plane, cluster, f"h{number}", VOLERY_AGENT_LIBVIRT_URI=machine.uri
                )
                agent.start()
                agents.append(agent)
            for agent in agents:
                await until_host(bus, agent.host.id, HostStatus.UP)
            op = await bus.ask(
                CREATE_STORAGE_DOMAIN,
                CreateStorageDomain(
                    name="shared",
                    kind=DomainKind.DIRECTORY,
                    data_center_id=cluster.data_center_id,
                    path=str(shared),
                ),
            )
            await succeeded(bus, op)
            yield Chaos(plane, cluster, op.object_id, shared, services, agents, machines, random.Random(SEED))
    finally:
        for agent in agents:
            agent.stop()
        for service in services.values():
            service.stop()
        shutil.rmtree(shared, ignore_errors=True)


@pytest.mark.parametrize("round_", range(ROUNDS))
async def test_a_storm_leaves_everything_in_order(chaos: Chaos, round_: int) -> None:
    seed = SEED + round_
    chaos.rng.seed(seed)
    print(f"VOLERY_TEST_SEED={seed}")
    try:
        await storm(chaos, users=4, faults=10)
    except BaseException:
        print("faults:", chaos.faults)
        keep = Path("/tmp/volery-chaos-logs")
        keep.mkdir(exist_ok=True)
        for log in [*chaos.plane.home.path.glob("*.log"), *(a.state_dir / "agent.log" for a in chaos.agents)]:
            shutil.copy(log, keep / f"{seed}-{log.parent.name}-{log.name}")
        raise
    print(f"{len(chaos.operations)} operations, faults {chaos.faults}, refusals {chaos.refusals}")
