"""What must never happen and what must be in the end, read off hypervisors, storage and BMCs alone.

Of each VM it knows what people asked for (its wish), never what the services believe.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

from sim.machines import HostMachine
from sim.qemu import Domain

if TYPE_CHECKING:
    from sim.world import World

HEALTHY_SECONDS = 60.0
"""So long after the last trouble a host counts as healthy again: then nobody may switch it off."""


BRAKE_SECONDS = 560.0
"""The brake's ten minutes, less what may pass between its booking and the BMC's hearing of it."""


class Wish(StrEnum):
    UP = "up"
    DOWN = "down"
    ANY = "any"
    """It may run or not: a request about it is under way, or its end has no automatic answer."""


@dataclass(eq=False)
class Oracle:
    world: World
    running: dict[str, dict[str, Domain]] = field(default_factory=dict)
    """VM → host → its domain whose vCPUs run there now."""
    wishes: dict[str, Wish] = field(default_factory=dict)
    pending: dict[str, int] = field(default_factory=dict)
    """VM → requests about it that are under way: meanwhile it may run or not."""
    stopped: dict[str, None] = field(default_factory=dict)
    """VMs that people have stopped and not asked for since: no domain of theirs may begin to run."""
    known: dict[Domain, None] = field(default_factory=dict)
    """Domains that have begun to run."""
    ending: dict[str, None] = field(default_factory=dict)
    """VMs whose guest is powering off, and that no other domain has begun to run since."""
    highly_available: set[str] = field(default_factory=set)
    violations: list[str] = field(default_factory=list)
    begun: dict[str, float] = field(default_factory=dict)
    """VM → when its vCPUs last began to run, by the loop's clock."""
    offs: list[tuple[float, str]] = field(default_factory=list)
    """When which host was switched off, of late."""

    harmless: bool = False
    """Nothing that goes wrong is a reason to switch a host off, or to believe that it is dead."""
    pauses: int = 0
    """How often a host stood still for a moment."""

    # Always

    def vcpus(self, host: HostMachine, domain: Domain, runs: bool) -> None:
        """A domain's vCPUs began or ceased to run, at this virtual instant."""
        places = self.running.setdefault(domain.vm_id, {})
        if runs and host.frozen:
            return
        self.world.trace(f"{host.name} {domain.name()} {domain.epoch} {runs}")
        if not runs:
            if places.pop(host.name, None) is not None:
                for path in domain.disks:
                    self.world.shelf.closed(path, host.name)
            return
        places[host.name] = domain
        if domain not in self.known:
            self.known[domain] = None
            self.ending.pop(domain.vm_id, None)
            if domain.vm_id in self.stopped:
                self.broken(f"VM {domain.name()} was stopped, and {host.name} starts it again")
        self.begun[domain.vm_id] = self.world.loop.time()
        if len(places) > 1:
            told = " and ".join(f"{name} (epoch {d.epoch})" for name, d in places.items())
            self.broken(f"VM {domain.name()} runs on {told} at once")
        for path in domain.disks:
            self.world.shelf.opened(path, host.name, domain.name())

    def two_writers(self, path: str, writers: dict[str, str]) -> None:
        self.broken(f"volume {path} is written by {writers}")

    def believed_dead(self, host_name: str, why: str) -> None:
        if self.harmless:
            self.broken(f"{host_name} is believed dead: {why}")

    def switched_off(self, host: HostMachine, by: str) -> None:
        """A BMC was told to cut a host's power."""
        if self.harmless:
            self.broken(f"{by} switched {host.name} off, which only stood still for a moment")
        quiet = self.world.quiet_seconds(host)
        if host.on and quiet is not None and quiet > HEALTHY_SECONDS:
            self.broken(f"{by} switched {host.name} off, which was healthy for {quiet:.0f} s")
        self._brake(host)

    def _brake(self, host: HostMachine) -> None:
        """Few hosts at a time, whatever leaders and clocks do; a restored database has forgotten its window."""
        now = self.world.time.elapsed
        self.offs = [(at, name) for at, name in self.offs if now - at < BRAKE_SECONDS]
        self.offs.append((now, host.name))
        hosts = {name for _, name in self.offs}
        if len(hosts) > max(1, len(self.world.hosts) // 10) and not self.world.restores:
            self.broken(f"{', '.join(sorted(hosts))} were switched off within {BRAKE_SECONDS:.0f} s")

    def broken(self, what: str) -> None:
        self.violations.append(f"{self.world.time.elapsed:.3f} s: {what}")
        self.world.note(f"VIOLATION: {what}")

    # What people want

    def is_up(self, vm_id: str) -> bool:
        """Whether it runs, and its guest has not been told to power off."""
        return bool(self.running.get(vm_id)) and vm_id not in self.ending

    def want(self, vm_id: str, wish: Wish) -> None:
        self.wishes[vm_id] = wish

    def asked(self, vm_id: str, change: int) -> None:
        """A request about a VM begins (1) or ends (-1)."""
        self.pending[vm_id] = self.pending.get(vm_id, 0) + change
        self.stopped.pop(vm_id, None)

    def has_stopped(self, vm_id: str) -> None:
        """People were told so."""
        self.want(vm_id, Wish.DOWN)
        if not self.pending.get(vm_id):
            self.stopped[vm_id] = None

    def ended_by_itself(self, vm_id: str, *, asked: bool) -> None:
        """Its guest powered off (`asked`), or it crashed, or its host died."""
        if asked:
            self.ending[vm_id] = None
        stays_down = asked or vm_id not in self.highly_available
        if stays_down and self.wishes.get(vm_id) is Wish.UP:
            self.wishes[vm_id] = Wish.ANY

    # In the end

    def unmet(self) -> list[str]:
        """What isn't as it should be now that nothing is broken any more."""
        found = []
        domains: dict[str, list[str]] = {}
        for host in self.world.hosts.values():
            for vm_id, domain in host.daemon.domains.items():
                domains.setdefault(vm_id, []).append(f"{host.name}:{domain.state.value}:{domain.epoch}")
        for name, vm_id in self.world.vms.items():
            places, wish = domains.get(vm_id, []), self.wishes[vm_id]
            if len(places) > 1:
                found.append(f"{name} has domains on {places}")
            runs = bool(self.running.get(vm_id))
            if wish is Wish.UP and not runs:
                found.append(f"{name} should run and doesn't ({places or 'no domain'})")
            if wish is Wish.DOWN and places:
                found.append(f"{name} should be down and is on {places}")
            if wish is Wish.ANY and places and not runs:
                found.append(f"{name} stands still on {places}")
        for vm_id in sorted(domains.keys() - set(self.world.vms.values())):
            found.append(f"a domain of nobody's VM {vm_id} is on {domains[vm_id]}")
        return found
