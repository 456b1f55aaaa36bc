"""Samples: written a minute at a time, aggregated by the hour and the day, kept as long as the settings say."""

from __future__ import annotations

import logging
from datetime import UTC, datetime, timedelta

from services.dwh import store
from services.dwh.model import check_limit, sampled
from services.dwh.state import Dwh
from volery.contracts.history import QUERY_SAMPLES, Interval, QuerySamples, Samples
from volery.runtime.bus import Caller
from volery.runtime.clock import utc_now
from volery.runtime.service import Part

log = logging.getLogger(__name__)

part = Part()

WRITE_SECONDS = 5.0
AGGREGATE_SECONDS = 60.0
RETAIN_SECONDS = 3600.0
FOLLOWER_MINUTES = 3
"""What a replica that doesn't lead keeps for the case that it will."""
PARTITIONS_AHEAD_DAYS = 2
MOST_ROWS = 5000


@part.every(WRITE_SECONDS)
async def write(dwh: Dwh) -> None:
    await write_ended(dwh, utc_now())


async def write_ended(dwh: Dwh, now: datetime) -> None:
    """Write every minute that has ended. What can't be written now is kept for the next time."""
    try:
        for minute in dwh.sampler.over(now):
            await store.make_partitions(dwh.core.pool, [minute], dwh.partitions)
            for noun, rows in dwh.sampler.rows(minute):
                await store.write_minute(dwh.core.pool, noun, rows)
            dwh.sampler.drop(minute)
    except store.LOST as error:
        dwh.partitions.clear()
        log.warning("samples can't be written now: %s", error or type(error).__name__)
    trim(dwh, now)


def trim(dwh: Dwh, now: datetime) -> None:
    """Bound what is kept in memory."""
    most = dwh.config.unwritten_minutes if dwh.core.operations.leading else FOLLOWER_MINUTES
    for lost in dwh.sampler.keep_newest(most, now):
        if dwh.core.operations.leading:
            log.warning("the samples of %s were never written: PostgreSQL was away too long", lost)


@part.every(AGGREGATE_SECONDS)
async def aggregate(dwh: Dwh) -> None:
    await aggregate_ended(dwh, utc_now())


async def aggregate_ended(dwh: Dwh, now: datetime) -> None:
    """Hours, then days, whose samples changed since they were aggregated last."""
    for span in (Interval.HOUR, Interval.DAY):
        for noun, at in await store.dirty(dwh.core.pool, span, now):
            await store.make_partitions(dwh.core.pool, [at], dwh.partitions)
            await store.aggregate(dwh.core.pool, noun, span, at)


async def begin(dwh: Dwh) -> None:
    """Leadership begins: partitions may have been made or dropped by another replica."""
    dwh.partitions.clear()
    await store.make_partitions(
        dwh.core.pool, store.moments(utc_now(), PARTITIONS_AHEAD_DAYS), dwh.partitions
    )


@part.every(RETAIN_SECONDS)
async def retain(dwh: Dwh) -> None:
    await retain_until(dwh, utc_now())


async def retain_until(dwh: Dwh, now: datetime) -> None:
    """Make room ahead, drop what is older than it is kept for."""
    config, pool = dwh.config, dwh.core.pool
    dwh.partitions.clear()
    await store.make_partitions(pool, store.moments(now, PARTITIONS_AHEAD_DAYS), dwh.partitions)
    await aggregate_ended(dwh, now)
    keep = {
        Interval.MINUTE: timedelta(hours=config.minute_hours),
        Interval.HOUR: timedelta(days=config.hour_days),
    }
    for interval, kept in keep.items():
        dropped = await store.drop_partitions(pool, interval, now - kept)
        dwh.partitions -= set(dropped)
        if dropped:
            log.info("dropped %s", ", ".join(dropped))
    await store.forget_days(pool, config.day_days)
    await store.forget_versions(pool, config.version_days)
    await store.forget_gaps(pool, config.version_days)


@part.answers(QUERY_SAMPLES)
async def query(dwh: Dwh, ask: QuerySamples, caller: Caller) -> Samples:
    """Raises Refused(invalid) for a noun that isn't sampled. An object that never was sampled has no rows."""
    kind = sampled(ask.noun)
    check_limit(ask.limit, MOST_ROWS)
    records = await store.samples(dwh.core.pool, kind, ask.interval, ask.id, ask.since, ask.until, ask.limit)
    return Samples(
        noun=ask.noun,
        id=ask.id,
        interval=ask.interval,
        columns=kind.columns(ask.interval),
        rows=tuple(_plain(tuple(record)) for record in records),
    )


def _plain(values: tuple[object, ...]) -> tuple[float | int | str | None, ...]:
    """Times as ISO 8601 in UTC, whole numbers without a fraction."""
    return tuple(_value(value) for value in values)


def _value(value: object) -> float | int | str | None:
    if isinstance(value, datetime):
        return value.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    if isinstance(value, float):
        return int(value) if value.is_integer() else round(value, 3)
    assert value is None or isinstance(value, int | str)
    return value
