"""The licence report: which VM held which physical CPUs when."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable
from datetime import datetime

import msgspec

from volery.contracts.base import Call, Message


class CpuUse(Message):
    """Physical CPUs of one host that a pinned VM held. It ran there within this time, and on no other CPU."""

    id: str
    """Of the claim."""
    vm_id: str
    vm_name: str
    """As it was called when it was placed; likewise the host."""
    epoch: int
    host_id: str
    host_name: str
    policy: str
    """manual, dedicated, isolate_threads, resize_and_pin"""
    cpus: tuple[int, ...]
    """On which it ran, as Linux numbers them."""
    exclusive: tuple[int, ...]
    """CPUs that no other VM could use meanwhile."""
    cores: int
    """How many physical cores these CPUs are of, those that were left idle for its sake included."""
    sockets: int
    since: datetime
    until: datetime | None = None
    """None: it holds them still."""


class AskLicenceReport(Message):
    """What was held at any moment between `since` and `until`, by the time it began."""

    since: datetime | None = None
    until: datetime | None = None
    vm_id: str = ""
    host_id: str = ""
    limit: int = 1000
    page: str = ""


class LicenceReport(Message):
    items: tuple[CpuUse, ...]
    next: str = ""


COLUMNS = tuple(field.name for field in msgspec.structs.fields(CpuUse))
_FORMULA = ("=", "+", "-", "@")


def as_csv(uses: Iterable[CpuUse], *, header: bool = True) -> str:
    """A table for a spreadsheet: CPUs with spaces between them, times as ISO 8601."""
    text = io.StringIO()
    table = csv.writer(text)
    if header:
        table.writerow(COLUMNS)
    table.writerows([_cell(getattr(use, name)) for name in COLUMNS] for use in uses)
    return text.getvalue()


def _cell(value: object) -> str:
    """A name that a spreadsheet would compute is made a text."""
    if isinstance(value, tuple):
        return " ".join(map(str, value))
    text = "" if value is None else str(msgspec.to_builtins(value))
    return f"'{text}" if isinstance(value, str) and text.startswith(_FORMULA) else text


LICENCE_REPORT = Call("scheduler.licence.report", AskLicenceReport, LicenceReport)
