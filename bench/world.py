"""What rows share, made when the first row asks for it: an installation as `make up` makes it, and seeded objects."""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from shutil import rmtree
from typing import Any, TypeAlias

import asyncpg
from rich.console import Console

from lab.plane import log_in
from services.inventory.store import CLUSTERS, DATA_CENTERS, VMS, VmPrivate
from volery.client.transport import Client
from volery.contracts.cluster import Cluster, DataCenter
from volery.contracts.ids import new_id
from volery.contracts.vm import Nic, Vm, VmStatus
from volery.runtime.config import BusConfig, DatabaseConfig, read
from volery.runtime.database import connect_arguments, migrate, open_pool
from volery.runtime.permissions import OWNERS
from volery.runtime.tables import Nothing, commit
from volery.setup import servers
from volery.setup.console import Output
from volery.setup.database import bootstrap_database
from volery.setup.down import down
from volery.setup.home import Home
from volery.setup.programs import CONTROL_PLANE, REPOSITORY, load_environment
from volery.setup.up import up

VMS_SEEDED = 10_000
SEED_BATCH = 200
QUIET_SHARE = 0.1
"""Of one processor: below it, the control plane does nothing but keep time."""
QUIET = Output(Console(quiet=True))

Pool: TypeAlias = "asyncpg.Pool[asyncpg.Record]"


@dataclass
class Installation:
    """A control plane without a host of its own, in a directory of its own."""

    home: Home
    url: str
    client: Client
    token: str

    @property
    def bus(self) -> BusConfig:
        return read("VOLERY_BUS_", BusConfig, load_environment(self.home))

    def database(self, name: str = "volery", pool_max: int = 8) -> DatabaseConfig:
        found = read("VOLERY_DATABASE_", DatabaseConfig, load_environment(self.home))
        dsn = found.dsn.replace("/volery?", f"/{name}?")
        return DatabaseConfig(dsn=dsn, passwords_dir=found.passwords_dir, pool_max=pool_max)

    @property
    def tls(self) -> ssl.SSLContext:
        return ssl.create_default_context(cafile=str(self.home.ca_certificate))

    @property
    def process(self) -> int:
        """The control plane's process id."""
        found = CONTROL_PLANE.process(self.home)
        assert found is not None, "the control plane does not run"
        return found.pid

    async def quiet(self) -> None:
        """Until the control plane has done what former rows left it to do."""
        async with asyncio.timeout(180):
            while await self._cpu_share() > QUIET_SHARE:
                continue

    async def _cpu_share(self) -> float:
        def used_seconds() -> float:
            fields = Path(f"/proc/{self.process}/stat").read_text().rsplit(")", 1)[1].split()
            return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

        before = used_seconds()
        await asyncio.sleep(1.0)
        return used_seconds() - before

    @contextmanager
    def peer(self, module: str, **environ: str) -> Iterator[str]:
        """A bare server to compare with, as a process of its own with the same certificate; gives its URL."""
        process = subprocess.Popen(
            [sys.executable, "-m", module],
            env={
                "PATH": os.environ["PATH"],
                "PYTHONPATH": str(REPOSITORY),
                "BENCH_CERTIFICATE": str(self.home.pki / "gateway.pem"),
                "BENCH_KEY": str(self.home.pki / "gateway.key"),
                **environ,
            },
            stdout=subprocess.PIPE,
        )
        assert process.stdout is not None
        try:
            port = process.stdout.readline().decode().strip()
            assert port, f"{module} did not start"
            yield f"https://127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait(10)


def free_port() -> int:
    """Not 8443 and its neighbours, for which installations that begin at the same time would compete."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def installed() -> Iterator[Installation]:
    """`make up` in a throw-away directory; everything of it is gone afterwards."""
    home = Home(Path(tempfile.mkdtemp(prefix="volery-bench-", dir="/tmp")))
    home.path.chmod(0o755)  # PostgreSQL's own user passes through
    try:
        home.create()
        home.change_settings(
            {
                "VOLERY_SETUP_LOCAL_HOST": "no",
                "VOLERY_SETUP_BUS_ADDRESS": "127.0.0.1",
                "VOLERY_SETUP_NAMES": "localhost",
                "VOLERY_SETUP_GATEWAY_PORT": str(free_port()),
            }
        )
        running = up(home, QUIET)
        client = log_in(home, running.gateway_url)
        yield Installation(home, running.gateway_url, client, client.session.token)
    finally:
        down(home, QUIET)
        rmtree(home.path, ignore_errors=True)


@asynccontextmanager
async def bare_pool(there: Installation) -> AsyncIterator[Pool]:
    """inventory's schema in a database that no program uses."""
    server = await asyncio.to_thread(servers.start_postgres, there.home)  # it runs: this only says where
    passwords = servers.service_passwords(there.home)
    await bootstrap_database(server.dsn, OWNERS, passwords, database="bench", connection_limit=80)
    config = there.database("bench", 32)
    await migrate(config, "inventory")
    async with open_pool(config, "inventory") as pool:
        yield pool


