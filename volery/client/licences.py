"""The licence report: which VM held which physical CPUs when."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime

from msgspec.structs import replace

from volery.client.request import Request
from volery.client.transport import Client
from volery.contracts.licence import AskLicenceReport, CpuUse, LicenceReport


def asked(since: datetime | None, until: datetime | None, vm_id: str, host_id: str) -> AskLicenceReport:
    """Times without an offset are UTC."""
    return AskLicenceReport(since=_utc(since), until=_utc(until), vm_id=vm_id, host_id=host_id)


def _utc(at: datetime | None) -> datetime | None:
    return at if at is None or at.tzinfo is not None else at.replace(tzinfo=UTC)


def report(ask: AskLicenceReport) -> Request[LicenceReport]:
    """One page."""
    given = {"vm_id": ask.vm_id, "host_id": ask.host_id, "page": ask.page}
    query = {name: value for name, value in given.items() if value}
    query |= {name: at.isoformat() for name in ("since", "until") if (at := getattr(ask, name)) is not None}
    return Request("GET", "licence-report", LicenceReport, query=query | {"limit": str(ask.limit)})


def all_of(client: Client, ask: AskLicenceReport) -> Iterator[CpuUse]:
    while True:
        page = client.send(report(ask))
        yield from page.items
        if not page.next:
            return
        ask = replace(ask, page=page.next)
