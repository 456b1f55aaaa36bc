"""Two hosts with a hypervisor each, for the suite that both hypervisors pass: what happens to their VMs from outside.

The real ones are libvirtd and QEMU in namespaces of their own; the simulated ones a daemon in memory on virtual time.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from host_agent import domxml, runningxml
from host_agent.domxml import Placement
from host_agent.events import EventName, HypervisorEvent
from host_agent.migration_parameters import MigrationParameters
from sim.hypervisor import MemoryHypervisor
from sim.loop import new_loop
from sim.qemu import Daemon, Guest
from tests.support.bare_guest import AtButton, bare_guest
from tests.support.libvirt_host import LibvirtHost
from tests.support.vms import VmHost, tiny_spec, vm_host
from volery.contracts.domain import DomainSpec, DomainState
from volery.contracts.errors import Refused

PATIENCE_SECONDS = 4.0
"""What a call on one domain may take here, before it is given up."""
NOT_SHARED = frozenset({EventName.AGENT_LIFECYCLE, EventName.MIGRATION_ITERATION, EventName.CONTROL_ERROR})
"""Guests in memory have no agents, their memory isn't copied in rounds, and no QEMU ends in the middle of a word."""


UNNOTICED = "stopped/unnoticed/gone"
STARTED = ("resumed/unpaused/running", "started/booted/running")


class Trouble(ABC):
    """What happens to one host."""

    @abstractmethod
    async def qemu_dies(self, vm_id: str) -> None: ...

    @abstractmethod
    async def guest_acts(self, vm_id: str) -> None:
        """By itself, without libvirt: it powers off, or panics, as it was made. It may not have heard yet that it is to."""

    @abstractmethod
    async def libvirtd_dies(self) -> None: ...

    @abstractmethod
    async def libvirtd_starts(self) -> None: ...


@dataclass
class Side:
    """One host."""

    vms: VmHost
    trouble: Trouble
    uri: str
    """Where a migration to it goes."""
    address: str = ""

    async def start(self, vm: DomainSpec, *, epoch: int = 1, paused: bool = False) -> None:
        hypervisor = self.vms.hypervisor
        xml = domxml.domain_xml(vm, Placement(epoch, 1), hypervisor.machine)
        await hypervisor.create(xml, paused=paused)

    async def state(self, vm: DomainSpec) -> tuple[DomainState, str]:
        now = await self.vms.hypervisor.domain(vm.vm_id)
        return now.state, now.reason

    def heard(self, vm: DomainSpec) -> list[str]:
        """What this host's hypervisor has said of a VM so far, in the words of the events."""
        said = [_words(e) for e in self.vms.heard if e.vm_id == vm.vm_id and e.name not in NOT_SHARED]
        if any(word.endswith("/gone") for word in said if word != UNNOTICED):
            return [
                word for word in said if word != UNNOTICED
            ]  # the audit looked while the event was on its way
        return said

    async def hears(self, vm: DomainSpec, *wanted: str, seconds: float = 20.0) -> None:
        """Waits until all of this was said, in that order and nothing else. A word with a question mark may be left out."""
        with contextlib.suppress(TimeoutError):
            await self.vms.until(lambda _: _fits(self.heard(vm), wanted), seconds)
        assert _fits(self.heard(vm), wanted), self.heard(vm)

    async def at_last(self, vm: DomainSpec, act: Callable[[], Awaitable[None]]) -> None:
        """Does it again until something was said: a guest whose firmware isn't through yet hears nothing."""
        before = len(self.heard(vm))
        async with asyncio.timeout(20):
            while len(self.heard(vm)) == before:
                with contextlib.suppress(Refused):  # it has ended, and that will be said
                    await act()
                with contextlib.suppress(TimeoutError):
                    await self.vms.until(lambda _: len(self.heard(vm)) > before, 0.5)

    def forget(self) -> None:
        self.vms.heard.clear()


def _fits(heard: list[str], wanted: Sequence[str]) -> bool:
    left = list(heard)
    for word in wanted:
        if left and left[0] == word.removeprefix("?"):
            left.pop(0)
        elif not word.startswith("?"):
            return False
    return not left


def _words(event: HypervisorEvent) -> str:
    if event.state is None:
        return event.name.value
    return f"{event.details['event']}/{event.details['reason']}/{event.state.value}"


