"""QEMU and libvirtd of one machine, in memory: domains with libvirt's states and events, guests that react to buttons.

A domain *executes* while its vCPUs run: that is what the oracle looks at, and what writes disks. libvirtd may be away
while QEMUs go on; power takes both at once and says nothing.
"""

from __future__ import annotations

import asyncio
import random
import xml.etree.ElementTree as ET
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import libvirt

from host_agent import runningxml
from host_agent.domxml import NAMESPACE
from host_agent.events import EventName, HypervisorEvent
from host_agent.refusals import LibvirtError
from volery.contracts.domain import DomainState

STATES: Mapping[DomainState, int] = {
    DomainState.RUNNING: libvirt.VIR_DOMAIN_RUNNING,
    DomainState.PAUSED: libvirt.VIR_DOMAIN_PAUSED,
    DomainState.INCOMING: libvirt.VIR_DOMAIN_PAUSED,
    DomainState.SHUTTING_DOWN: libvirt.VIR_DOMAIN_SHUTDOWN,
    DomainState.CRASHED: libvirt.VIR_DOMAIN_CRASHED,
}
REASONS: Mapping[tuple[DomainState, str], int] = {
    (DomainState.RUNNING, "booted"): libvirt.VIR_DOMAIN_RUNNING_BOOTED,
    (DomainState.RUNNING, "migrated"): libvirt.VIR_DOMAIN_RUNNING_MIGRATED,
    (DomainState.RUNNING, "unpaused"): libvirt.VIR_DOMAIN_RUNNING_UNPAUSED,
    (DomainState.RUNNING, "migration_canceled"): libvirt.VIR_DOMAIN_RUNNING_MIGRATION_CANCELED,
    (DomainState.PAUSED, "user"): libvirt.VIR_DOMAIN_PAUSED_USER,
    (DomainState.PAUSED, "migration"): libvirt.VIR_DOMAIN_PAUSED_MIGRATION,
    (DomainState.INCOMING, "migration"): libvirt.VIR_DOMAIN_PAUSED_MIGRATION,
}
GONE = DomainState.GONE


class MemoryError_(libvirt.libvirtError):  # type: ignore[misc]
    """What libvirt refuses, with its number."""

    def __init__(self, code: int, message: str) -> None:
        Exception.__init__(self, message)
        self.err = (int(code), 0, message, 0, "", None, None, -1, -1)


class Busy(Exception):
    """The domain is being moved, and libvirtd lets the call wait for that."""

    def __init__(self, move: Any) -> None:
        super().__init__("a migration has the domain")
        self.move = move


def _invalid(what: str) -> MemoryError_:
    return MemoryError_(LibvirtError.OPERATION_INVALID, f"Requested operation is not valid: {what}")


@dataclass(slots=True)
class Guest:
    """How a VM's guest behaves."""

    shutdown_seconds: float | None = 3.0
    """From the power button until it powers off; None: it doesn't listen."""
    migration_seconds: float = 4.0
    """How long its memory takes to move."""

    def draw(self, chance: random.Random) -> None:
        self.shutdown_seconds = None if chance.random() < 0.1 else chance.uniform(1, 20)
        self.migration_seconds = chance.choice((0.6, 3.0, 12.0, 40.0))


