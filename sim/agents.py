"""The real agent on a host in memory: its journal, intake, orders, reports and spool; only its ground is ours."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from host_agent import domains
from host_agent.action import Host
from host_agent.agent import Agent, Parts
from host_agent.config import AgentConfig
from host_agent.enrolment import Identity, Keys
from host_agent.fencing import Run
from host_agent.ground import Ground
from host_agent.peers import Knock
from host_agent.reports import Senses
from sim.bmc import AGENT
from sim.hypervisor import MemoryHypervisor
from sim.machines import HostMachine
from sim.nats import MemoryClient
from sim.qemu import Daemon
from sim.storage import HostNetworks, HostStorage, Shelf
from volery.contracts.agent import HostCapabilities
from volery.contracts.enrolment import Enrolled
from volery.contracts.metrics import HostSample
from volery.contracts.peers import Door
from volery.runtime.clock import utc_now

BEAT_SECONDS = 1.0
GIB = 1 << 30
CPUS, MEMORY_BYTES = 16, 64 * GIB


def uri_of(host: str) -> str:
    return f"qemu+tls://{host}/system"


def host_of(door: Door) -> str:
    """The name of the machine whose door it is."""
    return door.address.rpartition(":")[0]


def capabilities(machine: HostMachine) -> HostCapabilities:
    return HostCapabilities(
        hostname=machine.name,
        dmi_uuid=machine.hardware_uuid,
        fence_agents=(AGENT,),
        libvirt_version=9_000_000,
        qemu_version=7_002_000,
        kvm=True,
        cpus=CPUS,
        memory_bytes=MEMORY_BYTES,
        machines=("q35",),
        data_address=f"{machine.name}:1",
        migration_address=machine.name,
        libvirt_uri=uri_of(machine.name),
    )


async def _never(config: AgentConfig) -> bool:
    return False


@asynccontextmanager
async def _alone(state_dir: Path) -> AsyncIterator[None]:
    """A machine in memory never starts two agents."""
    yield


def main_of(
    machine: HostMachine,
    shelf: Shelf,
    owner_keys: dict[str, str],
    reach: Callable[[HostMachine, str], Daemon | None],
    fence: Run,
    knock: Knock,
) -> Callable[[], Coroutine[Any, Any, int]]:
    """The agent's main coroutine, anew for every start."""

    async def sample(host: Host) -> HostSample:
        return HostSample(host_id=machine.host_id, boot_id=machine.boot_id, at=utc_now(), cpu_percent=10.0)

    async def main() -> int:
        def reachable() -> bool:
            return shelf.up and not machine.link.cut

        storage, networks = (
            HostStorage(shelf, machine.disk.connected, reachable, machine.daemon.mounts),
            HostNetworks(),
        )

        async def describe(host: Host) -> HostCapabilities:
            return capabilities(machine)

        async def nothing(host: Host) -> tuple[()]:
            return ()

        ground = Ground(
            hypervisor=lambda config: MemoryHypervisor(
                config, machine.daemon, lambda uri: reach(machine, uri)
            ),
            client=lambda advice: MemoryClient(machine.server, machine.link),
            database=machine.disk.open,
            alone=_alone,
            boot_id=lambda path: machine.boot_id,
            now_ms=machine.clock.boot_ms,
            fence=fence,
            knock=knock,
            going_down=_never,
        )
        parts = Parts(
            actions=(*domains.ACTIONS, *storage.actions(), *networks.actions()),
            senses=Senses(describe, storage.report, networks.report, nothing, nothing),
            sample=sample,
            ground=ground,
        )
        config = AgentConfig(
            state_dir=f"/sim/{machine.name}",
            hypervisor="qemu",
            beat_seconds=BEAT_SECONDS,
            sample_seconds=120.0,
        )
        return await Agent(config, _identity(machine, owner_keys), parts).run(asyncio.Event())

    return main


def _identity(machine: HostMachine, owner_keys: dict[str, str]) -> Identity:
    enrolled = Enrolled(
        host_id=machine.host_id,
        installation="volery",
        user_jwt="",
        bus_servers=("nats://sim:4222",),
        owner_keys=owner_keys,
        ca_pem="",
        certificate_pem="",
    )
    return Identity(keys=Keys(seed="", data_key_pem=""), enrolled=enrolled)
