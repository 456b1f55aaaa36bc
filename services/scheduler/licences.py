"""The licence report, answered from what was written with each claim."""

from __future__ import annotations

from services.scheduler import licence_store
from services.scheduler.state import Scheduler
from volery.contracts.errors import invalid
from volery.contracts.licence import LICENCE_REPORT, AskLicenceReport, LicenceReport
from volery.runtime import checks
from volery.runtime.bus import Caller
from volery.runtime.service import Part

part = Part()

MOST = 1000


@part.answers(LICENCE_REPORT)
async def licence_report(scheduler: Scheduler, ask: AskLicenceReport, caller: Caller) -> LicenceReport:
    checks.between(ask.limit, 1, MOST, "limit")
    for at in (ask.since, ask.until):
        if at is not None and at.tzinfo is None:
            raise invalid("since and until are times with an offset, like 2026-11-30T00:00:00Z")
    if ask.since is not None and ask.until is not None and ask.since > ask.until:
        raise invalid(f"the report ends before it begins: since {ask.since}, until {ask.until}")
    return await licence_store.report(scheduler.core.pool, ask)
