"""What is measured, per noun: one table, from which sampling, aggregates and answers are made. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum

from volery.contracts.errors import Refused, invalid
from volery.contracts.history import Interval


class Measure(StrEnum):
    GAUGE = "gauge"
    """A value at a moment; a minute's value is the mean of its samples."""
    RATE = "rate"
    """From a counter: what it grew by per second of the host's clock."""


@dataclass(frozen=True, slots=True)
class Metric:
    name: str
    measure: Measure
    source: str
    """The field of the sample."""


def gauges(*names: str) -> tuple[Metric, ...]:
    return tuple(Metric(name, Measure.GAUGE, name) for name in names)


def rates(*counters: str) -> tuple[Metric, ...]:
    return tuple(Metric(f"{counter}_per_second", Measure.RATE, counter) for counter in counters)


@dataclass(frozen=True, slots=True)
class Sampled:
    """A noun that is sampled. Its tables are `{noun}_minute`, `{noun}_hour`, `{noun}_day`."""

    noun: str
    belongs_to: str
    """The column that says what it was part of at the time; "" for hosts."""
    metrics: tuple[Metric, ...]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(metric.name for metric in self.metrics)

    def columns(self, interval: Interval) -> tuple[str, ...]:
        """As they are answered and stored; the first is the time."""
        label = (self.belongs_to,) if self.belongs_to else ()
        if interval is Interval.MINUTE:
            return ("at", *label, *self.names)
        return ("at", *label, "minutes", *self.names, *(f"max_{name}" for name in self.names))


SAMPLED: dict[str, Sampled] = {
    s.noun: s
    for s in (
        Sampled(
            "host",
            "",
            (
                *gauges("cpu_percent", "memory_used_bytes", "memory_bytes", "swap_used_bytes", "load", "vm_count"),
                *rates("received_bytes", "sent_bytes"),
            ),
        ),
        Sampled("vm", "host_id", gauges("cpu_percent", "memory_used_bytes", "memory_bytes")),
        Sampled(
            "disk",
            "vm_id",
            (
                *rates("read_bytes", "written_bytes", "read_requests", "write_requests"),
                *gauges("allocated_bytes"),
            ),
        ),
        Sampled(
            "nic",
            "vm_id",
            rates("received_bytes", "sent_bytes", "received_packets", "sent_packets", "dropped_packets"),
        ),
    )
}  # fmt: skip

STEP: dict[Interval, timedelta] = {
    Interval.MINUTE: timedelta(minutes=1),
    Interval.HOUR: timedelta(hours=1),
    Interval.DAY: timedelta(days=1),
}


def begin_of(interval: Interval, at: datetime) -> datetime:
    """The minute, hour or (UTC) day that a moment is in."""
    at = at.replace(second=0, microsecond=0)
    if interval is Interval.MINUTE:
        return at
    at = at.replace(minute=0)
    return at if interval is Interval.HOUR else at.replace(hour=0)


@dataclass(frozen=True, slots=True)
class Partition:
    """A piece of a table, from a time to a time."""

    name: str
    begin: datetime
    end: datetime


def partition_of(table: str, interval: Interval, at: datetime) -> Partition:
    """Minute samples are kept by day, hourly aggregates by month: what ends together is dropped together."""
    day = begin_of(Interval.DAY, at)
    if interval is Interval.MINUTE:
        return Partition(f"{table}_{day:%Y%m%d}", day, day + timedelta(days=1))
    begin = day.replace(day=1)
    return Partition(f"{table}_{day:%Y%m}", begin, (begin + timedelta(days=32)).replace(day=1))


def partition_end(name: str) -> datetime | None:
    """When the last row of a partition may be from; None if the name isn't one of a partition."""
    stamp = name.rpartition("_")[2]
    if not stamp.isdigit() or len(stamp) not in (6, 8):
        return None
    begin = datetime.strptime(f"{stamp}+0000", "%Y%m%d%z" if len(stamp) == 8 else "%Y%m%z")
    return begin + timedelta(days=1) if len(stamp) == 8 else (begin + timedelta(days=32)).replace(day=1)


def sampled(noun: str) -> Sampled:
    """Raises Refused(invalid) for a noun that is not sampled."""
    found = SAMPLED.get(noun)
    if found is None:
        raise invalid(f"{noun!r} is not sampled; sampled are {', '.join(SAMPLED)}")
    return found


def check_limit(limit: int, most: int) -> None:
    if not 1 <= limit <= most:
        raise invalid(f"an answer has 1 to {most} rows, not {limit}")


def foreign_page() -> Refused:
    return invalid("the page token is not one that this list answered; start without `page`")
