"""History: versions of configuration, and samples with their hourly and daily aggregates."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum

import msgspec

from volery.contracts.base import Call, Message


class Interval(StrEnum):
    MINUTE = "minute"
    HOUR = "hour"
    DAY = "day"


class ListVersions(Message):
    """Configuration versions of one object, or of all objects of a noun at a time."""

    noun: str
    """data_center, cluster, host, vm, storage_domain, disk, network, …"""
    id: str = ""
    at: datetime | None = None
    """Only what was valid then."""
    limit: int = 100
    page: str = ""


class Version(Message):
    noun: str
    id: str
    revision: int
    valid_from: datetime
    valid_to: datetime | None
    """None: it is the current one."""
    deleted: bool
    doc: msgspec.Raw


class Versions(Message):
    items: tuple[Version, ...]
    next: str = ""


class QuerySamples(Message):
    noun: str
    """host, vm, disk, nic"""
    id: str
    interval: Interval = Interval.MINUTE
    since: datetime | None = None
    until: datetime | None = None
    limit: int = 1000


class Samples(Message):
    """Columns of equal length; `columns` names them, the first is the time."""

    noun: str
    id: str
    interval: Interval
    columns: tuple[str, ...]
    rows: tuple[tuple[float | int | str | None, ...], ...]


class Gap(Message):
    """A time in which facts were lost: what lies in it was listed again afterwards."""

    stream: str
    noticed_at: datetime


class AskGaps(Message):
    """Every gap still within the retention."""


class Gaps(Message):
    items: tuple[Gap, ...]


LIST_VERSIONS = Call("dwh.version.list", ListVersions, Versions)
QUERY_SAMPLES = Call("dwh.sample.query", QuerySamples, Samples)
LIST_GAPS = Call("dwh.gap.list", AskGaps, Gaps)
