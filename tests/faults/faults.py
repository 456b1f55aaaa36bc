"""What happens to the processes of a control plane and its hosts. Each fault repairs itself as an init would."""

from __future__ import annotations

import asyncio
import random
import signal
import subprocess
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

from tests.faults.processes import ServiceProcess, kill_child
from tests.support.libvirt_host import LibvirtHost
from tests.support.plane import Agent, Plane
from volery.setup import embedded, servers


@dataclass
class Faults:
    """Whatever can be killed, paused or wiped, and what was."""

    rng: random.Random
    plane: Plane
    services: dict[str, ServiceProcess]
    agents: Sequence[Agent]
    machines: Sequence[LibvirtHost]
    done: list[str] = field(default_factory=list)

    async def strike(self) -> None:
        chosen = self.rng.choices([f for _, f in TABLE], weights=[w for w, _ in TABLE])[0]
        self.done.append(await chosen(self))

    async def pause(self, low: float = 0.1, high: float = 1.5) -> None:
        await asyncio.sleep(self.rng.uniform(low, high))

    def service(self) -> ServiceProcess:
        return self.services[self.rng.choice(list(self.services))]

    def restart_nats(self) -> None:
        embedded.stop(self.plane.home, "nats")
        self.plane.nats = embedded.start_nats(self.plane.home, servers.nats_options(self.plane.home))

    def restart_postgres(self) -> None:
        embedded.stop(self.plane.home, "postgres")
        self.plane.postgres = embedded.start_postgres(self.plane.home)


async def kill_service(faults: Faults) -> str:
    service = faults.service()
    service.kill()
    await faults.pause()
    service.start()
    return f"kill {service.name}"


async def restart_service(faults: Faults) -> str:
    """Gently: SIGTERM, and whatever it does before it ends."""
    service = faults.service()
    await asyncio.to_thread(service.stop)
    service.start()
    return f"restart {service.name}"


async def pause_service(faults: Faults) -> str:
    service = faults.service()
    service.signal(signal.SIGSTOP)
    await faults.pause(0.5, 4.0)
    service.signal(signal.SIGCONT)
    return f"pause {service.name}"


async def kill_agent(faults: Faults) -> str:
    agent = faults.rng.choice(faults.agents)
    agent.kill()
    await faults.pause()
    agent.start()
    return f"kill agent {agent.host.name}"


async def pause_agent(faults: Faults) -> str:
    agent = faults.rng.choice(faults.agents)
    assert agent.process is not None
    agent.process.send_signal(signal.SIGSTOP)
    await faults.pause(0.5, 4.0)
    agent.process.send_signal(signal.SIGCONT)
    return f"pause agent {agent.host.name}"


async def kill_libvirtd(faults: Faults) -> str:
    number = faults.rng.randrange(len(faults.machines))
    machine = faults.machines[number]
    await asyncio.to_thread(machine.kill_daemon)
    await faults.pause()
    await asyncio.to_thread(machine.start_daemon)
    return f"kill libvirtd h{number}"


async def kill_nats(faults: Faults) -> str:
    kill_child(faults.plane.nats.pid)
    await faults.pause()
    await asyncio.to_thread(faults.restart_nats)
    return "kill NATS"


async def wipe_nats(faults: Faults) -> str:
    """Its whole store is gone, streams and all."""
    kill_child(faults.plane.nats.pid)
    await asyncio.to_thread(embedded.stop, faults.plane.home, "nats")
    store = faults.plane.home.nats / "jetstream"
    assert store.is_dir()
    await asyncio.to_thread(subprocess.run, ["rm", "-rf", str(store)], check=True)
    await asyncio.to_thread(faults.restart_nats)
    return "wipe NATS"


async def kill_postgres(faults: Faults) -> str:
    kill_child(faults.plane.postgres.pid)
    await faults.pause()
    await asyncio.to_thread(faults.restart_postgres)
    return "kill PostgreSQL"


TABLE: tuple[tuple[int, Callable[[Faults], Awaitable[str]]], ...] = (
    (5, kill_service),
    (1, restart_service),
    (3, pause_service),
    (3, kill_agent),
    (2, pause_agent),
    (2, kill_libvirtd),
    (2, kill_nats),
    (2, kill_postgres),
    (1, wipe_nats),
)
