"""`volery explain`, `volery decision`, `volery host capacity`: where a VM would run or ran, why there, and what would have to change."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any

import typer

from volery.cli import output, work
from volery.cli.output import Format
from volery.cli.work import Output
from volery.client import api, placing
from volery.contracts.scheduling import HostVerdict, Placement

app = typer.Typer(help="Where VMs were placed, and why there.", no_args_is_help=True)

SHOWN = 20
"""Hosts in a table; `-o json` has all that the decision has."""
HOSTS = ("host", "fits", "weight", "why")
REMEDIES = ("change_of", "on", "what_would_help")


@app.command("list")
def list_decisions(
    vm: Annotated[str, typer.Option("--vm", help="Name or id of a VM.")] = "",
    host: Annotated[str, typer.Option("--host", help="Name or id of the host that was chosen.")] = "",
    output_format: Output = Format.TABLE,
) -> None:
    """Past decisions, the newest first; kept for a week."""
    with work.connected() as client:
        wanted = {"vm_id": work.id_of(client, api.VMS, vm), "host_id": work.id_of(client, api.HOSTS, host)}
        given = {column: value for column, value in wanted.items() if value}
        output.show(list(client.list(api.DECISIONS, filter=given)), output_format, api.DECISIONS.columns)


@app.command("show")
def show_decision(decision_id: str, output_format: Output = Format.TABLE) -> None:
    """One decision as it was explained then, by id."""
    show(work.send(placing.past_decision(decision_id)), output_format)


def capacity(output_format: Output = Format.TABLE) -> None:
    """What each host has, what is promised of it, and which has promised more than it has."""
    with work.connected() as client:
        output.show(list(client.list(api.CAPACITY)), output_format, api.CAPACITY.columns)


def explain(
    name: Annotated[str, typer.Argument(help="Name or id of the VM.")],
    host: Annotated[str, typer.Option(help="Name or id of the only host in question.")] = "",
    output_format: Output = Format.TABLE,
) -> None:
    """Where could a VM run now, why there, and what would have to change elsewhere? Changes nothing."""
    with work.connected() as client:
        vm = client.find(api.VMS, name)
        plan = client.send(placing.explain_vm(vm.id, work.id_of(client, api.HOSTS, host)))
    show(placing.placement_of(plan), output_format)


def show(placement: Placement, form: Format) -> None:
    if form is not Format.TABLE:
        output.show(placement, form)
        return
    output.out.print(placement.message, markup=False)
    output.show([_line(h, placement) for h in placement.hosts[:SHOWN]], form, HOSTS)
    more = placement.considered - min(len(placement.hosts), SHOWN)
    if more > 0:
        counts = ", ".join(f"{rule} {count}" for rule, count in placement.excluded_by.items()) or "no rule"
        output.out.print(f"{more} more hosts; of all {placement.considered}, excluded by: {counts}")
    if placement.remedies:
        output.show(list(_helpful(placement)), form, REMEDIES)


def _line(host: HostVerdict, placement: Placement) -> dict[str, Any]:
    """A host in a table: its weights, or every rule that excludes it."""
    chosen = " *" if host.host_id == placement.host_id else ""
    if host.fits:
        why = ", ".join(f"{rule} {share:g}" for rule, share in host.weights.items() if share) or "-"
    else:
        why = "\n".join(f"{v.rule}: {v.message}" for v in host.verdicts)
    return {
        "host": f"{host.name or host.host_id}{chosen}",
        "fits": "yes" if host.fits else "no",
        "weight": f"{host.weight:.3f}" if host.fits else "-",
        "why": why,
    }


def _helpful(placement: Placement) -> Iterator[dict[str, Any]]:
    for remedy in placement.remedies:
        yield {
            "change_of": str(remedy.kind),
            "on": remedy.host_name or remedy.host_id,
            "what_would_help": remedy.sentence,
        }
