"""What happens to a lab: its hosts, their daemons and cables, guests, and the installation that manages them."""

from __future__ import annotations

import asyncio
import os
import random
import signal
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from lab.host import Host
from lab.lab import Lab
from volery.setup import embedded
from volery.setup.home import Home
from volery.setup.processes import ProcessId
from volery.setup.programs import CONTROL_PLANE


@dataclass
class LabFaults:
    """Whatever is killed is started again by the host's process 1 or by the installation's supervisor."""

    rng: random.Random
    lab: Lab
    home: Home
    done: list[str] = field(default_factory=list)

    async def strike(self) -> None:
        chosen = self.rng.choices([f for _, f in TABLE], weights=[w for w, _ in TABLE])[0]
        self.done.append(await chosen(self))

    def host(self) -> Host:
        return self.rng.choice(self.lab.hosts)

    async def pause(self, low: float, high: float) -> None:
        await asyncio.sleep(self.rng.uniform(low, high))


def _signal(process: ProcessId | None, number: signal.Signals) -> str:
    """To a process of the installation, unless it is just being started again."""
    if process is None:
        return " (was not running)"
    try:
        os.kill(process.pid, number)
    except ProcessLookupError:
        return " (had just ended)"
    return ""


async def kill_control_plane(faults: LabFaults) -> str:
    return "kill the control plane" + _signal(CONTROL_PLANE.process(faults.home), signal.SIGKILL)


async def pause_control_plane(faults: LabFaults) -> str:
    process = CONTROL_PLANE.process(faults.home)
    told = _signal(process, signal.SIGSTOP)
    await faults.pause(0.5, 4.0)
    _signal(process, signal.SIGCONT)
    return f"pause the control plane{told}"


async def kill_nats(faults: LabFaults) -> str:
    return "kill NATS" + _signal(embedded.status(faults.home, "nats"), signal.SIGKILL)


async def kill_postgres(faults: LabFaults) -> str:
    return "kill PostgreSQL" + _signal(embedded.status(faults.home, "postgres"), signal.SIGKILL)


async def kill_agent(faults: LabFaults) -> str:
    host = faults.host()
    await asyncio.to_thread(host.kill_agent)
    return f"kill agent {host.name}"


async def kill_libvirtd(faults: LabFaults) -> str:
    host = faults.host()
    await asyncio.to_thread(host.kill_libvirtd, stay_down=False)
    return f"kill libvirtd {host.name}"


async def cut_off(faults: LabFaults) -> str:
    """Its cable: control plane, storage beside the shared directory, and the other host are gone for it."""
    host = faults.host()
    await asyncio.to_thread(host.cut)
    await faults.pause(1.0, 6.0)
    await asyncio.to_thread(host.join)
    return f"cut {host.name}"


async def freeze(faults: LabFaults) -> str:
    """Everything on it stands still, connections stay open."""
    host = faults.host()
    await asyncio.to_thread(host.freeze)
    await faults.pause(0.5, 4.0)
    await asyncio.to_thread(host.thaw)
    return f"freeze {host.name}"


async def kill_guest(faults: LabFaults) -> str:
    host = faults.host()
    guests = host.pids("qemu-system-x86_64")
    if not guests:
        return f"kill no guest of {host.name}"
    try:
        os.kill(faults.rng.choice(guests), signal.SIGKILL)
    except ProcessLookupError:
        return f"kill no guest of {host.name}, it ended"
    return f"kill a guest of {host.name}"


async def power_cycle(faults: LabFaults) -> str:
    """Its guests are gone, and a new boot says so."""
    host = faults.host()
    await asyncio.to_thread(host.power_off)
    await faults.pause(0.1, 3.0)
    await asyncio.to_thread(host.power_on)
    return f"power-cycle {host.name}"


TABLE: tuple[tuple[int, Callable[[LabFaults], Awaitable[str]]], ...] = (
    (8, kill_agent),
    (6, kill_libvirtd),
    (6, cut_off),
    (4, kill_control_plane),
    (2, pause_control_plane),
    (4, kill_nats),
    (4, kill_postgres),
    (4, kill_guest),
    (2, freeze),
    (1, power_cycle),
)
