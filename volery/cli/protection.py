"""`volery protection`, `volery start-group`: whether highly available VMs would come back, and in which order."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from volery.cli import output, work
from volery.cli.output import Format
from volery.cli.work import Output
from volery.client import api
from volery.client.request import Request
from volery.contracts.base import encode
from volery.contracts.cluster import AdmissionControl
from volery.contracts.promise import ClusterPromise, HostLoss
from volery.contracts.protection import VmProtection
from volery.contracts.start_group import CreateStartGroup, WaitFor

app = typer.Typer(help="Whether VMs would be brought back elsewhere.", no_args_is_help=True)
groups = typer.Typer(help="Which VMs are brought back before which others.", no_args_is_help=True)
work.add_common(groups, api.START_GROUPS)

Vms = Annotated[
    list[str] | None, typer.Option("--vm", help="Name or id of a VM; as often as there are some.")
]
After = Annotated[list[str] | None, typer.Option(help="Name or id of a group that comes before it.")]
Seconds = Annotated[float, typer.Option(help="Later groups wait no longer than this for it, 0 to 600.")]

LOST = ("if lost", "vm", "goes to", "why")
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


@app.command("reserves")
def list_reserves(output_format: Output = Format.TABLE) -> None:
    """Clusters that reserve room for hosts that die, and whether they have it."""
    work.show_all(api.RESERVES, output_format)


@app.command("reserve")
def set_reserve(
    cluster: Annotated[str, typer.Argument(help="Name or id of the cluster.")],
    host_failures: Annotated[int, typer.Argument(help="Hosts that may die at once; 0 reserves nothing.")],
    output_format: Output = Format.TABLE,
) -> None:
    """Have it told when a cluster has no room for the VMs of so many hosts."""
    with work.connected() as client:
        found = client.find(api.CLUSTERS, cluster)
        fields = {"reserve_host_failures": host_failures}
        output.show(client.send(api.CLUSTERS.update(found.id, fields, found.revision)), output_format)


@app.command("promises")
def list_promises(output_format: Output = Format.TABLE) -> None:
    """Clusters that promise to survive the loss of hosts, and whether they would."""
    work.show_all(api.PROMISES, output_format)


@app.command("promise")
def set_promise(
    cluster: Annotated[str, typer.Argument(help="Name or id of the cluster.")],
    host_failures: Annotated[
        int, typer.Argument(help="Hosts whose loss it is to survive; 0 promises nothing.")
    ],
    control: Annotated[
        AdmissionControl, typer.Option(help="enforce refuses what would break it; warn only tells.")
    ] = AdmissionControl.ENFORCE,
    output_format: Output = Format.TABLE,
) -> None:
    """Let a cluster promise to survive the loss of so many hosts."""
    with work.connected() as client:
        found = client.find(api.CLUSTERS, cluster)
        fields = {"reserve_host_failures": host_failures, "admission_control": control}
        output.show(client.send(api.CLUSTERS.update(found.id, fields, found.revision)), output_format)


@app.command("of")
def show_promise(
    cluster: Annotated[str, typer.Argument(help="Name or id of the cluster.")],
    output_format: Output = Format.TABLE,
) -> None:
    """Whether a cluster's promise holds: each loss that it would not survive, with the VMs left without a place."""
    with work.connected() as client:
        found = client.find(api.CLUSTERS, cluster)
        promise = client.send(Request("GET", f"clusters/{found.id}/protection", ClusterPromise))
        if output_format is not Format.TABLE:
            output.show(promise, output_format)
            return
        kept = f"cluster {promise.cluster_name} would survive the loss of {promise.host_failures} hosts"
        output.out.print(kept if promise.kept else promise.message)
        output.show([line for loss in promise.breaking for line in losses(loss)], output_format, LOST)


@app.command("what-if")
def what_if(
    cluster: Annotated[str, typer.Argument(help="Name or id of the cluster.")],
    lose: Annotated[
        list[str], typer.Option("--lose", help="Name or id of a host; as often as there are some.")
    ],
    output_format: Output = Format.TABLE,
) -> None:
    """Where VMs would go if these hosts were lost together, or why nowhere. Nothing is changed."""
    with work.connected() as client:
        found = client.find(api.CLUSTERS, cluster)
        ids = {"host_ids": [work.id_of(client, api.HOSTS, text) for text in lose]}
        loss = client.send(Request("POST", f"clusters/{found.id}/what-if", HostLoss, encode(ids)))
        if output_format is not Format.TABLE:
            output.show(loss, output_format)
            return
        output.show(losses(loss), output_format, LOST)


def losses(loss: HostLoss) -> list[dict[str, Any]]:
    """A loss in a table: one line for each VM."""
    lost = " and ".join(loss.host_names)
    return [
        {"if lost": lost, "vm": vm.name, "goes to": vm.host_name or "nowhere", "why": vm.message}
        for vm in loss.vms
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


@groups.command("create")
def create_group(
    name: str,
    cluster: Annotated[str, typer.Option(help="Name or id of the cluster.")] = "Default",
    vm: Vms = None,
    after: After = None,
    wait_for: WaitFor = WaitFor.RUNS,
    wait_seconds: Seconds = 600.0,
    output_format: Output = Format.TABLE,
) -> None:
    """Make a start group."""
    with work.connected() as client:
        question = CreateStartGroup(
            name=name,
            cluster_id=work.id_of(client, api.CLUSTERS, cluster),
            vm_ids=tuple(work.id_of(client, api.VMS, text) for text in vm or ()),
            after=tuple(work.id_of(client, api.START_GROUPS, text) for text in after or ()),
            wait_for=wait_for,
            wait_seconds=wait_seconds,
        )
        output.show(client.send(api.START_GROUPS.create(question)), output_format)


@groups.command("edit")
def edit_group(
    name: Annotated[str, typer.Argument(help="The group's name or id.")],
    vm: Vms = None,
    after: After = None,
    wait_for: WaitFor | None = None,
    wait_seconds: float | None = None,
    output_format: Output = Format.TABLE,
) -> None:
    """Change a start group. --vm and --after replace what there was."""
    with work.connected() as client:
        group = client.find(api.START_GROUPS, name)
        fields: dict[str, Any] = {}
        fields |= {"vm_ids": [work.id_of(client, api.VMS, text) for text in vm]} if vm else {}
        fields |= {"after": [work.id_of(client, api.START_GROUPS, text) for text in after]} if after else {}
        fields |= {"wait_for": wait_for} if wait_for is not None else {}
        fields |= {"wait_seconds": wait_seconds} if wait_seconds is not None else {}
        output.show(client.send(api.START_GROUPS.update(group.id, fields, group.revision)), output_format)
