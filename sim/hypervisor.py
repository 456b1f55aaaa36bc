"""The agent's hypervisor on a machine in memory: the real one's rules, without libvirt's connections and threads."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import xml.etree.ElementTree as ET
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any, TypeVar

import libvirt

from host_agent.config import AgentConfig
from host_agent.events import EventName, HypervisorEvent
from host_agent.hypervisor import Hypervisor
from host_agent.migration_parameters import MigrationParameters
from host_agent.refusals import Disconnected, LibvirtError, refused
from sim.qemu import Daemon, Domain, MemoryError_
from volery.contracts.domain import DomainState

T = TypeVar("T")

CALL_SECONDS = 0.004
START_CALL_SECONDS = 0.15
SWITCH_SECONDS = 0.12
"""Both sides stand still."""
FINISH_SECONDS = 0.02
GUARD_SECONDS = 2.0


class _View:
    """A domain as libvirt-python shows it: `state()` is a method there."""

    def __init__(self, domain: Domain) -> None:
        self._domain = domain

    def __getattr__(self, name: str) -> Any:
        return getattr(self._domain, name)

    def state(self) -> tuple[int, int]:
        return self._domain.state_()


class _Connection:
    """A daemon as a connection."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon

    def __getattr__(self, name: str) -> Any:
        return getattr(self._daemon, name)

    def lookupByUUIDString(self, vm_id: str) -> _View:
        return _View(self._daemon.lookupByUUIDString(vm_id))

    def listAllDomains(self, flags: int = 0) -> list[_View]:
        return [_View(domain) for domain in self._daemon.listAllDomains(flags)]


class MemoryHypervisor(Hypervisor):
    """`reach(uri)` is the daemon that a migration goes to, or None when its machine can't be reached."""

    def __init__(
        self, config: AgentConfig, daemon: Daemon, reach: Callable[[str], Daemon | None] = lambda uri: None
    ) -> None:
        super().__init__(config)
        self.domain_type = "qemu" if config.hypervisor == "auto" else config.hypervisor
        self._daemon = daemon
        self._reach = reach
        self._lost = asyncio.Event()

    # What a daemon tells its listeners

    def hear(self, event: HypervisorEvent) -> None:
        # From another thread in the real one: never in the middle of a call of ours.
        self._loop.call_soon(self.emit, event, context=self._context)

    def lose(self) -> None:
        self._loop.call_soon(self._lost.set, context=self._context)

    async def _supervise(self) -> None:
        self._context = contextvars.copy_context()
        while True:
            await self._daemon.came_up.wait()
            await asyncio.sleep(CALL_SECONDS)
            if not self._daemon.up:
                continue
            self._lost = asyncio.Event()
            self._daemon.listeners.append(self)
            self._connected.set()
            self.emit(HypervisorEvent(EventName.CONNECTED))
            try:
                await self._lost.wait()
            finally:
                self._connected.clear()
                if self in self._daemon.listeners:
                    self._daemon.listeners.remove(self)
            self._problem = "the connection was lost"
            self.emit(HypervisorEvent(EventName.DISCONNECTED))
            await asyncio.sleep(0.1)

    async def processes(self, vm_ids: Collection[str]) -> dict[str, int]:
        """What has ended in memory has ended."""
        return {}

    async def _call(self, lane: Any, doing: str, work: Callable[[Any], T], seconds: float) -> T:
        if not doing.startswith("start"):
            return await self._called(CALL_SECONDS, doing, work)
        call = asyncio.ensure_future(self._called(START_CALL_SECONDS, doing, work))
        try:
            return await asyncio.shield(call)
        except asyncio.CancelledError:  # as in the real one's thread, it can't be stopped, and is waited for
            await asyncio.wait({call})
            raise

    async def _called(self, seconds: float, doing: str, work: Callable[[Any], T]) -> T:
        await asyncio.sleep(seconds)
        if not self._daemon.up:
            raise Disconnected(doing, "the daemon is away")
        try:
            return work(_Connection(self._daemon))
        except libvirt.libvirtError as error:
            raise refused(doing, error.get_error_code(), str(error)) from error

    async def _domain_call(
        self, lane: Any, vm_id: str, doing: str, work: Callable[[Any], T], seconds: float, *, marks: bool
    ) -> T:
        return await self._call(lane, doing, lambda c: work(c.lookupByUUIDString(vm_id)), seconds)

    async def migrate(self, vm_id: str, parameters: MigrationParameters, seconds: float) -> None:
        """As libvirt's peer-to-peer migration: it goes on in libvirtd when the agent dies."""

        def begin(connection: Any) -> Move:
            domain = self._daemon.lookupByUUIDString(vm_id)
            if domain.migrating is not None:
                raise MemoryError_(LibvirtError.RESOURCE_BUSY, "another migration of the domain is active")
            target = self._reach(parameters.destination_uri)
            if target is None or not target.up:
                raise MemoryError_(LibvirtError.OPERATION_FAILED, "unable to connect to the destination")
            return Move(domain, target, parameters.destination_xml)

        self.leaving.add(vm_id)
        try:
            move = await self._call(self._work, f"migrate VM {vm_id}", begin, seconds)
            move.reachable = lambda: self._reach(parameters.destination_uri) is not None
            self._daemon.spawn(move.run())
            lost: asyncio.Future[Any] = asyncio.ensure_future(self._lost.wait())
            try:
                waits: list[asyncio.Future[Any]] = [move.done, lost]
                await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            finally:
                lost.cancel()
            if not move.done.done():
                raise Disconnected(f"migrate VM {vm_id}", "the connection was lost")
            problem = move.done.result()
            if problem:
                raise refused(f"migrate VM {vm_id}", LibvirtError.OPERATION_FAILED, problem)
        finally:
            self.leaving.discard(vm_id)


