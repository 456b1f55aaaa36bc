"""Physical CPUs of the fleet's hosts in memory: what is taken of them, numbered, so that each way is looked at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from services.scheduler.policies.cpus import Cpus, Held, HostCpus, read_cores

Ints = NDArray[np.int64]


@dataclass(slots=True)
class CpuStates:
    """Cores and who has which of them: most hosts of a kind have given away the same."""

    states: list[HostCpus] = field(default_factory=list)
    """By number."""
    _numbers: dict[tuple[str, Cpus, Cpus], int] = field(default_factory=dict)
    _figures: dict[tuple[str, int], Ints] = field(default_factory=dict)

    def number(self, cores: str, held: Held) -> int:
        key = (cores, held.exclusive, held.pinned)
        number = self._numbers.setdefault(key, len(self.states))
        if number == len(self.states):
            self.states.append(HostCpus(read_cores(cores), held.exclusive, held.pinned))
        return number

    def figures(self, key: tuple[str, int], count: Callable[[HostCpus], int]) -> Ints:
        """One of each state, kept under this key. Only what is new is counted."""
        known = self._figures.get(key, np.zeros(0, np.int64))
        if len(known) < len(self.states):
            more = [count(state) for state in self.states[len(known) :]]
            known = self._figures[key] = np.concatenate([known, np.array(more, np.int64)])
        return known

    def copy(self) -> CpuStates:
        return CpuStates(list(self.states), dict(self._numbers), dict(self._figures))

    def clear(self) -> None:
        self.states.clear()
        self._numbers.clear()
        self._figures.clear()
