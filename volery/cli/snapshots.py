"""`volery vm snapshot`: what VMs' disks were."""

from __future__ import annotations

from typing import Annotated

import typer

from volery.cli import output, work
from volery.cli.output import Format
from volery.cli.work import Output, Wait
from volery.client import api
from volery.client.transport import Client
from volery.contracts.operation import Operation
from volery.contracts.snapshot import Snapshot

app = typer.Typer(help="Snapshots of VMs: what their disks were.", no_args_is_help=True)

VmName = Annotated[str, typer.Argument(help="Name or id of the VM.")]
Name = Annotated[str, typer.Argument(help="Name or id of the snapshot.")]
Disks = Annotated[
    list[str] | None, typer.Option("--disk", help="Name or id of a disk; all of the VM's if none is named.")
]


def _one(client: Client, vm: str, name: str) -> Snapshot:
    """Names are unique for one VM only. Raises Refused(not_found)."""
    vm_id = work.id_of(client, api.VMS, vm)
    found = list(client.list(api.SNAPSHOTS, filter={"vm_id": vm_id, "name": name}))
    return found[0] if found else client.find(api.SNAPSHOTS, name)


@app.command("create")
def create(
    vm: VmName,
    name: str,
    description: Annotated[str, typer.Option(help="What it is for.")] = "",
    disk: Disks = None,
    wait: Wait = True,
    output_format: Output = Format.TABLE,
) -> None:
    """Keep what the VM's disks are now, all at one point in time."""
    with work.connected() as client:
        disk_ids = tuple(work.id_of(client, api.DISKS, text) for text in disk or ())
        fields = {"name": name, "description": description, "disk_ids": disk_ids}
        request = api.VMS.act(work.id_of(client, api.VMS, vm), "snapshots", Operation, fields)
        work.finish(client, client.send(request), wait, output_format)


@app.command("list")
def list_(vm: Annotated[str, typer.Argument()] = "", output_format: Output = Format.TABLE) -> None:
    """Show those of a VM, or all."""
    with work.connected() as client:
        only = {"vm_id": work.id_of(client, api.VMS, vm)} if vm else {}
        found = list(client.list(api.SNAPSHOTS, filter=only))
    output.show(found, output_format, api.SNAPSHOTS.columns)


@app.command("show")
def show(vm: VmName, name: Name, output_format: Output = Format.TABLE) -> None:
    """Show one, with the VM's configuration at that time."""
    with work.connected() as client:
        output.show(_one(client, vm, name), output_format)


@app.command("delete")
def delete(vm: VmName, name: Name, wait: Wait = True, output_format: Output = Format.TABLE) -> None:
    """Give up what the disks were then; they stay as they are."""
    with work.connected() as client:
        request = api.SNAPSHOTS.delete(_one(client, vm, name).id, Operation)
        work.finish(client, client.send(request), wait, output_format)


@app.command("revert")
def revert(vm: VmName, name: Name, wait: Wait = True, output_format: Output = Format.TABLE) -> None:
    """Make the disks what they were then; what was written since is gone."""
    with work.connected() as client:
        request = api.SNAPSHOTS.act(_one(client, vm, name).id, "revert", Operation)
        work.finish(client, client.send(request), wait, output_format)
