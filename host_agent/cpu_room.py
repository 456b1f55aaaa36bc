"""Which of a host's physical CPUs one guest has alone, and which the others share. In memory: living domains say it
themselves, in their metadata."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field

from host_agent.cell_pins import Cells


@dataclass(frozen=True, slots=True)
class CpuSeat:
    """One domain, and the CPUs that it may use now."""

    vm_id: str
    ours: bool
    pinned: bool
    exclusive: frozenset[int]
    allowed: frozenset[int]
    """Those of all that isn't `bound`. Empty: any."""
    bound: Mapping[int, frozenset[int]] = field(default_factory=dict)
    """vCPU → the host's cells that the memory of its node is bound to."""
    vcpus: Mapping[int, frozenset[int]] = field(default_factory=dict)
    """The CPUs that each of these may use; what isn't said is as `allowed`."""


@dataclass(slots=True)
class CpuRoom:
    every: frozenset[int] = frozenset()
    """The host's CPUs; empty: not known yet."""
    cells: Cells = field(default_factory=dict)
    held: dict[str, frozenset[int]] = field(default_factory=dict)
    """VM that lives here → CPUs that it has alone."""
    promised: dict[str, frozenset[int]] = field(default_factory=dict)
    """VM that is about to run here → CPUs that it will have alone."""
    beginning: set[asyncio.Future[None]] = field(default_factory=set)
    """Starts of guests that were told which CPUs are shared, and may not be seen among the domains yet."""
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def given(self) -> bool:
        return bool(self.held or self.promised)

    @property
    def shared(self) -> frozenset[int] | None:
        """For guests that have no CPUs of their own; None: all of them, which may be more than are known."""
        taken = frozenset[int]().union(*self.held.values(), *self.promised.values())
        return self.every - taken if taken else None

    def owner_of(self, cpus: frozenset[int], but: str) -> str:
        """A VM that has one of these CPUs alone, or is about to; "" for none."""
        both = [*self.held.items(), *self.promised.items()]
        return next((vm_id for vm_id, its in both if vm_id != but and its & cpus), "")
