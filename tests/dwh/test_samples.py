"""Samples on a real bus and database: written once, aggregated to the digit, kept as long as they should be."""

from __future__ import annotations

import random
import time
from datetime import UTC, datetime, timedelta

import pytest

from services.dwh import store
from services.dwh.model import SAMPLED, STEP, begin_of
from services.dwh.sampler import Minute
from services.dwh.samples import aggregate_ended, retain_until, trim, write_ended
from services.dwh.state import Dwh
from tests.dwh.world import HOST, NOON, connected, dwh, publish, sample, until
from tests.support.runtime import running
from volery.contracts.errors import Kind, Refused
from volery.contracts.history import QUERY_SAMPLES, Interval, QuerySamples
from volery.runtime.config import DatabaseConfig
from volery.runtime.programs import Settings

MINUTE = timedelta(minutes=1)


def rows_of(at: datetime, value: float, count: int = 1) -> list[Minute]:
    width = len(SAMPLED["vm"].names)
    return [Minute(at, f"vm{n}", HOST, [value] * width) for n in range(count)]


async def write(made: Dwh, at: datetime, value: float, count: int = 1) -> None:
    await store.make_partitions(made.core.pool, [at], made.partitions)
    await store.write_minute(made.core.pool, "vm", rows_of(at, value, count))


async def test_what_hosts_publish_becomes_a_row_per_object_and_minute(configured: Settings) -> None:
    opened: list[Dwh] = []
    async with running(configured, dwh(opened)) as bus:
        made = opened[0]
        start = datetime.now(UTC)
        for number in range(3):
            await publish(
                bus, sample(start + timedelta(seconds=15 * number), received=1500 * number, cpu=40.0)
            )

        async def heard() -> bool:
            return sum(g.count for minute in made.sampler.minutes.values() for g in minute.values()) == 12

        await until(heard)
        later = start + 2 * MINUTE
        await write_ended(made, later)
        await write_ended(made, later)
        assert made.sampler.minutes == {}
        for noun, object_id, column, value in [
            ("host", HOST, "cpu_percent", 40),
            ("vm", "vm", "cpu_percent", 80),
            ("disk", "disk", "allocated_bytes", 1000),
            ("nic", "nic", "vm_id", "vm"),
        ]:
            answer = await bus.ask(QUERY_SAMPLES, QuerySamples(noun=noun, id=object_id))
            assert answer.columns[0] == "at"
            values = {row[answer.columns.index(column)] for row in answer.rows}
            assert values == {value}, noun
        # The clock may have passed into the next minute between two samples.
        assert 1 <= len(answer.rows) <= 2


async def test_hours_and_days_are_means_and_maxima_of_their_minutes(configured: Settings) -> None:
    opened: list[Dwh] = []
    chance = random.Random(7)
    async with running(configured, dwh(opened)) as bus:
        made, values = opened[0], {}
        day = begin_of(Interval.DAY, NOON)
        for hour in range(3):
            for minute in range(0, 60, hour + 1):
                at = day + timedelta(hours=hour, minutes=minute)
                values[at] = round(chance.uniform(0, 100), 2)
                await write(made, at, values[at])
        await aggregate_ended(made, day + timedelta(days=2))

        hours = await bus.ask(QUERY_SAMPLES, QuerySamples(noun="vm", id="vm0", interval=Interval.HOUR))
        assert len(hours.rows) == 3
        for number, row in enumerate(hours.rows):
            named = dict(zip(hours.columns, row, strict=True))
            mine = [v for at, v in values.items() if at.hour == number]
            assert named["at"] == f"2026-03-10T0{number}:00:00Z"
            assert named["minutes"] == len(mine)
            assert named["cpu_percent"] == pytest.approx(sum(mine) / len(mine), abs=0.001)
            assert named["max_cpu_percent"] == pytest.approx(max(mine))
            assert named["host_id"] == HOST
        days = await bus.ask(QUERY_SAMPLES, QuerySamples(noun="vm", id="vm0", interval=Interval.DAY))
        (row,) = days.rows
        named = dict(zip(days.columns, row, strict=True))
        assert named["minutes"] == len(values)
        assert named["cpu_percent"] == pytest.approx(sum(values.values()) / len(values), abs=0.001)
        assert named["max_cpu_percent"] == pytest.approx(max(values.values()))


async def test_late_and_repeated_samples_end_in_the_same_aggregates(
    configured: Settings, database: DatabaseConfig
) -> None:
    opened: list[Dwh] = []
    async with running(configured, dwh(opened)) as bus:
        made = opened[0]
        for minute in range(30):
            await write(made, NOON + minute * MINUTE, 10.0)
        end = NOON + timedelta(days=2)
        await aggregate_ended(made, end)
        for minute in range(60):
            await write(made, NOON + minute * MINUTE, 40.0)  # the first 30 are there already, and stay
        await aggregate_ended(made, end)
        await aggregate_ended(made, end)
        for interval in (Interval.HOUR, Interval.DAY):
            answer = await bus.ask(QUERY_SAMPLES, QuerySamples(noun="vm", id="vm0", interval=interval))
            (row,) = answer.rows
            named = dict(zip(answer.columns, row, strict=True))
            assert (named["minutes"], named["cpu_percent"], named["max_cpu_percent"]) == (60, 25, 40)
        async with connected(database) as connection:
            assert await connection.fetchval("select count(*) from dirty") == 0


