"""Physical CPUs: how a VM's pinning is written, and `volery licence-report`."""

from __future__ import annotations

import sys
from datetime import datetime
from typing import Annotated, Any

import msgspec
import typer

from volery.cli import output, work
from volery.cli.output import Format
from volery.cli.work import Output
from volery.client import api, licences
from volery.contracts.cpus import CpuPinning, PinningPolicy
from volery.contracts.licence import CpuUse, as_csv

PolicyOption = Annotated[
    PinningPolicy | None,
    typer.Option(help="Which physical CPUs it runs on; manual needs --cpu-pins. While it is down."),
]
PinsOption = Annotated[
    str, typer.Option(help="The CPUs of each vCPU, as oVirt writes them: 0#2_1#3-4 or 0#2_1#3-5,^4.")
]
COLUMNS = ("since", "until", "vm_name", "host_name", "policy", "cpus", "exclusive", "cores", "sockets")
Moment = Annotated[datetime | None, typer.Option(help="In UTC, like 2026-11-30T00:00:00.")]


def pinning(policy: PinningPolicy | None, pins: str) -> CpuPinning:
    if pins and policy not in (None, PinningPolicy.MANUAL):
        raise typer.BadParameter(f"--cpu-pins is for manual pinning; {policy} chooses CPUs itself")
    if not pins:
        return CpuPinning(policy=policy or PinningPolicy.NONE)
    found: dict[int, tuple[int, ...]] = {}
    try:
        for part in pins.split("_"):
            vcpu, _, cpus = part.partition("#")
            found[int(vcpu)] = _cpus(cpus)
    except ValueError:
        raise typer.BadParameter(f"{pins!r} is not a pinning like 0#2_1#3-4") from None
    if sorted(found) != list(range(len(found))):
        raise typer.BadParameter(f"{pins!r} leaves a vCPU out: name each from 0 on")
    return CpuPinning(policy=PinningPolicy.MANUAL, pins=tuple(found[vcpu] for vcpu in sorted(found)))


def _cpus(text: str) -> tuple[int, ...]:
    found: set[int] = set()
    for part in text.split(","):
        first, _, last = part.removeprefix("^").partition("-")
        cpus = range(int(first), int(last or first) + 1)
        found = found.difference(cpus) if part.startswith("^") else found.union(cpus)
    return tuple(sorted(found))


def licence_report(
    since: Moment = None,
    until: Moment = None,
    vm: Annotated[str, typer.Option("--vm", help="Name or id of a VM.")] = "",
    host: Annotated[str, typer.Option("--host", help="Name or id of a host.")] = "",
    csv: Annotated[bool, typer.Option("--csv", help="As a table for a spreadsheet.")] = False,
    output_format: Output = Format.TABLE,
) -> None:
    """Which VM held which physical CPUs of which host, from when to when."""
    with work.connected() as client:
        question = licences.asked(
            since, until, work.id_of(client, api.VMS, vm), work.id_of(client, api.HOSTS, host)
        )
        found = list(licences.all_of(client, question))
    if csv:
        sys.stdout.write(as_csv(found))
        return
    output.show(
        [_row(use) for use in found] if output_format is Format.TABLE else found, output_format, COLUMNS
    )


def _row(use: CpuUse) -> dict[str, Any]:
    fields: dict[str, Any] = msgspec.to_builtins(use)
    return fields | {name: " ".join(map(str, fields[name])) for name in ("cpus", "exclusive")}