PHASES = ("prepare", "copy", "switch", "finish")


@dataclass(eq=False)
class Move:
    """A live migration: the destination waits, memory is copied, both stand still, the destination runs."""

    source: Domain
    target: Daemon
    xml: str
    phase: str = "prepare"
    """One of PHASES, or done."""
    reachable: Callable[[], bool] = lambda: True
    problem: str = ""
    aborted: asyncio.Event = field(default_factory=asyncio.Event)
    done: asyncio.Future[str] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    """Why it failed; "" when the domain is there."""
    started: float = field(default_factory=lambda: asyncio.get_running_loop().time())

    def _enter(self, phase: str) -> None:
        self.phase = phase
        self.source.daemon.moves(self.source, self.target, phase)

    def abort(self, why: str) -> None:
        if self.phase in ("prepare", "copy"):
            self.problem = self.problem or why
            self.aborted.set()

    def stats(self) -> dict[str, Any]:
        elapsed = asyncio.get_running_loop().time() - self.started
        return {"time_elapsed": int(elapsed * 1000), "data_total": 100, "data_remaining": 50}

    async def run(self) -> None:
        source, daemon = self.source, self.source.daemon
        source.migrating = self
        try:
            arrived = self._prepare()
            if arrived is not None:
                await self._copy(arrived)
        finally:
            source.migrating = None
            if not self.done.done():
                self.done.set_result(self.problem)
            self.phase = "done"
        if not self.problem:
            details = {"time_elapsed": 1, "data_total": 100, "data_processed": 100}
            daemon.tell(HypervisorEvent(EventName.JOB_COMPLETED, source.vm_id, details))

    def _prepare(self) -> Domain | None:
        root = ET.fromstring(self.xml)  # noqa: S314 - the agent wrote it
        vm_id = root.findtext("uuid", "")
        if vm_id in self.target.domains:
            self.problem = f"domain '{vm_id}' is already active on the destination"
            return None
        arrived = Domain(self.target, vm_id, root, DomainState.INCOMING, "migration")
        self.target.domains[vm_id] = arrived
        event = {"event": "started", "reason": "migrated"}
        self.target.tell(HypervisorEvent(EventName.LIFECYCLE, vm_id, event, DomainState.INCOMING))
        self.target.spawn(self._guard(arrived))
        self._enter("prepare")
        return arrived

    async def _guard(self, arrived: Domain) -> None:
        """On the destination: what waits for a source that is gone ends."""
        while arrived.state is DomainState.INCOMING:
            await asyncio.sleep(GUARD_SECONDS)
            gone = self.phase == "done" or self.source.state is DomainState.GONE or not self.reachable()
            if gone and arrived.state is DomainState.INCOMING:
                self.target.end(arrived, "failed")

    async def _copy(self, arrived: Domain) -> None:
        self._enter("copy")
        seconds = self.source.daemon.guest_of(self.source.vm_id).migration_seconds
        end = asyncio.get_running_loop().time() + seconds
        while not self.problem and asyncio.get_running_loop().time() < end:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(0.5, end - asyncio.get_running_loop().time())):
                    await self.aborted.wait()
            self.problem = self.problem or self._broken(arrived)
        if self.problem:
            self._drop(arrived)
            return
        await self._switch(arrived)

    def _broken(self, arrived: Domain) -> str:
        if arrived.state is not DomainState.INCOMING or not self.target.up:
            return "the destination's QEMU ended"
        return "" if self.reachable() else "the destination can't be reached"

    def _drop(self, arrived: Domain) -> None:
        """What waited on the destination ends: over a cut network as soon as the destination notices."""
        if arrived.state is DomainState.INCOMING and self.reachable():
            self.target.end(arrived, "failed")

    async def _switch(self, arrived: Domain) -> None:
        """From here on nobody can call it off: a lost answer leaves the source paused."""
        source, daemon = self.source, self.source.daemon
        self._enter("switch")
        if (now := source.state) is not DomainState.RUNNING:
            self.problem = f"the domain is {now.value}"
            self._drop(arrived)
            return
        daemon.become(source, DomainState.PAUSED, "migration", "suspended", "migrated")
        await asyncio.sleep(SWITCH_SECONDS)
        stands_still = source in daemon.domains.values()
        if (broken := self._broken(arrived)) or not stands_still:
            self.problem = broken or "the domain ended"
            self._drop(arrived)
            if stands_still:
                daemon.become(source, DomainState.RUNNING, "migration_canceled", "resumed", "unpaused")
            return
        self._enter("finish")
        self.target.become(arrived, DomainState.RUNNING, "migrated", "resumed", "migrated")
        await asyncio.sleep(FINISH_SECONDS)
        if not self.reachable():
            self.problem = "the destination's answer was lost; the domain stays paused here"
            return
        daemon.end(source, "migrated")
