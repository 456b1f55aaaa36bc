"""`volery affinity-group`: which VMs run together or apart, and on which hosts."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from volery.cli import output, work
from volery.cli.output import Format
from volery.cli.work import Output
from volery.client import api
from volery.client.transport import Client
from volery.contracts.affinity_group import AffinityRule, CreateAffinityGroup

app = typer.Typer(help="Which VMs run together or apart, and on which hosts.", no_args_is_help=True)
work.add_common(app, api.AFFINITY_GROUPS)

Vms = Annotated[
    list[str] | None, typer.Option("--vm", help="Name or id of a VM; as often as there are some.")
]
Hosts = Annotated[
    list[str] | None, typer.Option("--host", help="Name or id of a host; as often as there are some.")
]
VmRule = Annotated[
    AffinityRule | None, typer.Option(help="positive: together; negative: each on another host.")
]
HostRule = Annotated[
    AffinityRule | None, typer.Option(help="positive: only on the hosts; negative: on none of them.")
]
VmEnforcing = Annotated[
    bool | None, typer.Option("--vm-enforcing/--vm-wish", help="Kept by every start, or wished for.")
]
HostEnforcing = Annotated[
    bool | None, typer.Option("--host-enforcing/--host-wish", help="Kept by every start, or wished for.")
]
Priority = Annotated[float | None, typer.Option(help="Of its wishes, 0 to 1000; higher counts more.")]
Description = Annotated[str | None, typer.Option(help="For people.")]


def _given(client: Client, vm: list[str] | None, host: list[str] | None, **fields: Any) -> dict[str, Any]:
    """What was said on the command line, with names looked up."""
    found = {name: value for name, value in fields.items() if value is not None}
    if vm:
        found["vm_ids"] = tuple(work.id_of(client, api.VMS, text) for text in vm)
    if host:
        found["host_ids"] = tuple(work.id_of(client, api.HOSTS, text) for text in host)
    return found


@app.command("create")
def create_group(
    name: str,
    cluster: Annotated[str, typer.Option(help="Name or id of the cluster.")] = "Default",
    vm: Vms = None,
    host: Hosts = None,
    vm_rule: VmRule = None,
    vm_enforcing: VmEnforcing = None,
    host_rule: HostRule = None,
    host_enforcing: HostEnforcing = None,
    priority: Priority = None,
    description: Description = None,
    output_format: Output = Format.TABLE,
) -> None:
    """Make an affinity group. Its rules are enforcing unless they are said to be wishes."""
    with work.connected() as client:
        given = _given(
            client,
            vm,
            host,
            vm_rule=vm_rule,
            vm_enforcing=vm_enforcing,
            host_rule=host_rule,
            host_enforcing=host_enforcing,
            priority=priority,
            description=description,
        )
        cluster_id = work.id_of(client, api.CLUSTERS, cluster)
        question = CreateAffinityGroup(name=name, cluster_id=cluster_id, **given)
        output.show(client.send(api.AFFINITY_GROUPS.create(question)), output_format)


@app.command("edit")
def edit_group(
    name: Annotated[str, typer.Argument(help="The group's name or id.")],
    vm: Vms = None,
    host: Hosts = None,
    vm_rule: VmRule = None,
    vm_enforcing: VmEnforcing = None,
    host_rule: HostRule = None,
    host_enforcing: HostEnforcing = None,
    priority: Priority = None,
    description: Description = None,
    output_format: Output = Format.TABLE,
) -> None:
    """Change an affinity group. --vm and --host replace what there was."""
    with work.connected() as client:
        group = client.find(api.AFFINITY_GROUPS, name)
        fields = _given(
            client,
            vm,
            host,
            vm_rule=vm_rule,
            vm_enforcing=vm_enforcing,
            host_rule=host_rule,
            host_enforcing=host_enforcing,
            priority=priority,
            description=description,
        )
        output.show(client.send(api.AFFINITY_GROUPS.update(group.id, fields, group.revision)), output_format)


@app.command("of")
def groups_of(
    vm: Annotated[str, typer.Argument(help="The VM's name or id.")], output_format: Output = Format.TABLE
) -> None:
    """The groups that name a VM."""
    with work.connected() as client:
        wanted = {"vm_id": work.id_of(client, api.VMS, vm)}
        found = list(client.list(api.AFFINITY_GROUPS, filter=wanted))
        output.show(found, output_format, api.AFFINITY_GROUPS.columns)