@asynccontextmanager
async def plain_pool(config: DatabaseConfig, owner: str) -> AsyncIterator[Pool]:
    async def keep(_: object) -> None:
        """asyncpg would ask the server to reset each session."""

    async with asyncpg.create_pool(
        min_size=1,
        max_size=config.pool_max,
        command_timeout=60,
        reset=keep,
        **connect_arguments(config, owner),
    ) as pool:
        yield pool


@dataclass
class World:
    """Given to every row."""

    full: bool = False
    """Also what takes ten minutes."""
    sync: ExitStack = field(default_factory=ExitStack)
    stack: AsyncExitStack = field(default_factory=AsyncExitStack)
    made: dict[str, Any] = field(default_factory=dict)

    async def installation(self) -> Installation:
        if "installation" not in self.made:
            self.made["installation"] = await asyncio.to_thread(self.sync.enter_context, installed())
        found: Installation = self.made["installation"]
        return found

    async def bare_pool(self) -> Pool:
        if "bare_pool" not in self.made:
            opening = bare_pool(await self.installation())
            self.made["bare_pool"] = await self.stack.enter_async_context(opening)
        found: Pool = self.made["bare_pool"]
        return found

    async def plain_pool(self) -> Pool:
        """asyncpg's own pool on the same database, as a program opens it; only its reset of sessions is left out."""
        if "plain_pool" not in self.made:
            await self.bare_pool()
            config = (await self.installation()).database("bench", 32)
            opening = plain_pool(config, "inventory")
            self.made["plain_pool"] = await self.stack.enter_async_context(opening)
        found: Pool = self.made["plain_pool"]
        return found

    async def vms(self) -> list[Vm]:
        """10,000 VMs in the installation, written as inventory writes them, facts and all."""
        if "vms" not in self.made:
            there = await self.installation()
            pool = await self.stack.enter_async_context(open_pool(there.database(pool_max=4), "inventory"))
            self.made["pool"] = pool
            self.made["vms"] = await seed(pool, VMS_SEEDED)
            await drained(pool)
            await there.quiet()
        found: list[Vm] = self.made["vms"]
        return found

    async def close(self) -> None:
        await self.stack.aclose()
        await asyncio.to_thread(self.sync.close)


def a_vm(number: int, cluster: Cluster) -> Vm:
    now = datetime.now(UTC)
    nic = Nic(
        id=new_id(),
        name="nic1",
        mac=f"52:54:00:{number >> 16:02x}:{number >> 8 & 255:02x}:{number & 255:02x}",
    )
    return Vm(
        id=new_id(),
        revision=1,
        created_at=now,
        updated_at=now,
        name=f"vm{number:05d}",
        cluster_id=cluster.id,
        data_center_id=cluster.data_center_id,
        status=VmStatus.DOWN,
        description="a VM of the benchmark",
        memory_bytes=64 << 20,
        nics=(nic,),
        allowed_actions=("start", "update", "delete"),
    )


async def seed(pool: Pool, count: int) -> list[Vm]:
    now = datetime.now(UTC)
    base: dict[str, Any] = {"revision": 1, "created_at": now, "updated_at": now}
    center = DataCenter(id=new_id(), name="bench", **base)
    cluster = Cluster(id=new_id(), name="bench", data_center_id=center.id, **base)
    await commit(pool, [DATA_CENTERS.insert(center, Nothing())])
    await commit(pool, [CLUSTERS.insert(cluster, Nothing())])
    made = [a_vm(number, cluster) for number in range(count)]
    for at in range(0, count, SEED_BATCH):
        await commit(pool, [VMS.insert(vm, VmPrivate()) for vm in made[at : at + SEED_BATCH]])
    return made


async def drained(pool: Pool) -> None:
    """Until the relay has moved every fact: it looks by itself once a second."""
    async with asyncio.timeout(120):
        while await pool.fetchval("select exists(select 1 from outbox)"):
            await asyncio.sleep(0.1)
