"""The licence report as a table: every page of it."""

from __future__ import annotations

import csv
import io

from tests.api_gateway.scripted import Deployed
from tests.cli.test_cpu_commands import paged
from volery.contracts.licence import LICENCE_REPORT


async def test_the_table_has_every_page_and_asks_what_was_asked(gateway: Deployed) -> None:
    gateway.script.on(LICENCE_REPORT, paged)
    answer = await gateway.http.get(
        "/licence-report.csv", params={"vm_id": "v1", "until": "2026-11-30T00:00:00Z"}
    )
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/csv")
    rows = list(csv.DictReader(io.StringIO(answer.text)))
    assert [row["id"] for row in rows] == ["c1", "c2", "c3"]
    asked = gateway.script.questions(LICENCE_REPORT)
    assert [(ask.vm_id, ask.page) for ask in asked] == [("v1", ""), ("v1", "c2")]
    assert all(ask.until is not None for ask in asked)

    page = await gateway.http.get("/licence-report", params={"limit": "2"})
    assert [use["id"] for use in page.json()["items"]] == ["c1", "c2"]
    assert page.json()["next"] == "c2"


async def test_what_the_report_does_not_know_is_refused(gateway: Deployed) -> None:
    gateway.script.on(LICENCE_REPORT, paged)
    for query in ({"limit": "2"}, {"since": "yesterday"}, {"cpu": "1"}):
        answer = await gateway.http.get("/licence-report.csv", params=query)
        assert answer.status_code == 400, query