@dataclass(slots=True, eq=False)
class Domain:
    """A transient domain."""

    daemon: Daemon
    vm_id: str
    root: ET.Element
    state: DomainState = DomainState.RUNNING
    reason: str = "booted"
    migrating: Any = None
    """The move under way, on its source."""
    arriving: Any = None
    """The same, on its destination."""
    pressed: bool = False
    described: str = ""
    """`root` as text, once it was asked for."""

    @property
    def epoch(self) -> int:
        found = runningxml.metadata_of(self.root)
        return found.epoch if found is not None else 0

    @property
    def disks(self) -> tuple[str, ...]:
        """Paths or LUNs that it writes."""
        found = []
        for disk in self.root.iterfind("devices/disk"):
            source = disk.find("source")
            if source is not None and disk.find("readonly") is None and disk.find("shareable") is None:
                found.append(source.get("file") or source.get("name") or "")
        return tuple(found)

    # libvirt's virDomain

    def UUIDString(self) -> str:
        return self.vm_id

    def name(self) -> str:
        return self.root.findtext("name", "")

    def XMLDesc(self, flags: int = 0) -> str:
        self.described = self.described or ET.tostring(self.root, encoding="unicode")
        return self.described

    def state_(self) -> tuple[int, int]:
        return STATES[self.state], REASONS.get((self.state, self.reason), 0)

    def _wait_for_moves(self) -> None:
        move = self.migrating or self.arriving
        if move is not None:
            raise Busy(move)

    def destroy(self) -> None:
        self.daemon.become(self, DomainState.SHUTTING_DOWN, "unknown", "shutdown", "host")
        self.daemon.end(self, "destroyed")

    def suspend(self) -> None:
        """One that is being moved stands still until it has arrived, or the move has failed, and then runs on."""
        if self.state in (DomainState.PAUSED, DomainState.INCOMING):
            return
        if self.migrating is not None:
            self.daemon.become(self, DomainState.PAUSED, "migration", "suspended", "migrated")
        else:
            self.daemon.become(self, DomainState.PAUSED, "user", "suspended", "paused")

    def resume(self) -> None:
        self._wait_for_moves()
        if self.state is DomainState.RUNNING:
            raise _invalid("domain is already running")
        if self.state is DomainState.PAUSED:
            self.daemon.become(self, DomainState.RUNNING, "unpaused", "resumed", "unpaused")

    def reset(self, flags: int = 0) -> None:
        self._wait_for_moves()
        self.daemon.tell(HypervisorEvent(EventName.REBOOT, self.vm_id))

    def reboot(self, flags: int = 0) -> None:
        """By the guest, which may not listen."""
        self._wait_for_moves()
        self.daemon.press(self, reboots=True)

    def shutdownFlags(self, flags: int) -> None:
        self._wait_for_moves()
        if self.state is not DomainState.RUNNING:
            raise _invalid("domain is not running")
        if flags == libvirt.VIR_DOMAIN_SHUTDOWN_GUEST_AGENT:
            raise MemoryError_(LibvirtError.AGENT_UNRESPONSIVE, "QEMU guest agent is not connected")
        self.daemon.press(self)

    def setMetadata(self, kind: int, text: str, key: str, uri: str, flags: int) -> None:
        self._wait_for_moves()
        holder = self.root.find("metadata")
        if holder is None:
            holder = ET.SubElement(self.root, "metadata")
        for old in holder.findall(f"{{{NAMESPACE}}}domain"):
            holder.remove(old)
        element = ET.fromstring(text)  # noqa: S314 - the agent wrote it
        element.tag = f"{{{NAMESPACE}}}domain"
        holder.append(element)
        self.described = ""
        details = {"kind": kind, "namespace": uri}
        self.daemon.tell(HypervisorEvent(EventName.METADATA_CHANGED, self.vm_id, details))

    def migrateSetMaxDowntime(self, milliseconds: int, flags: int = 0) -> None:
        """Taken, and without effect."""

    def abortJob(self) -> None:
        if self.migrating is None:
            raise _invalid("no job is active on the domain")
        canceled = "operation aborted: job 'migration out' canceled by client"
        self.migrating.abort(MemoryError_(LibvirtError.OPERATION_ABORTED, canceled))

    def jobStats(self) -> dict[str, Any]:
        return {} if self.migrating is None else self.migrating.stats()


