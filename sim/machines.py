"""Machines: power, a link to the network, a clock, processes; hosts also have libvirtd, a disk and a BMC."""

from __future__ import annotations

import asyncio
import contextvars
import random
import uuid
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

from sim.clocks import MachineClock, Time
from sim.journal import Disk
from sim.loop import PROCESS, Process, SimLoop
from sim.nats import Link, NatsServer
from sim.qemu import Daemon, Domain
from volery.contracts.ids import SOURCE, Source, random_id
from volery.runtime.clock import CLOCK

Work = Callable[[], Coroutine[Any, Any, Any]]
RESTART_SECONDS = 1.0
"""systemd's, after a program ended by itself."""


@dataclass(eq=False)
class Machine:
    """Runs processes until it loses its power."""

    name: str
    loop: SimLoop
    server: NatsServer
    time: Time
    chance: random.Random
    """Where ids come from."""
    on: bool = True
    frozen: bool = False
    processes: list[Process] = field(default_factory=list)
    killed: Callable[[Process], None] = lambda process: None
    """Told of each process that ends without a word: its database sessions end."""

    def __post_init__(self) -> None:
        self.link = Link(self.name)
        self.clock = MachineClock(self.time)
        self.source = Source(lambda: self.clock.unix_ms(), self.chance.randbytes)

    @property
    def reachable(self) -> bool:
        return self.on and not self.frozen and not self.link.cut

    def start(self, name: str, work: Work, ended: Callable[[Process], None] | None = None) -> Process:
        """`ended` is called when the work ends by itself."""
        process = Process(f"{self.name}/{name}", self)
        process.stopped = self.frozen
        self.processes.append(process)
        task = self.run_in(process, work())

        def done(task: asyncio.Task[Any]) -> None:
            if not process.dead:
                if not task.cancelled() and (error := task.exception()) is not None:
                    process.failure = error
                self.kill(process)
                if ended is not None:
                    ended(process)

        task.add_done_callback(done, context=contextvars.Context())
        return process

    def run_in(self, process: Process, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Begins a coroutine as this process's."""
        context = contextvars.Context()

        def begin() -> asyncio.Task[Any]:
            PROCESS.set(process)
            CLOCK.set(self.clock.clock)
            SOURCE.set(self.source)
            task: asyncio.Task[Any] = self.loop.create_task(work)
            return task

        return context.run(begin)

    def kill(self, process: Process, *, power: bool = False) -> None:
        """SIGKILL."""
        if process.dead:
            return
        self.loop.kill(process)
        self.processes.remove(process)
        self.loop.graves.append(process)
        self.server.process_gone(process, power=power)
        self.killed(process)

    def stop(self, process: Process) -> None:
        """SIGSTOP."""
        if not process.dead and not process.stopped:
            self.loop.stop_process(process)
            self.server.process_stopped(process)

    def go_on(self, process: Process) -> None:
        """SIGCONT."""
        if process.stopped and not self.frozen:
            self.server.process_continued(process)
            self.loop.continue_process(process)

    def freeze(self) -> None:
        """Everything stands still: a paused VM, a machine that swaps itself to death."""
        self.frozen = True
        for process in list(self.processes):
            self.stop(process)

    def thaw(self) -> None:
        self.frozen = False
        for process in list(self.processes):
            self.go_on(process)

    def lose_power(self) -> None:
        if self.on:
            self.on = self.frozen = False
            for process in list(self.processes):
                self.kill(process, power=True)


@dataclass(eq=False)
class HostMachine(Machine):
    """A KVM host. `agent` makes the agent's main coroutine."""

    host_id: str = ""
    agent: Work | None = None
    executes: Callable[[HostMachine, Domain, bool], None] = lambda host, domain, runs: None
    died: Callable[[HostMachine], None] = lambda host: None
    """Told just before its power goes."""
    boot_seconds: float = 25.0
    boots: int = 0
    boot_id: str = ""
    agent_process: Process | None = None
    agent_off: bool = False
    """Somebody keeps the agent from being started."""

    @property
    def hardware_uuid(self) -> str:
        """What its firmware says, and its BMC."""
        return str(uuid.uuid5(uuid.NAMESPACE_DNS, self.name))

    def __post_init__(self) -> None:
        super().__post_init__()
        self.disk = Disk()
        self.daemon = Daemon(self.name, lambda domain, runs: self.executes(self, domain, runs))
        self.daemon.up = False
        self.daemon.came_up.clear()
        self.on = False
        self.kernel: Process | None = None
        self.booting: asyncio.TimerHandle | None = None

    def power_on(self, boot_seconds: float | None = None) -> None:
        if self.on or self.booting is not None:
            return
        seconds = self.boot_seconds if boot_seconds is None else boot_seconds
        self.booting = self.loop.call_later(seconds, self._boot, context=contextvars.Context())

    def _boot(self) -> None:
        self.booting = None
        self.on = True
        self.boots += 1
        self.clock.booted_at = self.loop.time()
        token = SOURCE.set(self.source)
        self.boot_id = random_id()
        SOURCE.reset(token)
        self.kernel = Process(f"{self.name}/kernel", self)
        self.processes.append(self.kernel)
        self.daemon.run_there = self._in_kernel
        self.daemon.start()
        self.start_agent()

    def _in_kernel(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        assert self.kernel is not None
        return self.run_in(self.kernel, work)

    @property
    def audible(self) -> bool:
        """Whether its agent can be heard now."""
        process = self.agent_process
        return self.reachable and process is not None and not process.dead and not process.stopped

    def start_agent(self) -> None:
        if self.agent is None or self.agent_off or not self.on:
            return
        if self.agent_process is None or self.agent_process.dead:
            self.agent_process = self.start("agent", self.agent, self._agent_ended)

    def _agent_ended(self, process: Process) -> None:
        self.loop.call_later(RESTART_SECONDS, self.start_agent, context=contextvars.Context())

    def kill_agent(self, off_seconds: float = RESTART_SECONDS) -> None:
        if self.agent_process is not None and not self.agent_process.dead:
            self.kill(self.agent_process)
        self.loop.call_later(off_seconds, self.start_agent, context=contextvars.Context())

    def freeze(self) -> None:
        super().freeze()
        for domain in self.daemon.domains.values():
            self.executes(self, domain, False)

    def thaw(self) -> None:
        self.frozen = False
        for domain in self.daemon.domains.values():
            self.executes(self, domain, domain.state.value == "running")
        super().thaw()

    def lose_power(self) -> None:
        if self.booting is not None:
            self.booting.cancel()
            self.booting = None
        if self.on:
            self.died(self)
            self.daemon.power_lost()
            super().lose_power()
            self.agent_process = self.kernel = None
