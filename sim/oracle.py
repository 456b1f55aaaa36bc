"""What must never happen, read off hypervisors, storage and BMCs alone, never off the services' tables."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from sim.machines import HostMachine
from sim.qemu import Domain

if TYPE_CHECKING:
    from sim.world import World


class Violation(Exception):
    """A law was broken: the episode ends here."""


@dataclass(eq=False)
class Oracle:
    world: World
    running: dict[str, dict[str, Domain]] = field(default_factory=dict)
    """VM → host → its domain whose vCPUs run there now."""
    violations: list[str] = field(default_factory=list)

    def vcpus(self, host: HostMachine, domain: Domain, runs: bool) -> None:
        """A domain's vCPUs began or ceased to run, at this virtual instant."""
        places = self.running.setdefault(domain.vm_id, {})
        if not runs:
            places.pop(host.name, None)
            for path in domain.disks:
                self.world.shelf.closed(path, host.name)
            return
        if host.frozen:
            return
        places[host.name] = domain
        if len(places) > 1:
            told = ", ".join(f"{name} (epoch {d.epoch})" for name, d in places.items())
            self.broken(f"VM {domain.name()} runs on {told} at once")
        for path in domain.disks:
            self.world.shelf.opened(path, host.name, domain.name())

    def two_writers(self, path: str, writers: dict[str, str]) -> None:
        self.broken(f"volume {path} is written by {writers}")

    def broken(self, what: str) -> None:
        self.violations.append(f"{self.world.time.elapsed:.3f} s: {what}")
