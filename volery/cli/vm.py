"""`volery vm`: virtual machines."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from typing import Annotated, Any

import typer
from msgspec.structs import replace

from volery.cli import cpus, host_devices, numa, output, placing, snapshots, starts, work
from volery.cli.output import Format
from volery.cli.work import DryRun, Output, Wait
from volery.client import api
from volery.client.request import Request, body_of
from volery.contracts.domain import NumaNode
from volery.contracts.operation import Operation
from volery.contracts.vm import (
    Affinity,
    CdRom,
    CreateVm,
    HighAvailability,
    IoErrorPolicy,
    NewDisk,
    NewNic,
    RestartWhere,
)
from volery.contracts.vm_starts import StartVms

app = typer.Typer(help="Virtual machines.", no_args_is_help=True)
work.add_common(app, api.VMS, deletes=False)
app.add_typer(snapshots.app, name="snapshot")
HaWhere = Annotated[
    RestartWhere,
    typer.Option(help="With --ha. elsewhere is refused for a VM that could never run on another host."),
]
Name = Annotated[str, typer.Argument(help="Name or id of the VM.")]


class AfterBlackout(StrEnum):
    YES = "yes"
    NO = "no"
    DEFAULT = "default"


BLACKOUT: dict[AfterBlackout, bool | None] = {
    AfterBlackout.YES: True,
    AfterBlackout.NO: False,
    AfterBlackout.DEFAULT: None,
}
Blackout = Annotated[
    AfterBlackout | None,
    typer.Option(help="Start it after a blackout of hosts and Volery. default: if it is highly available."),
]


class PageSize(StrEnum):
    """What backs a VM's memory."""

    SMALL = "2MiB"
    LARGE = "1GiB"
    NONE = "none"


PAGES_KIB = {PageSize.SMALL: 2048, PageSize.LARGE: 1048576, PageSize.NONE: 0}
HugePages = Annotated[
    PageSize | None,
    typer.Option(help="Back its memory by huge pages of this size; while it is down."),
]
NumaNodes = Annotated[
    list[str] | None,
    typer.Option(
        help="VCPUS:MEMORY[:CELLS[:MODE]], e.g. 0-3:4GiB:0; once for each node, or none. Modes: strict, interleave, preferred."
    ),
]


