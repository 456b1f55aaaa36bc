"""`volery host power…`, `volery fencing`, `volery fence`: BMCs, what they were told, and when they must not be."""

from __future__ import annotations

import sys
from enum import StrEnum
from http import HTTPStatus
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer

from volery.cli import output, work
from volery.cli import power_settings as settings
from volery.cli.output import Format
from volery.cli.work import Output
from volery.client import api
from volery.client.request import Request, body_of
from volery.client.transport import Client, ProblemError
from volery.contracts.base import Done
from volery.contracts.fencing import PowerAction
from volery.contracts.liveness import HostLiveness
from volery.contracts.power import (
    ConfirmHostRebooted,
    Fencing,
    FencingPause,
    FencingPolicy,
    FencingScope,
    PauseFencing,
    PowerManagement,
    PowerSwitched,
    ResumeFencing,
    SetFencingPolicy,
    SetPowerManagement,
    SwitchPower,
)

Name = Annotated[str, typer.Argument(help="The host's name or id.")]
Confirm = Annotated[str, typer.Option(help="The host's name; you are asked for it otherwise.")]

power_management = typer.Typer(help="How a host's power is switched.", no_args_is_help=True)
fencing = typer.Typer(help="Whether silent hosts are switched off.", no_args_is_help=True)
records = typer.Typer(help="What was switched, by ha or by hand.", no_args_is_help=True)


policies = typer.Typer(help="Which silent hosts of a cluster are spared.", no_args_is_help=True)


class Switch(StrEnum):
    ON = "on"
    OFF = "off"
    STATUS = "status"


@power_management.command("set")
def set_power(
    name: Name,
    agent: Annotated[str | None, typer.Option(help="fence_redfish, fence_ipmilan, …")] = None,
    address: Annotated[str | None, typer.Option(help="Of the BMC.")] = None,
    port: Annotated[int | None, typer.Option(help="0: the agent's own.")] = None,
    username: str | None = None,
    password_file: Annotated[
        Path | None, typer.Option(help="Else you are asked, if a login is named; - is stdin.")
    ] = None,
    keep_password: Annotated[bool, typer.Option("--keep-password", help="As it is set already.")] = False,
    option: Annotated[
        list[str] | None,
        typer.Option(help="NAME=VALUE, as the agent's man page has it: all of them, or none."),
    ] = None,
    file: Annotated[Path | None, typer.Option(help="JSON, for several devices; - is stdin.")] = None,
    enabled: Annotated[bool | None, typer.Option("--enabled/--disabled")] = None,
    kdump_address: Annotated[
        list[str] | None,
        typer.Option(help="From which its crash kernel sends fence_kdump messages: all of them, or none."),
    ] = None,
    kdump_proves: Annotated[
        bool | None,
        typer.Option(
            "--kdump-proves/--no-kdump-proves",
            help="No guest can send by that network: a dump proves its death.",
        ),
    ] = None,
    output_format: Output = Format.TABLE,
) -> None:
    """Set one device, or several from a file. What isn't named stays as it is. It is tested at once."""
    login = {"agent": agent, "address": address, "port": port, "username": username}
    named: dict[str, Any] = {field: value for field, value in login.items() if value is not None}
    with work.connected() as client:
        host = client.find(api.HOSTS, name)
        before = settings.kept(host.id, _known_power(client, host.id))
        try:
            if file is not None:
                question = settings.from_file(before, _from_file(file))
            else:
                if (named or password_file) and not keep_password:
                    settings.device(before.devices, named)  # before a password is asked for in vain
                    named["secrets"] = {"password": _password(password_file)}
                if option is not None:
                    named["options"] = _options([] if option == [settings.NONE] else option)
                question = _changed(before, named, enabled, kdump_address, kdump_proves)
        except settings.Unclear as error:
            output.fail(f"host {host.name}: {error}")
        except msgspec.DecodeError as error:
            output.fail(f"{file} isn't a power management: {error}")
        path, body = f"hosts/{host.id}/power-management", body_of(question)
        request = Request("PUT", path, PowerManagement, body, if_revision=question.if_revision)
        output.show(client.send(request), output_format)


def _known_power(client: Client, host_id: str) -> PowerManagement | None:
    try:
        return client.send(Request("GET", f"hosts/{host_id}/power-management", PowerManagement))
    except ProblemError as error:
        if error.status == HTTPStatus.NOT_FOUND:
            return None
        raise


