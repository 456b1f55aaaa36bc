"""`volery data-center`, `cluster`, `host`, `network`, `mac-pool`: what VMs stand on."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from volery.cli import output, work
from volery.cli.output import Format
from volery.cli.work import DryRun, Output, Wait
from volery.client import api
from volery.contracts.cluster import Balance, CreateCluster, CreateDataCenter
from volery.contracts.host import CreateHost, HostToken, RenewHostToken
from volery.contracts.network import CreateMacPool, CreateNetwork
from volery.contracts.network_orders import NetworkKind
from volery.contracts.operation import Operation

Name = Annotated[str, typer.Argument(help="Name or id.")]

data_centers = typer.Typer(help="Data centers.", no_args_is_help=True)
work.add_common(data_centers, api.DATA_CENTERS)
clusters = typer.Typer(help="Clusters.", no_args_is_help=True)
work.add_common(clusters, api.CLUSTERS)
hosts = typer.Typer(help="Hosts.", no_args_is_help=True)
work.add_common(hosts, api.HOSTS)
networks = typer.Typer(help="Logical networks.", no_args_is_help=True)
work.add_common(networks, api.NETWORKS)
mac_pools = typer.Typer(help="Ranges of MAC addresses.", no_args_is_help=True)
work.add_common(mac_pools, api.MAC_POOLS)


@data_centers.command("create")
def create_data_center(
    name: str, description: str = "", local: bool = False, output_format: Output = Format.TABLE
) -> None:
    """Make a data center."""
    question = CreateDataCenter(name=name, description=description, local=local)
    output.show(work.send(api.DATA_CENTERS.create(question)), output_format)


@clusters.command("create")
def create_cluster(
    name: str,
    data_center: str = "Default",
    cpu_model: str = "",
    memory_overcommit: Annotated[int, typer.Option(help="Percent.")] = 100,
    balance: Balance = Balance.EVENLY_DISTRIBUTED,
    output_format: Output = Format.TABLE,
) -> None:
    """Make a cluster."""
    with work.connected() as client:
        question = CreateCluster(
            name=name,
            data_center_id=work.id_of(client, api.DATA_CENTERS, data_center),
            cpu_model=cpu_model,
            memory_overcommit_percent=memory_overcommit,
            balance=balance,
        )
        output.show(client.send(api.CLUSTERS.create(question)), output_format)


@hosts.command("create")
def create_host(name: str, cluster: str = "Default", output_format: Output = Format.TABLE) -> None:
    """Announce a host; shows the one-time token to run on it."""
    with work.connected() as client:
        question = CreateHost(name=name, cluster_id=work.id_of(client, api.CLUSTERS, cluster))
        _token(client.send(api.HOSTS.create(question, HostToken)), output_format)


@hosts.command()
def token(name: Name, output_format: Output = Format.TABLE) -> None:
    """A new one-time token for a host."""
    with work.connected() as client:
        host = client.find(api.HOSTS, name)
        request = api.HOSTS.act(host.id, "enrolment-token", HostToken, RenewHostToken(id=host.id))
        _token(client.send(request), output_format)


def _token(made: HostToken, form: Format) -> None:
    if form is Format.TABLE:
        output.out.print(f"On {made.host.name}, from a checkout of Volery as root, within the hour:")
        output.out.print(f"\n  {made.command}\n", soft_wrap=True)
    else:
        output.show(made, form)


@hosts.command()
def maintenance(
    name: Name,
    reason: str = "",
    stop_vms: Annotated[bool, typer.Option("--stop-vms", help="Shut down instead of moving.")] = False,
    dry_run: DryRun = False,
    wait: Wait = True,
    output_format: Output = Format.TABLE,
) -> None:
    """Move all VMs away and leave the host alone."""
    with work.connected() as client:
        host = client.find(api.HOSTS, name)
        body: dict[str, Any] = {"reason": reason, "stop_vms": stop_vms}
        request = api.HOSTS.act(host.id, "maintenance", Operation, body, dry_run=dry_run)
        work.finish(client, client.send(request), wait, output_format)


@hosts.command()
def activate(name: Name, wait: Wait = True, output_format: Output = Format.TABLE) -> None:
    """Use a host again."""
    with work.connected() as client:
        host = client.find(api.HOSTS, name)
        work.finish(client, client.send(api.HOSTS.act(host.id, "activate", Operation)), wait, output_format)


@networks.command("create")
def create_network(
    name: str,
    kind: NetworkKind = NetworkKind.BRIDGE,
    vlan: int = 0,
    mtu: int = 1500,
    subnet: Annotated[str, typer.Option(help="NAT: a private network in CIDR form.")] = "",
    data_center: str = "Default",
    required: Annotated[
        bool, typer.Option("--required", help="A host that has lost it is non-operational.")
    ] = False,
    output_format: Output = Format.TABLE,
) -> None:
    """Make a logical network."""
    with work.connected() as client:
        question = CreateNetwork(
            name=name,
            data_center_id=work.id_of(client, api.DATA_CENTERS, data_center),
            kind=kind,
            vlan=vlan,
            mtu=mtu,
            subnet=subnet,
            required=required,
        )
        output.show(client.send(api.NETWORKS.create(question)), output_format)


@hosts.command("networks")
def setup_networks(
    name: Name,
    attach: Annotated[list[str], typer.Option(help="NETWORK:NIC, or NETWORK: to take it off.")],
    wait: Wait = True,
    output_format: Output = Format.TABLE,
) -> None:
    """Which NIC carries which network; rolled back when the control plane can't be reached afterwards."""
    with work.connected() as client:
        host = client.find(api.HOSTS, name)
        pairs = [text.partition(":") for text in attach]
        nics = {work.id_of(client, api.NETWORKS, network): nic for network, _, nic in pairs}
        request = api.HOSTS.act(host.id, "networks", Operation, {"nics": nics})
        work.finish(client, client.send(request), wait, output_format)


@mac_pools.command("create")
def create_mac_pool(
    name: str,
    range_: Annotated[list[str], typer.Option("--range", help="FIRST-LAST")],
    output_format: Output = Format.TABLE,
) -> None:
    """Make a MAC pool."""
    question = CreateMacPool(name=name, ranges=tuple(range_))
    output.show(work.send(api.MAC_POOLS.create(question)), output_format)
