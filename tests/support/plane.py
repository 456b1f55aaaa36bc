"""A whole control plane with real identities in a directory of its own, and agents enrolled in it by the bus."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from host_agent.enrolment import Identity, Keys, make_csr, store
from tests.support.runtime import running
from volery.contracts.base import Owner
from volery.contracts.cluster import (
    CREATE_CLUSTER,
    CREATE_DATA_CENTER,
    Cluster,
    CreateCluster,
    CreateDataCenter,
    GetById,
)
from volery.contracts.enrolment import ENROL_HOST, Enrol, read_token
from volery.contracts.host import CREATE_HOST, GET_HOST, CreateHost, Host, HostStatus
from volery.contracts.operation import ENDED, GET_OPERATION, GetOperation, Operation, OperationState
from volery.runtime.bus import Bus
from volery.runtime.config import BusConfig, DatabaseConfig, TelemetryConfig
from volery.runtime.permissions import OWNERS
from volery.runtime.programs import Program, Settings
from volery.runtime.signing import Key
from volery.setup import servers
from volery.setup.database import bootstrap_database
from volery.setup.embedded import Embedded, PostgresOptions, start_nats, start_postgres, stop, temporary_home
from volery.setup.home import Home

ROOT = Path(__file__).parents[2]


@dataclass
class Plane:
    """Servers with identities, certificates, roles. Programs are run against `environ` or `settings`."""

    home: Home
    nats: Embedded
    postgres: Embedded
    environ: dict[str, str] = field(default_factory=dict)

    @property
    def settings(self) -> Settings:
        return Settings(
            BusConfig(
                servers=self.nats.url,
                credentials_dir=str(self.home.bus_credentials),
                ca_file=str(self.home.ca_certificate),
            ),
            DatabaseConfig(
                dsn=f"postgresql:///volery?host={self.postgres.socket_directory}",
                passwords_dir=str(self.home.postgres_passwords),
                pool_max=6,
            ),
            TelemetryConfig(log_level="WARNING"),
            self.environ,
        )


@contextmanager
def plane_servers() -> Iterator[Plane]:
    """NATS in operator mode with TLS, PostgreSQL with every role; gone afterwards."""
    with temporary_home("volery-plane-") as home:
        home.change_settings({"VOLERY_SETUP_BUS_ADDRESS": "127.0.0.1"})
        servers.ensure_certificates(home)
        try:
            nats = start_nats(home, servers.nats_options(home))
            postgres = start_postgres(home, PostgresOptions(sync_after_creation=False))
            asyncio.run(bootstrap_database(postgres.dsn, OWNERS, servers.service_passwords(home)))
            plane = Plane(home, nats, postgres)
            plane.environ |= {
                "VOLERY_INVENTORY_SECRETS_DIR": str(home.bus_credentials),
                "VOLERY_INVENTORY_PKI_DIR": str(home.pki),
                "VOLERY_INVENTORY_PUBLIC_URL": "https://127.0.0.1:1",
                "VOLERY_INVENTORY_BUS_PUBLIC_SERVERS": nats.url,
                "VOLERY_INVENTORY_INSTALLATION": "test",
            }
            yield plane
        finally:
            stop(home, "nats")
            stop(home, "postgres")


@dataclass
class Agent:
    """One host agent as a process of its own."""

    host: Host
    state_dir: Path
    environ: dict[str, str]
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with (self.state_dir / "agent.log").open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "host_agent"],
                env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), **self.environ},
                stdout=log,
                stderr=log,
                cwd=ROOT,
            )

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(15)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()

    def log(self) -> str:
        return (self.state_dir / "agent.log").read_text()


async def enrolled_agent(bus: Bus, plane: Plane, cluster: Cluster, name: str, **environ: str) -> Agent:
    """A host created by the bus, enrolled with keys of its own; not started."""
    made = await bus.ask(CREATE_HOST, CreateHost(name=name, cluster_id=cluster.id))
    token = read_token(made.enrolment_token)
    state_dir = plane.home.path / f"agent-{name}"
    state_dir.mkdir(mode=0o700)
    keys = Keys(seed=Key.new("user").seed, data_key_pem=new_data_key())
    answer = await bus.ask(
        ENROL_HOST,
        Enrol(
            token=token.secret,
            public_key=Key(keys.seed).public,
            csr_pem=make_csr(keys, name, ("127.0.0.1",)),
            hostname=name,
            addresses=("127.0.0.1",),
        ),
    )
    store(state_dir, Identity(keys=keys, enrolled=answer))
    settings = {
        "VOLERY_AGENT_STATE_DIR": str(state_dir),
        "VOLERY_AGENT_HYPERVISOR": "qemu",
        "VOLERY_AGENT_INSTALLATION": "test",
    }
    return Agent(made.host, state_dir, settings | environ)


def new_data_key() -> str:
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    return (
        ec.generate_private_key(ec.SECP256R1())
        .private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        .decode()
    )


async def default_cluster(bus: Bus) -> Cluster:
    dc = await bus.ask(CREATE_DATA_CENTER, CreateDataCenter(name="Default"))
    return await bus.ask(CREATE_CLUSTER, CreateCluster(name="Default", data_center_id=dc.id))


async def until_host(bus: Bus, host_id: str, status: HostStatus, seconds: float = 30.0) -> Host:
    """Wait until inventory shows the host in this status."""
    async with asyncio.timeout(seconds):
        while True:
            host = await bus.ask(GET_HOST, GetById(id=host_id))
            if host.status is status:
                return host
            await asyncio.sleep(0.05)


async def ended(bus: Bus, operation: Operation, seconds: float = 90.0) -> Operation:
    """The operation once it has ended, however."""
    owner = Owner(operation.id.split("-", 1)[0])
    async with asyncio.timeout(seconds):
        while True:
            found = await bus.ask(GET_OPERATION[owner], GetOperation(id=operation.id))
            if found.state in ENDED:
                return found
            await asyncio.sleep(0.02)


async def succeeded(bus: Bus, operation: Operation, seconds: float = 90.0) -> Operation:
    found = await ended(bus, operation, seconds)
    assert found.state is OperationState.SUCCEEDED, found.problem
    return found


@asynccontextmanager
async def running_plane(plane: Plane, *programs: Program) -> AsyncIterator[Bus]:
    async with running(plane.settings, *programs) as bus:
        yield bus
