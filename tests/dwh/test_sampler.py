"""Samples into minutes: means of gauges, rates of counters, and counters that begin anew."""

from __future__ import annotations

from datetime import timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.dwh.model import SAMPLED, Measure, partition_end, partition_of
from services.dwh.sampler import ROWS, Sampler
from tests.dwh.world import HOST, NOON, sample
from volery.contracts.history import Interval
from volery.contracts.metrics import DiskSample, HostSample, NicSample, VmSample

STEP = timedelta(seconds=15)


def value(sampler: Sampler, noun: str, metric: str) -> float | None:
    (row,) = dict(sampler.rows(NOON))[noun]
    return row.values[SAMPLED[noun].names.index(metric)]


def test_a_minute_is_the_mean_of_its_samples_and_the_growth_of_its_counters() -> None:
    sampler = Sampler()
    for number in range(4):
        made = sample(NOON + number * STEP, cpu=10.0 * number, received=150 * number, read=30 * number)
        sampler.hear(made, NOON + number * STEP)
    assert value(sampler, "host", "cpu_percent") == 15.0
    assert value(sampler, "vm", "cpu_percent") == 30.0
    assert value(sampler, "host", "vm_count") == 1
    assert value(sampler, "host", "received_bytes_per_second") == 10.0
    assert value(sampler, "nic", "received_bytes_per_second") == 10.0
    assert value(sampler, "disk", "read_bytes_per_second") == 2.0
    assert value(sampler, "disk", "allocated_bytes") == 1000
    assert dict(sampler.rows(NOON))["nic"][0].belongs_to == "vm"
    assert dict(sampler.rows(NOON))["vm"][0].belongs_to == HOST


@pytest.mark.parametrize(
    "second",
    [
        sample(NOON + STEP, received=50),  # the domain was started again
        sample(NOON + STEP, received=500, boot_id="c"),  # so was the host
        sample(NOON + STEP, received=500, host_id="other"),  # it moved
        sample(NOON - STEP, received=500),  # the host's clock was set back
        sample(NOON + timedelta(minutes=10), received=500),  # too long ago
    ],
)
def test_a_counter_that_can_not_have_grown_so_gives_no_rate(second: HostSample) -> None:
    sampler = Sampler()
    sampler.hear(sample(NOON, received=100), NOON)
    sampler.hear(second, NOON + STEP)
    assert value(sampler, "nic", "received_bytes_per_second") is None
    assert value(sampler, "vm", "memory_used_bytes") == 100


@given(st.lists(st.integers(0, 1000), min_size=2, max_size=8))
def test_rates_add_up_to_what_the_counter_grew(growth: list[int]) -> None:
    sampler, total = Sampler(), 0
    for number, grown in enumerate(growth):
        total += grown
        sampler.hear(sample(NOON + number * timedelta(seconds=5), received=total), NOON)
    rate = value(sampler, "nic", "received_bytes_per_second")
    assert rate is not None
    assert rate * 5 * (len(growth) - 1) == pytest.approx(total - growth[0])


def test_the_receivers_clock_says_which_minute_it_is() -> None:
    sampler = Sampler()
    sampler.hear(sample(NOON + timedelta(days=400)), NOON)
    assert sampler.over(NOON + timedelta(minutes=1)) == [NOON]


def test_memory_is_bounded() -> None:
    sampler = Sampler()
    for number in range(10):
        sampler.hear(sample(NOON + timedelta(minutes=number)), NOON + timedelta(minutes=number))
    lost = list(sampler.keep_newest(3, NOON + timedelta(minutes=10)))
    assert len(lost) == 7
    assert len(sampler.minutes) == 3
    gone = NOON + timedelta(minutes=30)
    other = HostSample(
        host_id="o",
        boot_id="b",
        at=gone,
        vms=(VmSample(vm_id="v", disks=(DiskSample(disk_id="d"),), nics=(NicSample(nic_id="n"),)),),
    )
    sampler.hear(other, gone)
    list(sampler.keep_newest(3, gone))
    assert {key[1] for key in sampler.last} == {"o", "d", "n"}


def test_a_minute_of_many_is_given_in_parts_while_others_have_their_turn() -> None:
    """Also what is heard of that minute meanwhile, by a clock that went back, does no harm."""
    sampler = Sampler()
    ids = {f"vm{number}" for number in range(2 * ROWS + 1)}
    sampler.hear(
        HostSample(host_id="h", boot_id="b", at=NOON, vms=tuple(VmSample(vm_id=i) for i in ids)), NOON
    )
    parts = []
    for noun, rows in sampler.rows(NOON):
        parts.append((noun, [row.id for row in rows]))
        sampler.hear(HostSample(host_id=f"late{len(parts)}", boot_id="b", at=NOON), NOON)
    assert max(len(part) for _, part in parts) <= ROWS
    assert {i for noun, part in parts for i in part if noun == "vm"} == ids
    assert sum(len(part) for noun, part in parts if noun == "vm") == len(ids)


def test_partitions_have_names_that_say_their_end() -> None:
    day = partition_of("vm_minute", Interval.MINUTE, NOON)
    assert (day.name, day.begin.day, day.end.day) == ("vm_minute_20260310", 10, 11)
    assert partition_end(day.name) == day.end
    month = partition_of("vm_hour", Interval.HOUR, NOON.replace(month=12))
    assert (month.name, month.end.year, month.end.month) == ("vm_hour_202612", 2027, 1)
    assert partition_end(month.name) == month.end
    assert partition_end("vm_hour") is None


def test_every_metric_names_a_field_of_its_sample() -> None:
    types = {"host": HostSample, "vm": VmSample, "disk": DiskSample, "nic": NicSample}
    for noun, kind in SAMPLED.items():
        for metric in kind.metrics:
            assert metric.source in types[noun].__struct_fields__ or metric.source == "vm_count"
            if metric.measure is Measure.RATE:
                assert metric.name == f"{metric.source}_per_second"