def in_kibibytes(xml: str) -> ET.Element:
    """A domain as libvirt keeps it: in whatever unit its memory was asked for, it's told in KiB."""
    root = ET.fromstring(xml)  # noqa: S314 - the agent wrote it
    for name in ("memory", "currentMemory", "maxMemory"):
        found = root.find(name)
        if found is not None and found.get("unit") == "b":
            found.set("unit", "KiB")
            found.text = str(int(found.text or "0") // 1024)
    return root


@dataclass(eq=False)
class Daemon:
    """`changed(domain, executes)` is told whenever a domain's vCPUs begin or cease to run."""

    host: str
    changed: Callable[[Domain, bool], None] = lambda domain, executes: None
    guest_of: Callable[[str], Guest] = lambda vm_id: Guest()
    moves: Callable[[Domain, Daemon, str], None] = lambda domain, target, phase: None
    """Told of each phase that the migration of a domain of its comes to."""
    up: bool = True
    """Whether libvirtd answers."""
    domains: dict[str, Domain] = field(default_factory=dict)
    listeners: list[Any] = field(default_factory=list)
    """Connected hypervisors: `hear(event)` and `lose()`."""
    came_up: asyncio.Event = field(default_factory=asyncio.Event)
    tasks: set[asyncio.Task[Any]] = field(default_factory=set)
    mounts: set[str] = field(default_factory=set)
    """Directories of the storage domains that were connected since this machine booted."""
    run_there: Callable[[Any], Any] | None = None
    """Starts a coroutine on this machine; None: in the caller's own context."""

    def __post_init__(self) -> None:
        self.came_up.set()

    def spawn(self, work: Any) -> None:
        task = self.run_there(work) if self.run_there is not None else asyncio.ensure_future(work)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    # libvirt's virConnect

    def isAlive(self) -> bool:
        return self.up

    def listAllDomains(self, flags: int = 0) -> list[Domain]:
        if flags == libvirt.VIR_CONNECT_LIST_DOMAINS_AUTOSTART:
            return []
        return list(self.domains.values())

    def listAllNetworks(self, flags: int = 0) -> list[Any]:
        return []

    def lookupByUUIDString(self, vm_id: str) -> Domain:
        found = self.domains.get(vm_id)
        if found is None:
            raise MemoryError_(LibvirtError.NO_DOMAIN, f"no domain with matching uuid '{vm_id}'")
        return found

    def createXML(self, xml: str, flags: int = 0) -> Domain:
        root = in_kibibytes(xml)
        vm_id = root.findtext("uuid", "")
        domain = Domain(self, vm_id, root)
        self._check_taken(domain)
        for path in domain.disks:
            if not any(path.startswith(f"{top}/") for top in self.mounts):
                missing = f"Path '{path}' is not accessible: No such file or directory"
                raise MemoryError_(libvirt.VIR_ERR_SYSTEM_ERROR, missing)
        self.domains[vm_id] = domain
        if flags & libvirt.VIR_DOMAIN_START_PAUSED:
            domain.state, domain.reason = DomainState.PAUSED, "user"
            self.tell(_life(vm_id, "started", "booted", DomainState.RUNNING))
            self.tell(_life(vm_id, "suspended", "paused", DomainState.PAUSED))
        else:
            self.changed(domain, True)
            self.tell(_life(vm_id, "resumed", "unpaused", DomainState.RUNNING))
            self.tell(_life(vm_id, "started", "booted", DomainState.RUNNING))
        return domain

    def _check_taken(self, new: Domain) -> None:
        if new.vm_id in self.domains:
            raise _invalid(f"domain '{new.name()}' is already active")
        for other in self.domains.values():
            if other.name() == new.name():
                taken = f"operation failed: domain '{new.name()}' already exists with uuid {other.vm_id}"
                raise MemoryError_(LibvirtError.OPERATION_FAILED, taken)

    # What happens to domains

    def become(self, domain: Domain, state: DomainState, reason: str, event: str, detail: str) -> None:
        executed = domain.state is DomainState.RUNNING
        domain.state, domain.reason = state, reason
        executes = state is DomainState.RUNNING
        if executes != executed:
            self.changed(domain, executes)
        self.tell(_life(domain.vm_id, event, detail, state))

    def end(self, domain: Domain, detail: str) -> None:
        """QEMU has ended. `detail` is libvirt's: destroyed, shutdown, failed, crashed, migrated."""
        if self.domains.get(domain.vm_id) is not domain:
            return
        del self.domains[domain.vm_id]
        if domain.state is DomainState.RUNNING:
            self.changed(domain, False)
        domain.state = GONE
        if domain.migrating is not None:
            ended = MemoryError_(LibvirtError.OPERATION_FAILED, "operation failed: domain is not running")
            domain.migrating.abort(ended)
        self.tell(_life(domain.vm_id, "stopped", detail, GONE))

    def crash(self, domain: Domain, *, panic: bool) -> None:
        """The guest panicked, or QEMU was killed."""
        if panic and self.domains.get(domain.vm_id) is domain:
            self.become(domain, DomainState.CRASHED, "panicked", "crashed", "panicked")
        self.end(domain, "crashed" if panic else "failed")

    def press(self, domain: Domain, *, reboots: bool = False) -> None:
        """The guest's power button. `reboots`: libvirt resets it instead of ending it."""
        seconds = self.guest_of(domain.vm_id).shutdown_seconds
        if seconds is None or domain.pressed or domain.state is not DomainState.RUNNING:
            return
        domain.pressed = True
        self.spawn(self.power_off(domain, seconds, reboots=reboots))

    async def power_off(self, domain: Domain, seconds: float, *, reboots: bool = False) -> None:
        """The guest powers off by itself."""
        await asyncio.sleep(seconds)
        if self.domains.get(domain.vm_id) is not domain or domain.state is not DomainState.RUNNING:
            return
        if reboots:
            domain.pressed = False
            self.tell(HypervisorEvent(EventName.REBOOT, domain.vm_id))
        else:
            self.become(domain, DomainState.SHUTTING_DOWN, "unknown", "shutdown", "guest")
            self.end(domain, "shutdown")

    def tell(self, event: HypervisorEvent) -> None:
        """Events reach whoever is connected; while libvirtd is away they are lost."""
        if self.up:
            for listener in tuple(self.listeners):
                listener.hear(event)

    def stop(self) -> None:
        """libvirtd dies; QEMUs go on, moves end."""
        self.up = False
        self.came_up.clear()
        listeners, self.listeners = self.listeners, []
        for listener in listeners:
            listener.lose()
        for domain in list(self.domains.values()):
            if domain.migrating is not None:
                domain.migrating.source_lost()
            if domain.state is DomainState.INCOMING:
                self.end(domain, "failed")

    def start(self) -> None:
        self.up = True
        self.came_up.set()

    def power_lost(self) -> None:
        """Everything ends at this instant, and nobody says so."""
        self.up = False
        self.came_up.clear()
        self.listeners.clear()
        self.mounts.clear()
        for domain in list(self.domains.values()):
            del self.domains[domain.vm_id]
            if domain.state is DomainState.RUNNING:
                self.changed(domain, False)
            domain.state = GONE


def _life(vm_id: str, event: str, reason: str, state: DomainState) -> HypervisorEvent:
    name = EventName.PANIC if state is DomainState.CRASHED else EventName.LIFECYCLE
    if (event, reason) == ("started", "migrated"):
        state = DomainState.INCOMING
    return HypervisorEvent(name, vm_id, {"event": event, "reason": reason}, state)