def _changed(
    before: SetPowerManagement,
    named: dict[str, Any],
    enabled: bool | None,
    addresses: list[str] | None,
    proves: bool | None,
) -> SetPowerManagement:
    """Raises Unclear."""
    fields: dict[str, Any] = {"enabled": enabled, "kdump_proves": proves}
    if addresses is not None:
        fields["kdump_addresses"] = () if addresses == [settings.NONE] else tuple(addresses)
    if named or not before.devices:
        fields["devices"] = (settings.device(before.devices, named),)
    after = msgspec.structs.replace(
        before, **{field: value for field, value in fields.items() if value is not None}
    )
    return settings.vouched(before, after, named=proves is not None)


def _from_file(file: Path) -> dict[str, Any]:
    text = sys.stdin.read() if str(file) == "-" else file.read_text()
    return msgspec.json.decode(text, type=dict[str, Any])


def _password(file: Path | None) -> str:
    if file is None:
        return str(typer.prompt("Password of the BMC", hide_input=True))
    return (sys.stdin.read() if str(file) == "-" else file.read_text()).strip()


def _options(pairs: list[str]) -> dict[str, str]:
    for pair in pairs:
        if "=" not in pair:
            output.fail(f"--option {pair}: write NAME=VALUE")
    return dict(pair.split("=", 1) for pair in pairs)


@power_management.command("show")
def show_power(name: Name, output_format: Output = Format.TABLE) -> None:
    """Show it, without secrets."""
    with work.connected() as client:
        host = client.find(api.HOSTS, name)
        output.show(
            client.send(Request("GET", f"hosts/{host.id}/power-management", PowerManagement)), output_format
        )


@power_management.command("list")
def list_power(output_format: Output = Format.TABLE) -> None:
    """Show it of every host that has one."""
    work.show_all(api.POWER_MANAGEMENT, output_format)


@power_management.command("test")
def ask_devices(name: Name, output_format: Output = Format.TABLE) -> None:
    """Ask every device whose machine it is and whether that is on."""
    with work.connected() as client:
        host = client.find(api.HOSTS, name)
        request = Request("POST", f"hosts/{host.id}/power-management/test", PowerManagement, b"{}")
        found = client.send(request)
        output.show(found, output_format)
    if not found.test_passed:
        raise SystemExit(1)


@power_management.command("delete")
def delete_power(name: Name) -> None:
    """Forget it: the host is never fenced from now on."""
    with work.connected() as client:
        host = client.find(api.HOSTS, name)
        client.send(Request("DELETE", f"hosts/{host.id}/power-management", Done))
    output.out.print(f"power management of {name}: deleted")


def power(
    name: Name,
    action: Switch,
    confirm: Confirm = "",
    reason: str = "",
    output_format: Output = Format.TABLE,
) -> None:
    """Switch a host's power by hand, or read it."""
    with work.connected() as client:
        host = client.find(api.HOSTS, name)
        if action is Switch.OFF and not confirm and sys.stdin.isatty():
            confirm = typer.prompt(f"This ends what runs on {host.name}. Type its name")
        question = SwitchPower(id=host.id, action=PowerAction(action), confirm=confirm, reason=reason)
        request = Request("POST", f"hosts/{host.id}/power", PowerSwitched, body_of(question))
        output.show(client.send(request), output_format)


def confirm_rebooted(
    name: Name, confirm: Confirm = "", reason: str = "", output_format: Output = Format.TABLE
) -> None:
    """Say that a silent host is off or was rebooted: what ran there is started elsewhere."""
    with work.connected() as client:
        host = client.find(api.HOSTS, name)
        if not confirm and sys.stdin.isatty():
            confirm = typer.prompt(f"If {host.name} lives, its VMs will run twice. Type its name")
        question = ConfirmHostRebooted(id=host.id, confirm=confirm, reason=reason)
        request = Request("POST", f"hosts/{host.id}/confirm-rebooted", HostLiveness, body_of(question))
        output.show(client.send(request), output_format)


EVIDENCE = ("at", "kind", "by", "said", "boot_id", "details")


def evidence(name: Name, output_format: Output = Format.TABLE) -> None:
    """What ha judges a host by: beats, what its BMC said, what hosts found that tried it, the proof of its death."""
    with work.connected() as client:
        host = client.find(api.HOSTS, name)
        found = client.send(Request("GET", f"liveness/{host.id}", HostLiveness))
    if output_format is not Format.TABLE:
        output.show(found, output_format)
        return
    said = [msgspec.to_builtins(each) | {"said": each.reached or each.power} for each in found.evidence]
    output.show(said, output_format, EVIDENCE)
    proof = f"; proven by {found.proof.kind}: {found.proof.details}" if found.proof is not None else ""
    output.out.print(f"host {found.host_name} is {found.state}{proof}")
    if found.fencing:
        output.out.print(found.fencing)


