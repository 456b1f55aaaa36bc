"""Turns: how many VMs are brought back at a time on one host and from one storage domain, the most important first.

A host that starts a hundred guests at once, or a storage that opens all their disks, serves none of them. In memory of the
process that leads: whoever takes over counts anew what it goes on with.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import count
from typing import NamedTuple

from services.inventory.config import InventoryConfig


class Spot(NamedTuple):
    """A host, a storage domain, or the scheduler."""

    kind: str
    id: str


def limits(config: InventoryConfig) -> Mapping[str, int]:
    return {
        "scheduler": config.restarts_placed_at_once,
        "host": config.restarts_at_once_on_host,
        "storage_domain": config.restarts_at_once_from_storage_domain,
    }


def admitted(
    waiting: Sequence[Sequence[Spot]], held: Mapping[Spot, int], most: Mapping[str, int]
) -> list[int]:
    """Which of those that wait have their turn now, by their places; the first goes first. Who has to wait for one place
    keeps nobody from another."""
    taken, found = Counter(held), []
    for number, places in enumerate(waiting):
        if all(taken[place] < most[place.kind] for place in places):
            taken.update(places)
            found.append(number)
    return found


@dataclass(slots=True)
class Turns:
    held: Counter[Spot] = field(default_factory=Counter)
    _waiting: list[tuple[int, int, tuple[Spot, ...], asyncio.Event]] = field(default_factory=list)
    _numbers: Iterable[int] = field(default_factory=count)

    @asynccontextmanager
    async def turn(
        self, places: Iterable[Spot], priority: int, config: InventoryConfig
    ) -> AsyncIterator[None]:
        """Holds a place everywhere once there is one everywhere."""
        wanted = tuple(sorted(set(places)))
        entry = (-priority, next(iter(self._numbers)), wanted, asyncio.Event())
        self._waiting.append(entry)
        self._waiting.sort(key=lambda e: e[:2])
        most = limits(config)
        try:
            self._admit(most)
            await entry[3].wait()
            yield
        finally:
            if entry in self._waiting:
                self._waiting.remove(entry)
            else:
                self.held.subtract(wanted)
                self.held += Counter()  # without zeros
            self._admit(most)

    def _admit(self, most: Mapping[str, int]) -> None:
        now = admitted([places for _, _, places, _ in self._waiting], self.held, most)
        for entry in [self._waiting[number] for number in now]:
            self._waiting.remove(entry)
            self.held.update(entry[2])
            entry[3].set()
