"""The same promises on several hosts: live migration, NICs on a spanned network, and hosts that fail.

VOLERY_TEST_SEED replays a run, VOLERY_TEST_ROUNDS does several.
"""

from __future__ import annotations

import asyncio
import random
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
from rich.console import Console

from lab import plane
from lab.lab import Lab
from tests.faults.asking import Patient
from tests.faults.chaos import LOGS, ROUNDS, SEED, Round
from tests.faults.history import Witness
from tests.faults.invariants import Invariants, Machine
from tests.faults.lab_faults import LabFaults
from tests.faults.users import Place, Promises
from volery.client import api
from volery.client.session import Session
from volery.client.transport import AsyncClient, Client
from volery.contracts.network import Network
from volery.contracts.storage import StorageDomain
from volery.runtime.bus import open_bus
from volery.runtime.config import BusConfig
from volery.setup import postgres_server, programs
from volery.setup.console import Output
from volery.setup.down import down
from volery.setup.embedded import status
from volery.setup.home import Home

pytestmark = pytest.mark.timeout(900)
OPERATIONS, FAULTS, USERS = 200, 11, 6


@dataclass
class Stage:
    """Two hosts, their control plane, and the administrator's session there."""

    lab: Lab
    home: Home
    client: Client

    def machine(self, number: int) -> Machine:
        host = self.lab.host(number)
        host_id = self.client.find(api.HOSTS, host.name).id
        return Machine(host_id, lambda: host.local_libvirt_uri, partial(host.enter, []))

    def database(self) -> str:
        """The superuser's DSN."""
        assert status(self.home, "postgres") is not None
        sockets = programs.load_environment(self.home)["VOLERY_DATABASE_DSN"].partition("host=")[2]
        return postgres_server.dsn(Path(sockets), "postgres", "volery")

    def bus(self) -> BusConfig:
        environment = programs.load_environment(self.home)
        return BusConfig(
            servers=environment["VOLERY_BUS_SERVERS"],
            credentials_dir=environment["VOLERY_BUS_CREDENTIALS_DIR"],
            ca_file=environment["VOLERY_BUS_CA_FILE"],
        )

    def keep_logs(self, seed: int) -> None:
        kept = LOGS / f"lab-{seed}"
        shutil.rmtree(kept, ignore_errors=True)
        shutil.copytree(self.home.log, kept / "plane")
        for host in self.lab.hosts:
            shutil.copytree(host.layout.log, kept / host.name)


@pytest.fixture
def stage() -> Iterator[Stage]:
    state = Path(tempfile.mkdtemp(prefix="volery-chaos-lab-", dir="/tmp"))
    state.chmod(0o755)  # PostgreSQL's own user passes through
    lab, quiet = Lab(state), Output(Console(quiet=True))
    home = plane.home_of(lab)
    try:
        lab.up(2)
        client = plane.connect(lab, quiet, image=False)
        yield Stage(lab, home, client)
        client.http.close()
    finally:
        down(home, quiet)
        lab.down()
        shutil.rmtree(state, ignore_errors=True)


async def in_place(rest: Patient) -> Place:
    """The lab's cluster, its shared directory and its spanned network, once every host has the network."""
    (cluster,) = await rest.everything(api.CLUSTERS)
    domains: list[StorageDomain] = await rest.everything(api.STORAGE_DOMAINS)
    shared = next(domain for domain in domains if domain.name == "shared")
    while True:
        networks: list[Network] = await rest.everything(api.NETWORKS)
        spanned = next(network for network in networks if network.name == "lab")
        if len(spanned.ready_host_ids) == 2:
            return Place(cluster_id=cluster.id, domain_id=shared.id, network_id=spanned.id)
        await asyncio.sleep(0.2)


@pytest.mark.parametrize("round_", range(ROUNDS))
async def test_a_storm_over_two_hosts_leaves_everything_in_order(stage: Stage, round_: int) -> None:
    seed = SEED + round_
    print(f"VOLERY_TEST_SEED={seed}", time.strftime("%H:%M:%S"))
    known = stage.client.session
    rest = Patient(AsyncClient(known))
    watcher = AsyncClient(Session(url=f"{known.url}/api/v1", ca_file=known.ca_file, token=known.token))
    faults = LabFaults(random.Random(f"{seed}/kinds"), stage.lab, stage.home)
    async with open_bus(stage.bus(), "gateway") as bus:
        invariants = Invariants(
            rest=rest,
            bus=bus,
            dsn=stage.database(),
            machines=[stage.machine(number) for number in (1, 2)],
            files=stage.lab.shared,
            promises=Promises(),
        )
        storm = Round(seed, rest, await in_place(rest), invariants, faults.strike, faults.done)
        witness = Witness(watcher.http, random.Random(f"{seed}/witness"))
        try:
            await storm.run(users=USERS, faults=FAULTS, operations=OPERATIONS, witness=witness)
        except BaseException:
            stage.keep_logs(seed)
            raise
        finally:
            print(storm.summary())
            await watcher.http.aclose()
            await rest.client.http.aclose()
