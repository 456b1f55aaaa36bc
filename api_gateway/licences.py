"""The licence report as a table for a spreadsheet: all of its pages in one."""

from __future__ import annotations

import msgspec
from msgspec.structs import replace

from api_gateway.desk import Desk
from api_gateway.exchange import Exchange
from api_gateway.question import question
from api_gateway.route import Route
from volery.contracts.base import encode
from volery.contracts.licence import LICENCE_REPORT, AskLicenceReport, LicenceReport, as_csv
from volery.runtime.bus import Caller

QUERY = ("since", "until", "vm_id", "host_id")
ROUTE = Route(
    "GET", "/licence-report", LICENCE_REPORT, "Scheduling", "Get which VM held which physical CPUs when",
    query=(*QUERY, "limit", "page"),
    note="VMs whose `cpu_pinning` is another policy than none: each ran on `cpus` of its host and no others, within "
         "`since` and `until`. All others share what is left. `since=…&until=…` for what was held at any moment between "
         "them. Kept for five years (`VOLERY_SCHEDULER_LICENCE_DAYS`). `GET /licence-report.csv` is the same as a table.",
)  # fmt: skip
_AS_CSV = Route("GET", "/licence-report.csv", LICENCE_REPORT, ROUTE.tag, ROUTE.summary, query=QUERY)
CSV = (b"content-type", b"text/csv; charset=utf-8; header=present")
NAME = (b"content-disposition", b'attachment; filename="licence-report.csv"')


async def table(desk: Desk, http: Exchange) -> None:
    asked = await question(_AS_CSV, http, desk.config.body_limit_bytes)
    ask, parts = msgspec.json.decode(asked, type=AskLicenceReport), list[str]()
    while True:
        answer = await desk.ask(LICENCE_REPORT, encode(ask), Caller(http.who))
        report = msgspec.json.decode(answer, type=LicenceReport)
        parts.append(as_csv(report.items, header=not parts))
        if not report.next:
            break
        ask = replace(ask, page=report.next)
    await http.answer(200, "".join(parts).encode(), [CSV, NAME])