def _nodes(texts: Sequence[str]) -> tuple[NumaNode, ...]:
    try:
        return numa.nodes(texts)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def _size(text: str) -> int:
    try:
        return output.read_size(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not a size like 512MiB or 2GiB") from None


@app.command()
def create(
    name: Annotated[str, typer.Argument(help="A name, unique in the data center.")],
    cluster: Annotated[str, typer.Option(help="Name or id of the cluster.")] = "Default",
    memory: Annotated[str, typer.Option(help="e.g. 2GiB")] = "1GiB",
    huge_pages: HugePages = None,
    numa_node: NumaNodes = None,
    vcpus: int = 1,
    disk: Annotated[
        list[str] | None,
        typer.Option(help="DOMAIN:SIZE makes one, copy:DISK:DOMAIN copies one, disk:DISK attaches one."),
    ] = None,
    nic: Annotated[list[str] | None, typer.Option(help="Name or id of a network.")] = None,
    cdrom: Annotated[str, typer.Option(help="Name or id of an ISO disk.")] = "",
    ha: Annotated[bool, typer.Option("--ha", help="Bring it back when it crashes or its host dies.")] = False,
    ha_where: HaWhere = RestartWhere.ELSEWHERE,
    pin: Annotated[list[str] | None, typer.Option(help="Only on these hosts.")] = None,
    cpu_pinning: cpus.PolicyOption = None,
    cpu_pins: cpus.PinsOption = "",
    device: host_devices.DevicesOption = None,
    io_error: Annotated[
        IoErrorPolicy, typer.Option(help="What an I/O error that pauses it leads to.")
    ] = IoErrorPolicy.RESUME,
    start_after_blackout: Blackout = None,
    lease: Annotated[
        str, typer.Option(help="Storage domain of its lease, or none. Default: with --ha.")
    ] = "",
    start: Annotated[bool, typer.Option("--start", help="Start it at once.")] = False,
    dry_run: DryRun = False,
    wait: Wait = True,
    output_format: Output = Format.TABLE,
) -> None:
    """Make a VM, with its disks and NICs."""
    with work.connected() as client:
        question = CreateVm(
            name=name,
            cluster_id=work.id_of(client, api.CLUSTERS, cluster),
            memory_bytes=_size(memory),
            hugepage_kib=PAGES_KIB[huge_pages or PageSize.NONE],
            numa_nodes=_nodes(numa_node or ()),
            vcpus=vcpus,
            cpu_pinning=cpus.pinning(cpu_pinning, cpu_pins),
            host_devices=host_devices.asked(device or ()),
            disks=tuple(_disk(client, text) for text in disk or ()),
            nics=tuple(NewNic(network_id=work.id_of(client, api.NETWORKS, text)) for text in nic or ()),
            cdroms=(CdRom(disk_id=work.id_of(client, api.DISKS, cdrom)),) if cdrom else (),
            high_availability=HighAvailability(enabled=ha, where=ha_where if ha else RestartWhere.POSSIBLE),
            affinity=Affinity(host_ids=tuple(work.id_of(client, api.HOSTS, text) for text in pin or ())),
            io_error=io_error,
            start_after_blackout=BLACKOUT[start_after_blackout or AfterBlackout.DEFAULT],
            lease=_lease(client, lease) if lease else None,
            start=start,
        )
        op = client.send(api.VMS.create(question, Operation, dry_run=dry_run))
        work.finish(client, op, wait, output_format)


def _lease(client: Any, text: str) -> str:
    """The id of the storage domain; "" for `none`."""
    return "" if text == "none" else str(client.find(api.STORAGE_DOMAINS, text).id)


def _disk(client: Any, text: str) -> NewDisk:
    kind, _, rest = text.partition(":")
    if kind == "disk":
        return NewDisk(disk_id=work.id_of(client, api.DISKS, rest))
    if kind == "copy":
        source, _, domain = rest.partition(":")
        found = client.find(api.DISKS, source)
        domain_id = work.id_of(client, api.STORAGE_DOMAINS, domain) or found.storage_domain_id
        return NewDisk(storage_domain_id=domain_id, copy_of=found.id)
    return NewDisk(storage_domain_id=work.id_of(client, api.STORAGE_DOMAINS, kind), size_bytes=_size(rest))


@app.command()
def edit(
    name: Name,
    new_name: Annotated[str, typer.Option("--name")] = "",
    memory: str = "",
    huge_pages: HugePages = None,
    numa_node: NumaNodes = None,
    vcpus: int = 0,
    description: str = "",
    cpu_pinning: cpus.PolicyOption = None,
    cpu_pins: cpus.PinsOption = "",
    device: host_devices.DevicesOption = None,
    ha: Annotated[bool | None, typer.Option("--ha/--no-ha")] = None,
    ha_where: HaWhere = RestartWhere.ELSEWHERE,
    io_error: Annotated[
        IoErrorPolicy | None, typer.Option(help="What an I/O error that pauses it leads to.")
    ] = None,
    start_after_blackout: Blackout = None,
    protect: Annotated[bool | None, typer.Option("--protect/--no-protect")] = None,
    lease: Annotated[str, typer.Option(help="Storage domain of its lease, or none; while it is down.")] = "",
    output_format: Output = Format.TABLE,
) -> None:
    """Change a VM; what needs a restart waits for the next one."""
    with work.connected() as client:
        vm = client.find(api.VMS, name)
        fields: dict[str, Any] = {}
        fields |= {"name": new_name} if new_name else {}
        fields |= {"memory_bytes": _size(memory)} if memory else {}
        fields |= {"hugepage_kib": PAGES_KIB[huge_pages]} if huge_pages is not None else {}
        fields |= {"numa_nodes": _nodes(numa_node)} if numa_node else {}
        fields |= {"vcpus": vcpus} if vcpus else {}
        fields |= {"description": description} if description else {}
        if cpu_pinning is not None or cpu_pins:
            fields |= {"cpu_pinning": cpus.pinning(cpu_pinning, cpu_pins)}
        fields |= {"host_devices": host_devices.asked(device)} if device else {}
        if ha is not None:
            where = ha_where if ha else RestartWhere.POSSIBLE
            fields |= {"high_availability": replace(vm.high_availability, enabled=ha, where=where)}
        fields |= {"io_error": str(io_error)} if io_error is not None else {}
        if start_after_blackout is not None:
            fields |= {"start_after_blackout": BLACKOUT[start_after_blackout]}
        fields |= {"delete_protected": protect} if protect is not None else {}
        fields |= {"lease": _lease(client, lease)} if lease else {}
        new = client.send(api.VMS.update(vm.id, fields, vm.revision))
    output.show(new, output_format)


def _act(name: str, action: str, wait: bool, form: Format, body: dict[str, Any] | None = None) -> None:
    with work.connected() as client:
        vm = client.find(api.VMS, name)
        work.finish(client, client.send(api.VMS.act(vm.id, action, Operation, body)), wait, form)


@app.command()
def start(
    names: Annotated[list[str] | None, typer.Argument(help="Names or ids of VMs.")] = None,
    group: Annotated[str, typer.Option(help="The VMs of this affinity group.")] = "",
    cluster: Annotated[str, typer.Option(help="VMs of this cluster that don't run.")] = "",
    tag: Annotated[str, typer.Option(help="VMs with this tag that don't run.")] = "",
    all_or_nothing: Annotated[
        bool, typer.Option("--all-or-nothing", help="None, unless a host is found for each.")
    ] = False,
    host: Annotated[str, typer.Option(help="Only on this host.")] = "",
    paused: Annotated[bool, typer.Option("--paused", help="Start it paused, once.")] = False,
    cdrom: Annotated[str, typer.Option(help="Boot from this ISO, once.")] = "",
    dry_run: DryRun = False,
    wait: Wait = True,
    output_format: Output = Format.TABLE,
) -> None:
    """Start a VM, or many in one call: those that a hard affinity group keeps on one host together, or not at all."""
    once = paused or bool(cdrom)
    many = len(names or ()) != 1 or bool(group or cluster or tag) or all_or_nothing or dry_run
    if many and once:
        raise typer.BadParameter("--paused and --cdrom are for one VM; start it by itself")
    with work.connected() as client:
        if many:
            question = StartVms(
                vm_ids=tuple(work.id_of(client, api.VMS, name) for name in names or ()),
                affinity_group_id=work.id_of(client, api.AFFINITY_GROUPS, group),
                cluster_id=work.id_of(client, api.CLUSTERS, cluster),
                tag=tag,
                host_id=work.id_of(client, api.HOSTS, host),
                all_or_nothing=all_or_nothing,
                dry_run=dry_run,
            )
            starts.start(client, question, wait, output_format)
            return
        body: dict[str, Any] = {"host_id": work.id_of(client, api.HOSTS, host)} if host else {}
        if once:
            iso = work.id_of(client, api.DISKS, cdrom)
            body["run_once"] = {"paused": paused, "cdrom_disk_id": iso}
    _act((names or [""])[0], "start", wait, output_format, body)


@app.command()
def stop(
    name: Name,
    force: Annotated[bool, typer.Option("--force", help="Pull the plug.")] = False,
    force_after: Annotated[float, typer.Option(help="Pull the plug after so many seconds.")] = 0.0,
    wait: Wait = True,
    output_format: Output = Format.TABLE,
) -> None:
    """Shut a VM down: its agent, then ACPI; forced off only if you say so."""
    _act(name, "stop", wait, output_format, {"force": force, "force_after_seconds": force_after})


@app.command()
def migrate(
    name: Name,
    host: Annotated[str, typer.Option(help="To this host; else the scheduler chooses.")] = "",
    bandwidth: Annotated[int, typer.Option(help="MiB/s; 0 is the policy's.")] = 0,
    dry_run: DryRun = False,
    wait: Wait = True,
    output_format: Output = Format.TABLE,
) -> None:
    """Move a running VM to another host."""
    with work.connected() as client:
        vm = client.find(api.VMS, name)
        body = {
            "host_id": work.id_of(client, api.HOSTS, host),
            "bandwidth_mib_per_second": bandwidth,
        }
        op = client.send(api.VMS.act(vm.id, "migrate", Operation, body, dry_run=dry_run))
        work.finish(client, op, wait, output_format)


SIMPLE = {
    "reboot": "Ask the guest to reboot.",
    "reset": "Press the reset button.",
    "pause": "Stop its CPUs.",
    "unpause": "Let its CPUs run again.",
    "suspend": "Save its memory to its host's disk and stop it; start resumes there, stop gives the memory up.",
}


def _simple(action: str, help_text: str) -> None:
    @app.command(action, help=help_text)
    def command(name: Name, wait: Wait = True, output_format: Output = Format.TABLE) -> None:
        _act(name, action, wait, output_format)


for _action, _help in SIMPLE.items():
    _simple(_action, _help)


@app.command()
def delete(
    name: Name,
    keep_disks: Annotated[bool, typer.Option("--keep-disks", help="Only detach them.")] = False,
    wait: Wait = True,
    output_format: Output = Format.TABLE,
) -> None:
    """Delete a VM that is down, with its disks."""
    with work.connected() as client:
        vm = client.find(api.VMS, name)
        query = {"delete_disks": "false" if keep_disks else "true"}
        work.finish(client, client.send(api.VMS.delete(vm.id, Operation, query=query)), wait, output_format)


@app.command("attach-disk")
def attach_disk(name: Name, disk: str, wait: Wait = True, output_format: Output = Format.TABLE) -> None:
    """Attach a disk, also while it runs."""
    with work.connected() as client:
        body = {"disk_id": work.id_of(client, api.DISKS, disk)}
    _act(name, "disks", wait, output_format, body)


@app.command("detach-disk")
def detach_disk(name: Name, disk: str, wait: Wait = True, output_format: Output = Format.TABLE) -> None:
    """Detach a disk, also while it runs."""
    with work.connected() as client:
        vm, disk_id = client.find(api.VMS, name), work.id_of(client, api.DISKS, disk)
        request = Request("DELETE", f"vms/{vm.id}/disks/{disk_id}", Operation)
        work.finish(client, client.send(request), wait, output_format)


@app.command("attach-nic")
def attach_nic(name: Name, network: str, wait: Wait = True, output_format: Output = Format.TABLE) -> None:
    """Add a NIC on a network, also while it runs."""
    with work.connected() as client:
        body = {"nic": {"network_id": work.id_of(client, api.NETWORKS, network)}}
    _act(name, "nics", wait, output_format, body)


@app.command("change-cd")
def change_cd(
    name: Name,
    iso: Annotated[str, typer.Argument(help="Name or id of an ISO disk; nothing ejects.")] = "",
    target: str = "sda",
    wait: Wait = True,
    output_format: Output = Format.TABLE,
) -> None:
    """Change or eject the CD, also while it runs."""
    with work.connected() as client:
        vm, disk_id = client.find(api.VMS, name), work.id_of(client, api.DISKS, iso)
        body = body_of({"disk_id": disk_id})
        request = Request("PUT", f"vms/{vm.id}/cdroms/{target}", Operation, body)
        work.finish(client, client.send(request), wait, output_format)


app.command("explain")(placing.explain)
