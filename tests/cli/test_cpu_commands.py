"""`--cpu-pinning`, and `volery licence-report`: what they ask, and the tables that come of it."""

from __future__ import annotations

import csv
import io
from datetime import UTC, datetime

import pytest
import typer

from tests.cli.test_placing_commands import HOST, WEB, Desk, desk
from volery.cli.cpus import pinning
from volery.contracts.cpus import CpuPinning, PinningPolicy
from volery.contracts.licence import LICENCE_REPORT, AskLicenceReport, CpuUse, LicenceReport
from volery.contracts.vm import UPDATE_VM

__all__ = ["desk"]

SINCE = datetime(2026, 11, 1, 12, tzinfo=UTC)
USES = tuple(
    CpuUse(
        id=f"c{n}", vm_id=WEB.id, vm_name="web1", epoch=n, host_id=HOST.id, host_name="h1", policy="dedicated",
        cpus=(0, 1), exclusive=(0, 1), cores=1, sockets=1, since=SINCE, until=SINCE if n == 1 else None,
    )
    for n in (1, 2, 3)
)  # fmt: skip


def paged(ask: AskLicenceReport, caller: object) -> LicenceReport:
    """Two a page."""
    left = [use for use in USES if use.id > ask.page]
    return LicenceReport(items=tuple(left[:2]), next=left[1].id if len(left) > 2 else "")


async def test_the_report_is_shown_whole_whatever_its_pages(desk: Desk) -> None:
    desk.script.on(LICENCE_REPORT, paged)
    shown = await desk.types("licence-report --vm web1 --host h1 --since 2026-11-01T00:00:00")
    assert shown.exit_code == 0, shown.output
    asked = desk.script.questions(LICENCE_REPORT)
    assert [ask.page for ask in asked] == ["", "c2"]
    assert all((ask.vm_id, ask.host_id) == (WEB.id, HOST.id) for ask in asked)
    assert asked[0].since == datetime(2026, 11, 1, tzinfo=UTC)
    assert shown.output.count("dedicated") == 3
    assert "0 1" in shown.output

    table = await desk.types("licence-report --csv")
    rows = list(csv.DictReader(io.StringIO(table.output)))
    assert [row["id"] for row in rows] == ["c1", "c2", "c3"]
    assert (rows[0]["cpus"], rows[0]["until"][:10], rows[1]["until"]) == ("0 1", "2026-11-01", "")


async def test_a_pinning_is_written_as_ovirt_writes_it(desk: Desk) -> None:
    desk.script.on(UPDATE_VM, WEB)
    shown = await desk.types("vm edit web1 --cpu-pins 0#2_1#3-5,^4")
    assert shown.exit_code == 0, shown.output
    wanted = CpuPinning(policy=PinningPolicy.MANUAL, pins=((2,), (3, 5)))
    assert desk.script.questions(UPDATE_VM)[-1].cpu_pinning == wanted
    await desk.types("vm edit web1 --cpu-pinning none")
    assert desk.script.questions(UPDATE_VM)[-1].cpu_pinning == CpuPinning()
    await desk.types("vm edit web1 --cpu-pinning resize_and_pin")
    assert desk.script.questions(UPDATE_VM)[-1].cpu_pinning.policy is PinningPolicy.RESIZE_AND_PIN


@pytest.mark.parametrize("text", ["0", "0#x", "1#2", "0#1_2#3", "#"])
def test_a_pinning_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(typer.BadParameter):
        pinning(None, text)
    with pytest.raises(typer.BadParameter):
        pinning(PinningPolicy.DEDICATED, "0#1")
