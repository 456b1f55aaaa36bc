"""The agent's hypervisor on a machine in memory: the real one's rules, without libvirt's connections and threads."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any, TypeVar

import libvirt

from host_agent.config import AgentConfig
from host_agent.events import EventName, HypervisorEvent
from host_agent.hypervisor import Hypervisor
from host_agent.migration_parameters import MigrationParameters
from host_agent.refusals import Disconnected, LibvirtError, refused, timed_out
from sim.qemu import Busy, Daemon, Domain, MemoryError_, in_kibibytes
from volery.contracts.domain import DomainState

T = TypeVar("T")

CALL_SECONDS = 0.004
START_CALL_SECONDS = 0.15
SWITCH_SECONDS = 0.12
"""Both sides stand still."""
FINISH_SECONDS = 0.02
GUARD_SECONDS = 2.0
JOB_SECONDS = 30.0
"""For so long libvirtd lets a call wait for a migration."""


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
        def named(connection: Any) -> T:
            return work(connection.lookupByUUIDString(vm_id))

        try:
            return await self._call(lane, doing, named, seconds)
        except Busy as busy:
            call = asyncio.ensure_future(self._after_moves(busy, doing, named))
        call.add_done_callback(_noticed)
        limit = seconds or self.config.domain_call_seconds
        await asyncio.wait({call}, timeout=limit)
        if call.done():
            return call.result()
        if marks:
            self._became_late(vm_id)
            call.add_done_callback(lambda _: self._came_back(vm_id))
        raise timed_out(doing, limit)

    async def _after_moves(self, busy: Busy, doing: str, work: Callable[[Any], T]) -> T:
        """What waits in libvirtd happens also after whoever asked for it has gone away."""
        end = self._loop.time() + JOB_SECONDS
        while (left := end - self._loop.time()) > 0:
            await asyncio.wait({busy.move.done}, timeout=left)
            try:
                return await self._called(0.0, doing, work)
            except Busy as again:
                busy = again
        held = "Timed out during operation: cannot acquire state change lock"
        raise refused(doing, LibvirtError.OPERATION_TIMEOUT, held)

    async def migrate(self, vm_id: str, parameters: MigrationParameters, seconds: float) -> None:
        """As libvirt's peer-to-peer migration: it goes on in libvirtd when the agent dies."""

        def begin(connection: Any) -> Move:
            domain = self._daemon.lookupByUUIDString(vm_id)
            if domain.migrating is not None:
                busy = "Requested operation is not valid: another migration job is already running"
                raise MemoryError_(LibvirtError.OPERATION_INVALID, busy)
            target = self._reach(parameters.destination_uri)
            if target is None or not target.up:
                raise MemoryError_(libvirt.VIR_ERR_SYSTEM_ERROR, "unable to connect to server")
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
            if self._lost.is_set() or not move.done.done():
                raise Disconnected(f"migrate VM {vm_id}", "the connection was lost")
            if (problem := move.done.result()) is not None:
                raise refused(f"migrate VM {vm_id}", problem.get_error_code(), str(problem))
        finally:
            self.leaving.discard(vm_id)


def _noticed(call: asyncio.Future[Any]) -> None:
    """Nobody may be left who hears of it."""
    if not call.cancelled():
        call.exception()


PHASES = ("prepare", "copy", "switch", "finish")


def _failed(why: str) -> MemoryError_:
    return MemoryError_(LibvirtError.OPERATION_FAILED, f"operation failed: {why}")


