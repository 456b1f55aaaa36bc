"""`volery scheduling-policy`: which filters and weights decide where the VMs of a cluster run."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from volery.cli import output, work
from volery.cli.output import Format
from volery.cli.work import Output
from volery.client import api
from volery.client.request import Request
from volery.client.transport import Client
from volery.contracts.cluster import Balance
from volery.contracts.scheduling_policy import (
    ClusterBalance,
    PolicyUnit,
    PolicyUnits,
    SchedulingPolicy,
    Selector,
)

app = typer.Typer(help="Which filters and weights decide where VMs run.", no_args_is_help=True)
work.add_common(app, api.SCHEDULING_POLICIES)

UNITS = ("kind", "name", "what_it_does", "parameters", "can_it_be_left_out", "in_ovirt")
LOADS = ("name", "load", "cpu_percent", "memory_left_bytes", "vms", "host_id")

Filters = Annotated[
    list[str] | None, typer.Option("--filter", help="A filter to add; as often as there are some.")
]
Weights = Annotated[
    list[str] | None,
    typer.Option("--weight", help="UNIT=FACTOR, to add or change; as often as there are some."),
]
Parameters = Annotated[
    list[str] | None,
    typer.Option("--parameter", help="NAME=VALUE, to add or change; as often as there are some."),
]
Without = Annotated[
    list[str] | None, typer.Option("--without", help="A filter, weight or parameter to take out.")
]
BalanceUnit = Annotated[
    str | None, typer.Option("--balance", help="Unit that says which hosts have too much.")
]
Select = Annotated[Selector | None, typer.Option(help="How weights become one order.")]
Description = Annotated[str | None, typer.Option(help="For people.")]
Cluster = Annotated[str, typer.Argument(help="Name or id of the cluster.")]
Policy = Annotated[str, typer.Argument(help="Name or id of the policy.")]


def _pairs(option: str, pairs: list[str] | None) -> dict[str, float]:
    found = {}
    for pair in pairs or []:
        name, _, value = pair.partition("=")
        try:
            found[name] = float(value)
        except ValueError:
            output.fail(f"{option} {pair}: write NAME=NUMBER")
    return found


def _changed(
    base: SchedulingPolicy,
    filters: list[str] | None,
    weights: list[str] | None,
    parameters: list[str] | None,
    without: list[str] | None,
    **fields: Any,
) -> dict[str, Any]:
    """What was said on the command line, applied to a policy's lists."""
    out = set(without or [])
    if unknown := out - {*base.filters, *base.weights, *base.parameters}:
        output.fail(
            f"--without {min(unknown)}: scheduling policy {base.name} has no such filter, weight or parameter"
        )
    meant = {
        "filters": tuple(f for f in dict.fromkeys((*base.filters, *(filters or []))) if f not in out),
        "weights": {n: f for n, f in (base.weights | _pairs("--weight", weights)).items() if n not in out},
        "parameters": {
            n: v for n, v in (base.parameters | _pairs("--parameter", parameters)).items() if n not in out
        },
    }
    found = {name: value for name, value in meant.items() if value != getattr(base, name)}
    return found | {name: value for name, value in fields.items() if value is not None}


@app.command("create")
def create_policy(
    name: str,
    copy_of: Annotated[
        str, typer.Option(help="Name or id of the policy to begin with.")
    ] = Balance.EVENLY_DISTRIBUTED.value,
    filter_: Filters = None,
    weight: Weights = None,
    parameter: Parameters = None,
    without: Without = None,
    balance: BalanceUnit = None,
    selector: Select = None,
    description: Description = None,
    output_format: Output = Format.TABLE,
) -> None:
    """Make a scheduling policy: a copy of another one with some changes."""
    with work.connected() as client:
        base = client.find(api.SCHEDULING_POLICIES, copy_of)
        fields = _changed(
            base, filter_, weight, parameter, without,
            balance=balance, selector=selector, description=description,
        )  # fmt: skip
        question = {"name": name, "copy_of": base.id} | fields
        output.show(client.send(api.SCHEDULING_POLICIES.create(question)), output_format)


