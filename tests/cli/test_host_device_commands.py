"""`volery host devices`, and `--device` of VMs."""

from __future__ import annotations

import pytest
import typer

from tests.cli.test_placing_commands import HOST, WEB, Desk, desk
from volery.cli.host_devices import asked
from volery.contracts.host_devices import (
    LIST_HOST_DEVICES,
    AskedDevice,
    DeviceKind,
    DeviceUse,
    HostDevice,
    HostDevices,
    MdevType,
)
from volery.contracts.vm import UPDATE_VM

__all__ = ["desk"]

GPU = HostDevice(
    name="pci_0000_65_00_0", kind=DeviceKind.PCI, vendor_id="10de", product_id="1eb8", vendor="NVIDIA",
    product="Tesla T4", driver="vfio-pci", iommu_group=7,
    mdev_types=(MdevType(id="nvidia-11", name="GRID", available=2, made=1),),
)  # fmt: skip
NIC = HostDevice(
    name="pci_0000_18_00_0", kind=DeviceKind.PCI, in_use="its network interface eno1 has an address"
)


async def test_a_hosts_devices_are_shown_with_who_has_them(desk: Desk) -> None:
    uses = (DeviceUse(device=GPU, vm_ids=(WEB.id,)), DeviceUse(device=NIC, reason=NIC.in_use))
    desk.script.on(LIST_HOST_DEVICES, HostDevices(host_id=HOST.id, devices=uses))
    shown = await desk.types("host devices h1")
    assert shown.exit_code == 0, shown.output
    assert [ask.id for ask in desk.script.questions(LIST_HOST_DEVICES)] == [HOST.id]
    for part in ("10de:1eb8", "NVIDIA Tesla T4", WEB.id, "eno1 has an address", "nvidia-11", "GRID"):
        assert part in shown.output


async def test_a_vm_is_given_devices_and_none_again(desk: Desk) -> None:
    desk.script.on(UPDATE_VM, WEB)
    shown = await desk.types(
        "vm edit web1 --device pci_0000_65_00_0 --device 10DE:1eb8=2 --device mdev:nvidia-11"
    )
    assert shown.exit_code == 0, shown.output
    assert desk.script.questions(UPDATE_VM)[-1].host_devices == (
        AskedDevice(device="pci_0000_65_00_0"),
        AskedDevice(model="10de:1eb8", count=2),
        AskedDevice(mdev_type="nvidia-11"),
    )
    await desk.types("vm edit web1 --device none")
    assert desk.script.questions(UPDATE_VM)[-1].host_devices == ()
    with pytest.raises(typer.BadParameter):
        asked(["10de:1eb8=many"])
