"""`volery host devices`, and how the devices are written that a VM is to have."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Annotated, Any

import typer

from volery.cli import output, work
from volery.cli.output import Format
from volery.cli.work import Output
from volery.client import api, host_devices
from volery.contracts.host_devices import AskedDevice, DeviceUse

NONE = "none"
MODEL = re.compile(r"[0-9a-fA-F]{4}:[0-9a-fA-F]{4}")
COLUMNS = ("name", "model", "what", "driver", "group", "vms", "why_not")
MDEVS = ("device", "mdev_type", "called", "free", "made")
DevicesOption = Annotated[
    list[str] | None,
    typer.Option(
        "--device",
        help="Of its host: a name (pci_0000_65_00_0), a model (10de:1eb8) or mdev:TYPE, the last two with =COUNT; none for "
        "no device. While it is down.",
    ),
]


def asked(texts: Sequence[str]) -> tuple[AskedDevice, ...]:
    return () if list(texts) == [NONE] else tuple(_asked(text) for text in texts)


def _asked(text: str) -> AskedDevice:
    what, _, count = text.partition("=")
    try:
        number = int(count) if count else 1
    except ValueError:
        raise typer.BadParameter(f"{text!r} is no device like 10de:1eb8=2") from None
    if what.startswith("mdev:"):
        return AskedDevice(mdev_type=what.removeprefix("mdev:"), count=number)
    if MODEL.fullmatch(what):
        return AskedDevice(model=what.lower(), count=number)
    return AskedDevice(device=what, count=number)


def devices(
    name: Annotated[str, typer.Argument(help="Name or id of the host.")], output_format: Output = Format.TABLE
) -> None:
    """Devices of a host that VMs can have, who has them, and why the host keeps others."""
    with work.connected() as client:
        found = client.send(host_devices.of_host(client.find(api.HOSTS, name).id))
    if output_format is not Format.TABLE:
        output.show(found, output_format)
        return
    output.show([_row(use) for use in found.devices], output_format, COLUMNS)
    if mdevs := list(_mdevs(found.devices)):
        output.show(mdevs, output_format, MDEVS)


def _row(use: DeviceUse) -> dict[str, Any]:
    device = use.device
    return {
        "name": device.name,
        "model": device.model,
        "what": f"{device.vendor} {device.product}".strip(),
        "driver": device.driver,
        "group": device.iommu_group if device.iommu_group >= 0 else "",
        "vms": " ".join(use.vm_ids),
        "why_not": use.reason,
    }


def _mdevs(uses: Sequence[DeviceUse]) -> Iterator[dict[str, Any]]:
    for use in uses:
        for kind in use.device.mdev_types:
            yield {
                "device": use.device.name,
                "mdev_type": kind.id,
                "called": kind.name,
                "free": kind.available,
                "made": kind.made,
            }