def _scope(client: Client, cluster: str, host: str) -> tuple[FencingScope, str]:
    if cluster and host:
        output.fail("name a --cluster or a --host, not both; neither is everywhere")
    if cluster:
        return FencingScope.CLUSTER, client.find(api.CLUSTERS, cluster).id
    if host:
        return FencingScope.HOST, client.find(api.HOSTS, host).id
    return FencingScope.GLOBAL, ""


@fencing.command("show")
def show_fencing(output_format: Output = Format.TABLE) -> None:
    """Pauses, brakes, and silent hosts with what is done about them."""
    with work.connected() as client:
        found = client.send(Request("GET", "fencing", Fencing))
        if output_format is not Format.TABLE:
            output.show(found, output_format)
            return
        output.show(list(found.pauses), output_format, api.FENCING_PAUSES.columns)
        brakes = ("cluster_id", "hosts", "ordered_off", "limit", "window_seconds")
        output.show(list(found.brakes), output_format, brakes)
        output.show(list(found.held), output_format, ("host_name", "state", "fencing"))
        if found.kdump is not None:
            output.show([found.kdump], output_format, ("port", "heard", "ignored", "last_ignored", "problem"))


@fencing.command()
def pause(
    reason: Annotated[str, typer.Option(help="For whoever finds it paused.")] = "",
    cluster: str = "",
    host: str = "",
    minutes: Annotated[float, typer.Option(help="It goes on by itself after this, at most a week.")] = 60,
    output_format: Output = Format.TABLE,
) -> None:
    """Switch no silent host off for a while."""
    with work.connected() as client:
        scope, object_id = _scope(client, cluster, host)
        question = PauseFencing(scope=scope, object_id=object_id, seconds=minutes * 60, reason=reason)
        request = Request("POST", "fencing/pause", FencingPause, body_of(question) or b"{}")
        output.show(client.send(request), output_format)


@fencing.command()
def resume(cluster: str = "", host: str = "") -> None:
    """Go on with fencing."""
    with work.connected() as client:
        scope, object_id = _scope(client, cluster, host)
        question = ResumeFencing(scope=scope, object_id=object_id)
        client.send(Request("POST", "fencing/resume", Done, body_of(question)))
    output.out.print("fencing goes on")


Cluster = Annotated[str, typer.Argument(help="The cluster's name or id.")]


@policies.command("show")
def show_policy(cluster: Cluster, output_format: Output = Format.TABLE) -> None:
    """Show it; the defaults where none was set."""
    with work.connected() as client:
        found = client.find(api.CLUSTERS, cluster)
        output.show(
            client.send(Request("GET", f"clusters/{found.id}/fencing-policy", FencingPolicy)), output_format
        )


@policies.command("list")
def list_policies(output_format: Output = Format.TABLE) -> None:
    """Show those that were set."""
    work.show_all(api.FENCING_POLICIES, output_format)


@policies.command("set")
def set_policy(
    cluster: Cluster,
    skip_while_lease_alive: Annotated[
        bool, typer.Option(help="Spare a host whose storage lease is renewed.")
    ] = False,
    skip_if_broken_percent: Annotated[
        int, typer.Option(help="Switch nothing off while this share of the hosts is silent; 0: no such rule.")
    ] = 0,
    skip_while_peers_answer: Annotated[
        bool, typer.Option(help="Spare a host whose programs answer another host of the cluster.")
    ] = False,
    output_format: Output = Format.TABLE,
) -> None:
    """Set all of it: what isn't named is off."""
    with work.connected() as client:
        found = client.find(api.CLUSTERS, cluster)
        question = SetFencingPolicy(
            id=found.id,
            skip_while_lease_alive=skip_while_lease_alive,
            skip_if_connectivity_broken=skip_if_broken_percent != 0,
            connectivity_broken_percent=skip_if_broken_percent or 50,
            skip_while_peers_answer=skip_while_peers_answer,
        )
        path = f"clusters/{found.id}/fencing-policy"
        request = Request("PUT", path, FencingPolicy, body_of(question) or b"{}")
        output.show(client.send(request), output_format)


@records.command("list")
def list_records(
    host: Annotated[str, typer.Option(help="Of this host only.")] = "", output_format: Output = Format.TABLE
) -> None:
    """What was switched, when, why, and what came of it; all steps with -o yaml."""
    with work.connected() as client:
        wanted = {"host_id": client.find(api.HOSTS, host).id} if host else {}
        items = list(client.list(api.FENCE_RECORDS, filter=wanted, order_by="-id"))
        output.show(items, output_format, api.FENCE_RECORDS.columns)
