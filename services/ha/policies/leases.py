"""How long a silent host's storage lease has not been renewed, by what other hosts read. Pure: what is read carries the
reader's monotonic clock; `asked_at` and `last_sign` are ha's."""

from __future__ import annotations

from dataclasses import dataclass

from volery.contracts.leases import (
    MARGIN_SECONDS,
    ExpiredLease,
    HostLeaseReading,
    dead_seconds,
    proven,
    unchanged_seconds,
)
from volery.contracts.storage import HostLeaseSeen


@dataclass(frozen=True, slots=True)
class Watched:
    """A lease since it was first read after the last sign of life."""

    reader_id: str
    reader_boot_id: str
    boot_id: str
    """That holds the lease."""
    first: HostLeaseReading
    asked_at: float
    """Before it was first read."""


@dataclass(frozen=True, slots=True)
class Finding:
    watched: Watched | None
    """To compare the next reading with."""
    proves: ExpiredLease = ExpiredLease.NOTHING


def observe(before: Watched | None, seen: HostLeaseSeen, asked_at: float, last_sign: float) -> Finding:
    """What one more reading comes to. One that failed proves nothing and interrupts nothing.

    Counting begins anew when the lease was renewed or taken, when another reader or another boot of it read, and after a
    sign of life: a host that lives though its lease was not renewed has a watchdog that doesn't fire.
    """
    readings = seen.readings
    if readings is None:
        return Finding(before)
    if before is None or not _continues(before, seen, readings.reader_boot_id, last_sign):
        return Finding(_begun(seen, readings.reader_boot_id, readings.second, asked_at))
    if _token(before.first) != _token(readings.second):
        return Finding(_begun(seen, readings.reader_boot_id, readings.second, asked_at))
    unchanged = unchanged_seconds(before.first, readings.second)
    return Finding(before, proven(readings.second, unchanged, seen.joined, seen.watchdog))


def _continues(before: Watched, seen: HostLeaseSeen, reader_boot_id: str, last_sign: float) -> bool:
    return (
        before.asked_at > last_sign
        and (before.reader_id, before.reader_boot_id) == (seen.reader_id, reader_boot_id)
        and before.boot_id == seen.boot_id
    )


def _begun(seen: HostLeaseSeen, reader_boot_id: str, reading: HostLeaseReading, asked_at: float) -> Watched:
    return Watched(seen.reader_id, reader_boot_id, seen.boot_id, reading, asked_at)


def _token(reading: HostLeaseReading) -> tuple[str, int, int]:
    return reading.holder, reading.generation, reading.timestamp


def next_look(watched: list[Watched], now: float, read_seconds: float, least_seconds: float) -> float:
    """When to read again: every now and then, and as soon as an unchanged lease would prove something."""
    ripe = [w.asked_at + dead_seconds(w.first.io_timeout_seconds) + MARGIN_SECONDS for w in watched]
    soonest = min([now + read_seconds, *(at + least_seconds for at in ripe if at > now)])
    return max(now + least_seconds, soonest)