@app.command("edit")
def edit_policy(
    policy: Policy,
    name: Annotated[str | None, typer.Option(help="A new name.")] = None,
    filter_: Filters = None,
    weight: Weights = None,
    parameter: Parameters = None,
    without: Without = None,
    balance: BalanceUnit = None,
    selector: Select = None,
    description: Description = None,
    output_format: Output = Format.TABLE,
) -> None:
    """Change a scheduling policy; the next placement in its clusters goes by it."""
    with work.connected() as client:
        base = client.find(api.SCHEDULING_POLICIES, policy)
        fields = _changed(
            base, filter_, weight, parameter, without,
            name=name, balance=balance, selector=selector, description=description,
        )  # fmt: skip
        output.show(
            client.send(api.SCHEDULING_POLICIES.update(base.id, fields, base.revision)), output_format
        )


def _give(client: Client, cluster: str, policy_id: str, form: Format) -> None:
    cluster_id = work.id_of(client, api.CLUSTERS, cluster)
    body = {"policy_id": policy_id}
    request = api.CLUSTERS.act(cluster_id, "scheduling-policy", SchedulingPolicy, body)
    output.show(client.send(request), form)


@app.command("give")
def give_policy(policy: Policy, cluster: Cluster, output_format: Output = Format.TABLE) -> None:
    """Give a cluster a policy, in place of the one that it has."""
    with work.connected() as client:
        _give(client, cluster, work.id_of(client, api.SCHEDULING_POLICIES, policy), output_format)


@app.command("take")
def take_policy(cluster: Cluster, output_format: Output = Format.TABLE) -> None:
    """Take a cluster's policy away: the built-in one that its balance names holds again."""
    with work.connected() as client:
        _give(client, cluster, "", output_format)


@app.command("of")
def policy_of(cluster: Cluster, output_format: Output = Format.TABLE) -> None:
    """The policy that holds for a cluster."""
    with work.connected() as client:
        cluster_id = work.id_of(client, api.CLUSTERS, cluster)
        path = f"{api.CLUSTERS.path}/{cluster_id}/scheduling-policy"
        output.show(client.send(Request("GET", path, SchedulingPolicy)), output_format)


@app.command("balance")
def show_balance(cluster: Cluster, output_format: Output = Format.TABLE) -> None:
    """Which hosts of a cluster have too much and which have room, as its policy sees it. Moves nothing."""
    with work.connected() as client:
        cluster_id = work.id_of(client, api.CLUSTERS, cluster)
        path = f"{api.CLUSTERS.path}/{cluster_id}/balance"
        found = client.send(Request("GET", path, ClusterBalance))
        if output_format is not Format.TABLE:
            output.show(found, output_format)
            return
        by = f"{found.balance} of scheduling policy {found.policy_name} (revision {found.policy_revision})"
        output.out.print(by, markup=False)
        output.show(list(found.hosts), output_format, LOADS)


@app.command("units")
def list_units(output_format: Output = Format.TABLE) -> None:
    """What policies are made of: filters, weights, balances and their parameters."""
    found = work.send(Request("GET", "scheduling-policy-units", PolicyUnits))
    if output_format is not Format.TABLE:
        output.show(found, output_format)
        return
    output.show([_line(unit) for unit in found.units], output_format, UNITS)


def _line(unit: PolicyUnit) -> dict[str, Any]:
    does = f"excludes a host that {unit.description}" if unit.kind == "filter" else unit.description
    return {
        "kind": str(unit.kind),
        "name": unit.name,
        "what_it_does": does,
        "parameters": "\n".join(f"{p.name} {p.low:g} to {p.high:g} {p.unit}".strip() for p in unit.parameters)
        or "-",
        "can_it_be_left_out": f"no: {unit.mandatory}" if unit.mandatory else "yes",
        "in_ovirt": unit.ovirt_name or "-",
    }