@dataclass(eq=False)
class Move:
    """A live migration: the destination waits, memory is copied, both stand still, the destination runs."""

    source: Domain
    target: Daemon
    xml: str
    phase: str = "prepare"
    """One of PHASES, or done."""
    reachable: Callable[[], bool] = lambda: True
    problem: MemoryError_ | None = None
    dropped: bool = False
    """The destination's libvirtd ends what waits there, since the source's is gone."""
    aborted: asyncio.Event = field(default_factory=asyncio.Event)
    done: asyncio.Future[MemoryError_ | None] = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )
    """Why it failed; None when the domain is there."""
    started: float = field(default_factory=lambda: asyncio.get_running_loop().time())

    def __post_init__(self) -> None:
        self.paused = self.source.state is DomainState.PAUSED
        """By somebody, before the move: then it stays so."""

    def _enter(self, phase: str) -> None:
        self.phase = phase
        self.source.daemon.moves(self.source, self.target, phase)

    def abort(self, why: MemoryError_) -> None:
        if self.phase in ("prepare", "copy"):
            self.problem = self.problem or why
            self.aborted.set()

    def source_lost(self) -> None:
        """The source's libvirtd went away: its connection to the destination's ends with it."""
        if self.phase in ("prepare", "copy"):
            self.dropped = True
            self.abort(_failed("libvirtd of the source went away"))

    def stats(self) -> dict[str, Any]:
        elapsed = asyncio.get_running_loop().time() - self.started
        return {"time_elapsed": int(elapsed * 1000), "data_total": 100, "data_remaining": 50}

    async def run(self) -> None:
        source, daemon = self.source, self.source.daemon
        source.migrating = self
        arrived = None
        try:
            arrived = self._prepare()
            if arrived is not None:
                await self._copy(arrived)
        finally:
            source.migrating = None
            if arrived is not None:
                arrived.arriving = None
            if not self.done.done():
                self.done.set_result(self.problem)
            self.phase = "done"
        if self.problem is None:
            details = {"time_elapsed": 1, "data_total": 100, "data_processed": 100}
            daemon.tell(HypervisorEvent(EventName.JOB_COMPLETED, source.vm_id, details))

    def _prepare(self) -> Domain | None:
        root = in_kibibytes(self.xml)
        vm_id = root.findtext("uuid", "")
        if vm_id in self.target.domains:
            taken = f"Requested operation is not valid: domain '{vm_id}' is already active"
            self.problem = MemoryError_(LibvirtError.OPERATION_INVALID, taken)
            return None
        arrived = Domain(self.target, vm_id, root, DomainState.INCOMING, "migration", arriving=self)
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
        while self.problem is None and asyncio.get_running_loop().time() < end:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(0.5, end - asyncio.get_running_loop().time())):
                    await self.aborted.wait()
            self.problem = self.problem or self._broken(arrived)
        if self.problem is not None:
            self._give_up(arrived)
            return
        await self._switch(arrived)

    def _broken(self, arrived: Domain) -> MemoryError_ | None:
        if not self.target.up:
            closed = "internal error: client socket is closed"
            return MemoryError_(libvirt.VIR_ERR_INTERNAL_ERROR, closed)
        if arrived.state is not DomainState.INCOMING:
            return _failed("job 'migration out' failed: Unable to write to socket")
        return None if self.reachable() else _failed("the destination can't be reached")

    def _give_up(self, arrived: Domain) -> None:
        """What waited on the destination ends: over a cut network as soon as the destination notices. The source runs on
        unless it was paused before."""
        if arrived.state is DomainState.INCOMING and self.reachable():
            if self.dropped:
                arrived.destroy()
            else:
                self.target.end(arrived, "failed")
        source = self.source
        if (source.state, source.reason) == (DomainState.PAUSED, "migration"):
            source.daemon.become(source, DomainState.RUNNING, "migration_canceled", "resumed", "migrated")

    async def _switch(self, arrived: Domain) -> None:
        """From here on nobody can call it off: a lost answer leaves the source paused."""
        source, daemon = self.source, self.source.daemon
        self._enter("switch")
        if source.state is DomainState.RUNNING:
            daemon.become(source, DomainState.PAUSED, "migration", "suspended", "migrated")
        if source.state is DomainState.PAUSED:
            await asyncio.sleep(SWITCH_SECONDS)
        if source.state is not DomainState.PAUSED:
            self.problem = _failed("domain is not running")
        self.problem = self.problem or self._broken(arrived)
        if self.problem is not None:
            self._give_up(arrived)
            return
        self._enter("finish")
        if self.paused:
            self.target.become(arrived, DomainState.PAUSED, "user", "suspended", "paused")
        else:
            self.target.become(arrived, DomainState.RUNNING, "migrated", "resumed", "migrated")
        await asyncio.sleep(FINISH_SECONDS)
        if not self.reachable():
            self.problem = _failed("the destination's answer was lost; the domain stays paused here")
            return
        daemon.end(source, "migrated")
