"""`volery protection`: whether the death of its host would bring a highly available VM back elsewhere."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from volery.cli import output, work
from volery.cli.output import Format
from volery.cli.work import Output
from volery.client import api
from volery.client.request import Request
from volery.contracts.protection import VmProtection

app = typer.Typer(help="Whether VMs would be brought back elsewhere.", no_args_is_help=True)

COLUMNS = ("vm", "protected", "why", "change")


@app.command("list")
def list_protection(
    cluster: Annotated[str, typer.Argument(help="Name or id of a cluster; none is all.")] = "",
    unprotected: Annotated[bool, typer.Option("--unprotected", help="Only those that are not.")] = False,
    output_format: Output = Format.TABLE,
) -> None:
    """Highly available VMs, and for each that isn't protected every reason with the change that mends it."""
    with work.connected() as client:
        wanted = {"cluster_id": work.id_of(client, api.CLUSTERS, cluster)} if cluster else {}
        wanted |= {"protected": "false"} if unprotected else {}
        items = list(client.list(api.PROTECTION, filter=wanted, order_by="vm_name"))
        if output_format is not Format.TABLE:
            output.show(items, output_format)
            return
        output.show([line for item in items for line in lines(item)], output_format, COLUMNS)


def lines(protection: VmProtection) -> list[dict[str, Any]]:
    """A VM in a table: one line for each reason."""
    if protection.protected:
        return [{"vm": protection.vm_name, "protected": "yes", "why": "", "change": ""}]
    return [
        {
            "vm": protection.vm_name if number == 0 else "",
            "protected": "no" if number == 0 else "",
            "why": reason.message,
            "change": reason.change,
        }
        for number, reason in enumerate(protection.reasons)
    ]


@app.command("show")
def show_protection(
    name: Annotated[str, typer.Argument(help="The VM's name or id.")], output_format: Output = Format.TABLE
) -> None:
    """One VM's."""
    with work.connected() as client:
        vm = client.find(api.VMS, name)
        found = client.send(Request("GET", f"vms/{vm.id}/protection", VmProtection))
        if output_format is not Format.TABLE:
            output.show(found, output_format)
            return
        output.show(lines(found), output_format, COLUMNS)
