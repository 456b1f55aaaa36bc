"""`volery plan`, `volery cluster balance`: VMs that move for the good of their cluster, shown before and while they do."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
import typer

from volery.cli import output, work
from volery.cli.output import Format
from volery.cli.work import DryRun, Output, Wait
from volery.client import api
from volery.client.request import Request, body_of
from volery.client.transport import Client
from volery.contracts.cluster import UpgradeCluster
from volery.contracts.operation import Operation
from volery.contracts.plan import MakePlan, Plan, PlanKind

app = typer.Typer(
    help="Plans: which VMs move for the good of their cluster, and how far that is.", no_args_is_help=True
)

STEPS = ("wave", "vm_name", "source_host_name", "target_host_name", "state", "message")
UNPLACED = ("vm_name", "reason")

Cluster = Annotated[str, typer.Argument(help="Name or id of the cluster.")]


@app.command("list")
def list_plans(
    cluster: Annotated[str, typer.Option(help="Name or id of a cluster.")] = "",
    running: Annotated[bool, typer.Option("--running", help="Only those under way.")] = False,
    output_format: Output = Format.TABLE,
) -> None:
    """Plans; those that ended are kept for a month."""
    with work.connected() as client:
        wanted = {
            "cluster_id": work.id_of(client, api.CLUSTERS, cluster),
            "state": "running" if running else "",
        }
        given = {column: value for column, value in wanted.items() if value}
        output.show(list(client.list(api.PLANS, filter=given)), output_format, api.PLANS.columns)


@app.command("show")
def show_plan(plan_id: str, output_format: Output = Format.TABLE) -> None:
    """One plan by its id: its steps, and VMs without a place."""
    show(work.send(Request("GET", f"{api.PLANS.path}/{plan_id}", Plan)), output_format)


@app.command("cancel")
def cancel_plan(plan_id: str, output_format: Output = Format.TABLE) -> None:
    """Begin nothing more of a plan; what is on its way arrives."""
    output.show(work.send(api.PLANS.act(plan_id, "cancel", Operation)), output_format)


@app.command("make")
def make_plan(
    cluster: Cluster,
    kind: Annotated[PlanKind, typer.Option(help="What it is for.")] = PlanKind.BALANCE,
    host: Annotated[
        list[str] | None, typer.Option("--host", help="A host to be emptied; as often as there are some.")
    ] = None,
    wake: Annotated[
        list[str] | None,
        typer.Option("--wake", help="A sleeping host to be woken; as often as there are some."),
    ] = None,
    most_moves: Annotated[int, typer.Option(help="Not more moves than this; 0: as many as pay.")] = 0,
    dry_run: DryRun = False,
    wait: Wait = True,
    output_format: Output = Format.TABLE,
) -> None:
    """Compute a plan and carry it out."""
    with work.connected() as client:
        question = MakePlan(
            cluster_id=work.id_of(client, api.CLUSTERS, cluster),
            kind=kind,
            host_ids=tuple(work.id_of(client, api.HOSTS, each) for each in host or ()),
            wake_host_ids=tuple(work.id_of(client, api.HOSTS, each) for each in wake or ()),
            most_moves=most_moves,
        )
        request = Request("POST", api.PLANS.path, Operation, body_of(question), dry_run=dry_run)
        _finish(client, client.send(request), wait, output_format)


def balance(
    cluster: Cluster, dry_run: DryRun = False, wait: Wait = True, output_format: Output = Format.TABLE
) -> None:
    """Balance a cluster by its scheduling policy."""
    with work.connected() as client:
        cluster_id = work.id_of(client, api.CLUSTERS, cluster)
        path = f"{api.CLUSTERS.path}/{cluster_id}/balance"
        request = Request("POST", path, Operation, b"{}", dry_run=dry_run)
        _finish(client, client.send(request), wait, output_format)


def upgrade(
    cluster: Cluster,
    host: Annotated[
        list[str] | None, typer.Option("--host", help="Only this host; as often as there are some.")
    ] = None,
    reason: str = "",
    stop_vms: Annotated[bool, typer.Option("--stop-vms", help="Shut VMs down that can't move.")] = False,
    dry_run: DryRun = False,
    wait: Annotated[
        bool, typer.Option("--wait/--no-wait", help="Until all hosts have been upgraded.")
    ] = False,
    output_format: Output = Format.TABLE,
) -> None:
    """Empty a cluster's hosts one after the other; each waits until you have upgraded and activated it."""
    with work.connected() as client:
        question = UpgradeCluster(
            id=work.id_of(client, api.CLUSTERS, cluster),
            host_ids=tuple(work.id_of(client, api.HOSTS, each) for each in host or ()),
            reason=reason,
            stop_vms=stop_vms,
        )
        path = f"{api.CLUSTERS.path}/{question.id}/upgrade"
        request = Request("POST", path, Operation, body_of(question), dry_run=dry_run)
        operation = client.send(request)
        if not operation.id and output_format is Format.TABLE:
            output.out.print(f"in this order: {', '.join(operation.result['hosts'])}", markup=False)
        if operation.id or operation.result["plan"] is not None:
            _finish(client, operation, wait, output_format)


def _finish(client: Client, operation: Operation, wait: bool, form: Format) -> None:
    if operation.id:
        work.finish(client, operation, wait, form)
    else:
        show(msgspec.convert(operation.result["plan"], Plan), form)


def show(plan: Plan, form: Format) -> None:
    if form is not Format.TABLE:
        output.show(plan, form)
        return
    output.out.print(f"{plan.kind}: {plan.message}", markup=False)
    if plan.id:
        output.out.print(f"{plan.state}{f': {plan.reason}' if plan.reason else ''}", markup=False)
    steps: list[Any] = list(plan.steps)
    if steps:
        output.show(steps, form, STEPS)
    if plan.unplaced:
        output.show(list(plan.unplaced), form, UNPLACED)
