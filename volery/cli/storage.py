"""`volery storage-domain` and `volery disk`: domains, disks, images up and down."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Annotated, Any

import typer
from msgspec import UNSET
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from volery.cli import output, work
from volery.cli.output import Format
from volery.cli.work import Output, Wait
from volery.client import api
from volery.client.request import Request, body_of
from volery.client.transport import Client, problem_of
from volery.contracts.domain import ImageFormat
from volery.contracts.operation import Operation
from volery.contracts.storage import (
    ContentType,
    CreateDisk,
    CreateStorageDomain,
    CreateTransfer,
    DomainKind,
    Targets,
)
from volery.contracts.volume_orders import TransferDirection

domains = typer.Typer(help="Storage domains.", no_args_is_help=True)
work.add_common(domains, api.STORAGE_DOMAINS)
disks = typer.Typer(help="Disks and images.", no_args_is_help=True)
work.add_common(disks, api.DISKS, deletes=False)

CHUNK = 1024 * 1024
Name = Annotated[str, typer.Argument(help="Name or id.")]


@domains.command("create")
def create_domain(
    name: str,
    path: Annotated[str, typer.Option(help="A directory: kind directory.")] = "",
    host: Annotated[str, typer.Option(help="The one host of a local directory.")] = "",
    portal: Annotated[str, typer.Option(help="HOST:PORT of an iSCSI target.")] = "",
    iqn: str = "",
    chap_user: str = "",
    chap_password_file: Annotated[Path | None, typer.Option(help="File with the CHAP password.")] = None,
    data_center: str = "Default",
    leases: Annotated[
        bool | None,
        typer.Option(
            "--leases/--no-leases",
            help="VMs can have a lease here (sanlock). Unsaid: if all hosts can hold them.",
        ),
    ] = None,
    lease_io_timeout: Annotated[int, typer.Option(help="sanlock's io_timeout, in seconds.")] = 10,
    reset_hosts: Annotated[
        bool, typer.Option("--reset-hosts", help="The watchdog resets a host that loses its lease here.")
    ] = False,
    wait: Wait = True,
    output_format: Output = Format.TABLE,
) -> None:
    """Make a storage domain, attach it and activate it."""
    with work.connected() as client:
        question = CreateStorageDomain(
            name=name,
            kind=DomainKind.ISCSI if portal else DomainKind.DIRECTORY,
            data_center_id=work.id_of(client, api.DATA_CENTERS, data_center),
            path=path,
            host_id=work.id_of(client, api.HOSTS, host),
            portal=portal,
            iqn=iqn,
            chap_user=chap_user,
            chap_password=chap_password_file.read_text().strip() if chap_password_file else "",
            leases=UNSET if leases is None else leases,
            lease_io_timeout_seconds=lease_io_timeout,
            reset_hosts=reset_hosts,
        )
        work.finish(client, client.send(api.STORAGE_DOMAINS.create(question, Operation)), wait, output_format)


@domains.command("edit")
def edit_domain(
    name: Name,
    new_name: Annotated[str, typer.Option("--name")] = "",
    leases: Annotated[bool | None, typer.Option("--leases/--no-leases")] = None,
    lease_io_timeout: Annotated[int, typer.Option(help="In seconds; while leases are off.")] = 0,
    reset_hosts: Annotated[bool | None, typer.Option("--reset-hosts/--no-reset-hosts")] = None,
    output_format: Output = Format.TABLE,
) -> None:
    """Change a storage domain: its name, and whether VMs can have a lease there."""
    with work.connected() as client:
        domain = client.find(api.STORAGE_DOMAINS, name)
        fields: dict[str, Any] = {}
        fields |= {"name": new_name} if new_name else {}
        fields |= {"leases": leases} if leases is not None else {}
        fields |= {"lease_io_timeout_seconds": lease_io_timeout} if lease_io_timeout else {}
        fields |= {"reset_hosts": reset_hosts} if reset_hosts is not None else {}
        new = client.send(api.STORAGE_DOMAINS.update(domain.id, fields, domain.revision))
    output.show(new, output_format)


def _act(action: str, help_text: str) -> None:
    @domains.command(action, help=help_text)
    def command(name: Name, wait: Wait = True, output_format: Output = Format.TABLE) -> None:
        with work.connected() as client:
            found = client.find(api.STORAGE_DOMAINS, name)
            request = api.STORAGE_DOMAINS.act(found.id, action, Operation)
            work.finish(client, client.send(request), wait, output_format)


for _action, _help in {
    "activate": "Connect it on every host.",
    "maintenance": "Disconnect it from every host.",
    "detach": "Take it out of its data center.",
    "refresh": "Look again at what is on it.",
}.items():
    _act(_action, _help)


@domains.command()
def discover(portal: str, host: str = "", output_format: Output = Format.TABLE) -> None:
    """What an iSCSI portal offers."""
    with work.connected() as client:
        body = body_of({"portal": portal, "host_id": work.id_of(client, api.HOSTS, host)})
        found = client.send(Request("POST", "iscsi-discoveries", Targets, body))
    output.show(list(found.targets), output_format, ("iqn", "portal", "luns", "problem"))


@disks.command("create")
def create_disk(
    name: str,
    domain: Annotated[str, typer.Argument(help="Name or id of the storage domain.")],
    size: Annotated[str, typer.Argument(help="e.g. 10GiB; not needed with --import-url.")] = "0",
    format_: Annotated[ImageFormat, typer.Option("--format")] = ImageFormat.QCOW2,
    preallocate: bool = False,
    shareable: bool = False,
    iso: Annotated[bool, typer.Option("--iso", help="It is a CD image.")] = False,
    import_url: str = "",
    sha256: str = "",
    lun: Annotated[int, typer.Option(help="This LUN of an iSCSI domain; else the smallest free one.")] = -1,
    overwrite: Annotated[
        bool, typer.Option(help="With --lun: destroy what is on it, though no disk explains it.")
    ] = False,
    wipe_after_delete: Annotated[
        bool, typer.Option(help="Write zeros over its blocks when it is deleted.")
    ] = False,
    wait: Wait = True,
    output_format: Output = Format.TABLE,
) -> None:
    """Make a disk, empty or from an image on the web."""
    with work.connected() as client:
        question = CreateDisk(
            name=name,
            storage_domain_id=work.id_of(client, api.STORAGE_DOMAINS, domain),
            size_bytes=output.read_size(size),
            format=ImageFormat.RAW if iso else format_,
            content=ContentType.ISO if iso else ContentType.DATA,
            preallocate=preallocate,
            shareable=shareable,
            read_only=iso,
            import_url=import_url,
            sha256=sha256,
            lun=lun,
            overwrite=overwrite,
            wipe_after_delete=wipe_after_delete,
        )
        work.finish(client, client.send(api.DISKS.create(question, Operation)), wait, output_format)


@disks.command()
def resize(name: Name, size: str, wait: Wait = True, output_format: Output = Format.TABLE) -> None:
    """Make a disk larger, also while a VM runs with it."""
    with work.connected() as client:
        disk = client.find(api.DISKS, name)
        request = api.DISKS.act(disk.id, "resize", Operation, {"size_bytes": output.read_size(size)})
        work.finish(client, client.send(request), wait, output_format)


@disks.command()
def copy(
    name: Name, new_name: str, domain: str = "", wait: Wait = True, output_format: Output = Format.TABLE
) -> None:
    """Copy a disk."""
    with work.connected() as client:
        disk = client.find(api.DISKS, name)
        body = {"name": new_name, "storage_domain_id": work.id_of(client, api.STORAGE_DOMAINS, domain)}
        work.finish(client, client.send(api.DISKS.act(disk.id, "copy", Operation, body)), wait, output_format)


@disks.command()
def delete(name: Name, wait: Wait = True, output_format: Output = Format.TABLE) -> None:
    """Delete a disk that no VM has."""
    with work.connected() as client:
        disk = client.find(api.DISKS, name)
        work.finish(client, client.send(api.DISKS.delete(disk.id, Operation)), wait, output_format)


def open_transfer(client: Client, disk_id: str, direction: TransferDirection, **fields: Any) -> str:
    """Its id, once the host is ready for the bytes."""
    question = CreateTransfer(disk_id=disk_id, direction=direction, **fields)
    op = client.wait(client.send(api.TRANSFERS.create(question, Operation)))
    return op.object_id


def _progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    return Progress(*columns, console=output.err, transient=True)


def send_image(client: Client, disk_id: str, path: Path) -> None:
    """Upload a file into a disk, and have it checked. A cut connection goes on where it was."""
    total, digest = path.stat().st_size, hashlib.sha256()
    transfer_id = open_transfer(client, disk_id, TransferDirection.UPLOAD, size_bytes=total)
    with path.open("rb") as file, _progress() as progress:
        bar = progress.add_task(path.name, total=total)
        offset = 0
        while offset < total:
            chunk = file.read(16 * CHUNK)
            digest.update(chunk)
            answer = client.http.put(
                f"/api/v1/transfers/{transfer_id}/data",
                params={"offset": str(offset)},
                content=chunk,
                headers={"Content-Type": "application/octet-stream"},
                timeout=300,
            )
            if answer.status_code >= 400:
                raise problem_of(answer)
            offset += len(chunk)
            progress.update(bar, completed=offset)
    request = api.TRANSFERS.act(transfer_id, "finish", Operation, {"sha256": digest.hexdigest()})
    client.wait(client.send(request))


@disks.command()
def upload(
    file: Path,
    domain: Annotated[str, typer.Argument(help="Name or id of the storage domain.")],
    name: Annotated[str, typer.Option(help="Name of the new disk; else the file's.")] = "",
    iso: Annotated[bool, typer.Option("--iso", help="It is a CD image.")] = False,
    size: Annotated[str, typer.Option(help="Virtual size; else what the image says.")] = "",
    output_format: Output = Format.TABLE,
) -> None:
    """Make a disk from an image file (qcow2, raw, ISO; checked before it is used)."""
    with work.connected() as client:
        virtual = output.read_size(size) if size else image_size(file)
        question = CreateDisk(
            name=name or file.stem,
            storage_domain_id=work.id_of(client, api.STORAGE_DOMAINS, domain),
            size_bytes=virtual,
            format=ImageFormat.RAW if iso else ImageFormat.QCOW2,
            content=ContentType.ISO if iso else ContentType.DATA,
            read_only=iso,
        )
        made = client.wait(client.send(api.DISKS.create(question, Operation)))
        send_image(client, made.object_id, file)
        output.show(client.find(api.DISKS, made.object_id), output_format)


def image_size(path: Path) -> int:
    """The virtual size that a qcow2 header states (big-endian, at byte 24), else the file's, in whole 64 KiB."""
    with path.open("rb") as file:
        header = file.read(32)
    size = int.from_bytes(header[24:32], "big") if header[:4] == b"QFI\xfb" else path.stat().st_size
    return -(-size // 65536) * 65536


@disks.command()
def download(
    name: Name, file: Path, format_: Annotated[ImageFormat, typer.Option("--format")] = ImageFormat.QCOW2
) -> None:
    """Fetch a disk's content into a file."""
    with work.connected() as client:
        disk = client.find(api.DISKS, name)
        transfer_id = open_transfer(client, disk.id, TransferDirection.DOWNLOAD, format=format_)
        with client.http.stream("GET", f"/api/v1/transfers/{transfer_id}/data", timeout=300) as answer:
            if answer.status_code >= 400:
                answer.read()
                raise problem_of(answer)
            total = int(answer.headers.get("Content-Length", 0)) or None
            with file.open("wb") as target, _progress() as progress:
                bar = progress.add_task(disk.name, total=total)
                for chunk in answer.iter_bytes(CHUNK):
                    target.write(chunk)
                    progress.advance(bar, len(chunk))
        client.wait(client.send(api.TRANSFERS.act(transfer_id, "finish", Operation, {})))
    output.out.print(f"{disk.name}: {output.size(file.stat().st_size)} in {file}")