async def test_an_hour_is_aggregated_once_it_is_over(configured: Settings) -> None:
    opened: list[Dwh] = []
    async with running(configured, dwh(opened)) as bus:
        await write(opened[0], NOON, 1.0)
        ask = QuerySamples(noun="vm", id="vm0", interval=Interval.HOUR)
        await aggregate_ended(opened[0], NOON + timedelta(minutes=59))
        assert (await bus.ask(QUERY_SAMPLES, ask)).rows == ()
        await aggregate_ended(opened[0], NOON + STEP[Interval.HOUR])
        assert len((await bus.ask(QUERY_SAMPLES, ask)).rows) == 1


async def test_retention_drops_exactly_what_is_older_and_makes_room_ahead(
    configured: Settings, database: DatabaseConfig
) -> None:
    opened: list[Dwh] = []
    async with running(configured, dwh(opened)) as bus:
        made = opened[0]
        for days in range(6):
            await write(made, NOON - timedelta(days=days), float(days))
        await retain_until(made, NOON)
        answer = await bus.ask(QUERY_SAMPLES, QuerySamples(noun="vm", id="vm0"))
        kept = [row[0][:10] for row in answer.rows if isinstance(row[0], str)]
        assert kept == ["2026-03-08", "2026-03-09", "2026-03-10"]
        days_kept = await bus.ask(QUERY_SAMPLES, QuerySamples(noun="vm", id="vm0", interval=Interval.DAY))
        assert len(days_kept.rows) == 5  # today is not over
        async with connected(database) as connection:
            names = {
                r["relname"]
                for r in await connection.fetch(
                    "select relname from pg_class where relname like 'vm_minute_2026%'"
                )
            }
            assert {"vm_minute_20260310", "vm_minute_20260311", "vm_minute_20260312"} <= names
            assert "vm_minute_20260307" not in names
        await retain_until(made, NOON + timedelta(days=100))
        hours = await bus.ask(QUERY_SAMPLES, QuerySamples(noun="vm", id="vm0", interval=Interval.HOUR))
        assert hours.rows == ()
        days_kept = await bus.ask(QUERY_SAMPLES, QuerySamples(noun="vm", id="vm0", interval=Interval.DAY))
        assert len(days_kept.rows) == 6


async def test_a_range_of_time_is_answered_in_order(configured: Settings) -> None:
    opened: list[Dwh] = []
    async with running(configured, dwh(opened)) as bus:
        for minute in range(10):
            await write(opened[0], NOON + minute * MINUTE, float(minute))
        newest = await bus.ask(QUERY_SAMPLES, QuerySamples(noun="vm", id="vm0", limit=3))
        cpu = newest.columns.index("cpu_percent")
        assert [row[cpu] for row in newest.rows] == [7, 8, 9]
        part = QuerySamples(noun="vm", id="vm0", since=NOON + 2 * MINUTE, until=NOON + 5 * MINUTE)
        assert [row[cpu] for row in (await bus.ask(QUERY_SAMPLES, part)).rows] == [2, 3, 4]
        nobody = await bus.ask(QUERY_SAMPLES, QuerySamples(noun="vm", id="nobody"))
        assert nobody.rows == ()
        for wrong in (QuerySamples(noun="cluster", id="x"), QuerySamples(noun="vm", id="x", limit=0)):
            with pytest.raises(Refused) as refused:
                await bus.ask(QUERY_SAMPLES, wrong)
            assert refused.value.kind is Kind.INVALID


async def test_a_minute_of_a_thousand_vms_is_written_well_within_it(configured: Settings) -> None:
    """oVirt's own measure is 1,000 VMs within 10 s; a second is asked here."""
    opened: list[Dwh] = []
    async with running(configured, dwh(opened)):
        await store.make_partitions(opened[0].core.pool, [NOON], opened[0].partitions)
        began = time.monotonic()
        await store.write_minute(opened[0].core.pool, "vm", rows_of(NOON, 1.0, 1000))
        assert time.monotonic() - began < 1.0


async def test_tables_have_the_columns_that_are_written(
    configured: Settings, database: DatabaseConfig
) -> None:
    async with running(configured, dwh()), connected(database) as connection:
        for noun, kind in SAMPLED.items():
            for interval in Interval:
                records = await connection.fetch(
                    "select column_name from information_schema.columns where table_name = $1 order by ordinal_position",
                    store.table(noun, interval),
                )
                found = [r["column_name"] for r in records]
                assert sorted(found) == sorted(["id", *kind.columns(interval)])


async def test_a_replica_that_does_not_lead_keeps_only_the_newest_minutes(configured: Settings) -> None:
    opened: list[Dwh] = []
    async with running(configured, dwh(opened), dwh(opened)):

        async def one_leads() -> list[Dwh]:
            leaders = [d for d in opened if d.core.operations.leading]
            return [d for d in opened if d not in leaders] if leaders else []

        (follower,) = await until(one_leads)
        for minute in range(10):
            follower.sampler.hear(sample(NOON), NOON + minute * MINUTE)
        trim(follower, NOON + 10 * MINUTE)
        assert len(follower.sampler.minutes) == 3