@dataclass
class Stage:
    here: Side
    there: Side
    guest: Callable[[DomainSpec, AtButton | None, bool], None] = lambda vm, at_button, writes: None
    """Told of each VM that is made."""
    directory: Path = Path("/nowhere")

    def vm(self, at_button: AtButton | None = None, *, writes: bool = False, **changes: Any) -> DomainSpec:
        """A VM to be started. Without `at_button` its guest hears nothing; one that `writes` isn't moved slowly."""
        kernel = "" if at_button is None else str(bare_guest(self.directory, at_button, writes=writes))
        vm = tiny_spec(kernel_path=kernel, initrd_path="", kernel_cmdline="", **changes)
        self.guest(vm, at_button, writes)
        return vm

    def writing(self) -> DomainSpec:
        return self.vm(AtButton.POWERS_OFF, writes=True)

    async def move(self, vm: DomainSpec, *, slowly: bool = False, uri: str = "") -> None:
        """From here to there, under epoch 2."""
        root = runningxml.parsed(await self.here.vms.hypervisor.domain_xml(vm.vm_id, migratable=True))
        parameters = MigrationParameters(
            uri or self.there.uri,
            self.there.address,
            runningxml.with_placement(root, Placement(2, 1)),
            bandwidth_mib_per_second=20 if slowly else 0,
            auto_converge=False,
        )
        await self.here.vms.hypervisor.migrate(vm.vm_id, parameters, 60)

    async def moving(self, vm: DomainSpec) -> asyncio.Task[None]:
        """A move of a VM that is started, so slow that it goes on: it copies when this returns."""
        await self.here.start(vm)
        await self.here.hears(vm, *STARTED)
        self.here.forget()
        self.there.forget()
        move = asyncio.create_task(self.move(vm, slowly=True))
        async with asyncio.timeout(20):
            while not move.done() and not (await self._stats(vm)):
                await asyncio.sleep(0.05)
        assert not move.done()
        assert await self.here.state(vm) == (DomainState.RUNNING, "booted")
        assert await self.there.state(vm) == (DomainState.INCOMING, "migration")
        return move

    async def _stats(self, vm: DomainSpec) -> int:
        return (await self.here.vms.hypervisor.job_stats(vm.vm_id)).total_bytes


Case = Callable[[Stage], Awaitable[None]]


# The real one


@dataclass
class RealTrouble(Trouble):
    machine: LibvirtHost
    vms: VmHost

    async def qemu_dies(self, vm_id: str) -> None:
        os.kill(self.machine.qemu(vm_id), signal.SIGKILL)

    async def guest_acts(self, vm_id: str) -> None:
        console = await self.vms.hypervisor.open_console(vm_id)
        await console.write(b"now")
        await console.close()

    async def libvirtd_dies(self) -> None:
        await asyncio.to_thread(self.machine.kill_daemon)

    async def libvirtd_starts(self) -> None:
        await asyncio.to_thread(self.machine.start_daemon)


@asynccontextmanager
async def real_stage(
    machines: tuple[LibvirtHost, LibvirtHost], address: str, path: Path
) -> AsyncIterator[Stage]:
    """`address`: of the second, on the cable between them."""
    async with AsyncExitStack() as hosts:
        sides = []
        for machine in machines:
            settings = {"domain_call_seconds": PATIENCE_SECONDS}
            vms = await hosts.enter_async_context(vm_host(machine.uri, path, **settings))
            sides.append(Side(vms, RealTrouble(machine, vms), machine.uri, address))
        yield Stage(*sides, directory=path)


# The one in memory


@dataclass
class SimulatedTrouble(Trouble):
    daemon: Daemon
    panicking: set[str]

    async def qemu_dies(self, vm_id: str) -> None:
        self.daemon.crash(self.daemon.domains[vm_id], panic=False)

    async def guest_acts(self, vm_id: str) -> None:
        domain = self.daemon.domains[vm_id]
        if vm_id in self.panicking:
            self.daemon.crash(domain, panic=True)
        else:
            await self.daemon.power_off(domain, 0.0)

    async def libvirtd_dies(self) -> None:
        self.daemon.stop()

    async def libvirtd_starts(self) -> None:
        self.daemon.start()


@dataclass
class Guests:
    """How the guests in memory behave."""

    known: dict[str, Guest] = field(default_factory=dict)
    panicking: set[str] = field(default_factory=set)

    def add(self, vm: DomainSpec, at_button: AtButton | None, writes: bool) -> None:
        hears = at_button is AtButton.POWERS_OFF
        self.known[vm.vm_id] = Guest(0.2 if hears else None, 8.0 if writes else 0.5)
        if at_button is AtButton.PANICS:
            self.panicking.add(vm.vm_id)


def simulated(case: Case, path: Path) -> None:
    """Plays a case in memory."""
    guests = Guests()
    names = ("here", "there")
    loop = new_loop(600.0)

    async def main() -> None:
        daemons = {f"qemu+sim://{n}": Daemon(n, guest_of=lambda vm_id: guests.known[vm_id]) for n in names}
        async with AsyncExitStack() as hosts:
            sides = []
            for uri, daemon in daemons.items():
                vms = await hosts.enter_async_context(
                    vm_host(
                        uri,
                        path,
                        lambda config, daemon=daemon: MemoryHypervisor(config, daemon, daemons.get),
                        domain_call_seconds=PATIENCE_SECONDS,
                    )
                )
                sides.append(Side(vms, SimulatedTrouble(daemon, guests.panicking), uri))
            await case(Stage(*sides, guest=guests.add, directory=path))

    loop.run(main())
    assert not loop.failed
