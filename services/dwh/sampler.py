"""Samples of hosts gathered into one row per object and minute, by the receiver's clock.

Counters become rates over the host's own time between two samples; a counter that went back began anew.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

from services.dwh.model import SAMPLED, Measure, Sampled, begin_of
from volery.contracts.history import Interval
from volery.contracts.metrics import HostSample

LONGEST_SECONDS = 120.0
"""Between two samples further apart nothing is known of how a counter grew."""
FORGET_SECONDS = 600.0
FORGET_EVERY_SECONDS = 60.0
ROWS = 2000
"""Rows that are made at a time."""


@dataclass(slots=True)
class Gathered:
    """One object in one minute."""

    belongs_to: str
    count: int = 0
    sums: list[float] = field(default_factory=list)
    seconds: float = 0.0
    """For which the counters' growth is known."""

    def values(self, kind: Sampled) -> list[float | None]:
        found: list[float | None] = []
        for metric, total in zip(kind.metrics, self.sums, strict=True):
            if metric.measure is Measure.GAUGE:
                found.append(total / self.count)
            else:
                found.append(total / self.seconds if self.seconds else None)
        return found


@dataclass(frozen=True, slots=True)
class Last:
    """The newest counters of an object, by its host's clock; `since` tells one life of the counters from another."""

    counters: tuple[int, ...]
    at: datetime
    since: str


@dataclass(frozen=True, slots=True)
class Minute:
    """One row to write."""

    at: datetime
    id: str
    belongs_to: str
    values: list[float | None]


_COUNTERS = {
    noun: tuple(m.source for m in kind.metrics if m.measure is Measure.RATE) for noun, kind in SAMPLED.items()
}


@dataclass(slots=True)
class Sampler:
    minutes: dict[datetime, dict[tuple[str, str], Gathered]] = field(default_factory=dict)
    last: dict[tuple[str, str], Last] = field(default_factory=dict)
    forget_at: datetime | None = None
    """When objects that are gone are looked for again."""

    def hear(self, sample: HostSample, now: datetime) -> None:
        minute = self.minutes.setdefault(begin_of(Interval.MINUTE, now), {})
        self._take(minute, "host", sample.host_id, "", sample, sample, {"vm_count": len(sample.vms)})
        for vm in sample.vms:
            self._take(minute, "vm", vm.vm_id, sample.host_id, vm, sample, {})
            for disk in vm.disks:
                self._take(minute, "disk", disk.disk_id, vm.vm_id, disk, sample, {})
            for nic in vm.nics:
                self._take(minute, "nic", nic.nic_id, vm.vm_id, nic, sample, {})

    def _take(
        self,
        minute: dict[tuple[str, str], Gathered],
        noun: str,
        object_id: str,
        belongs_to: str,
        values: Any,
        sample: HostSample,
        extra: dict[str, float],
    ) -> None:
        key, kind = (noun, object_id), SAMPLED[noun]
        growth, seconds = self._growth(key, values, sample)
        gathered = minute.get(key)
        if gathered is None:
            gathered = minute[key] = Gathered(belongs_to, sums=[0.0] * len(kind.metrics))
        gathered.belongs_to = belongs_to
        gathered.count += 1
        gathered.seconds += seconds
        grown = iter(growth)
        for number, metric in enumerate(kind.metrics):
            if metric.measure is Measure.RATE:
                gathered.sums[number] += next(grown)
            else:
                found = extra.get(metric.source)
                gathered.sums[number] += found if found is not None else getattr(values, metric.source)

    def _growth(self, key: tuple[str, str], values: Any, sample: HostSample) -> tuple[tuple[int, ...], float]:
        """What each counter grew by, and over how many seconds; zeros when that can't be known."""
        names = _COUNTERS[key[0]]
        if not names:
            return (), 0.0
        counters = tuple(getattr(values, name) for name in names)
        since = f"{sample.host_id} {sample.boot_id}"
        before = self.last.get(key)
        self.last[key] = Last(counters, sample.at, since)
        nothing = (0,) * len(names)
        if before is None or before.since != since:
            return nothing, 0.0
        seconds = (sample.at - before.at).total_seconds()
        growth = tuple(new - old for new, old in zip(counters, before.counters, strict=True))
        if not 0 < seconds <= LONGEST_SECONDS or min(growth) < 0:
            return nothing, 0.0
        return growth, seconds

    def over(self, now: datetime) -> list[datetime]:
        """Minutes that have ended, oldest first."""
        current = begin_of(Interval.MINUTE, now)
        return sorted(minute for minute in self.minutes if minute < current)

    def rows(self, minute: datetime) -> Iterator[tuple[str, list[Minute]]]:
        """What was gathered in a minute, some of one noun at a time: all of a large fleet's would keep everybody waiting for a
        second."""
        of_noun: dict[str, list[tuple[str, Gathered]]] = {noun: [] for noun in SAMPLED}
        for (noun, object_id), gathered in self.minutes[minute].items():
            of_noun[noun].append((object_id, gathered))
        for noun, all_of_it in of_noun.items():
            for begin in range(0, len(all_of_it), ROWS):
                yield (
                    noun,
                    [
                        Minute(minute, object_id, gathered.belongs_to, gathered.values(SAMPLED[noun]))
                        for object_id, gathered in all_of_it[begin : begin + ROWS]
                    ],
                )

    def drop(self, minute: datetime) -> None:
        self.minutes.pop(minute, None)

    def keep_newest(self, count: int, now: datetime) -> Iterator[datetime]:
        """Forget all but the newest ended minutes, and counters of objects that are gone; yields what was lost."""
        for minute in self.over(now)[:-count] if count else self.over(now):
            self.drop(minute)
            yield minute
        if self.last and (self.forget_at is None or now >= self.forget_at):
            self.forget_at = now + timedelta(seconds=FORGET_EVERY_SECONDS)
            newest = max(last.at for last in self.last.values())
            stale = newest - timedelta(seconds=FORGET_SECONDS)
            self.last = {key: last for key, last in self.last.items() if last.at > stale}
