"""Devices of hosts that VMs can have for themselves: what a host has, what a VM asks for, and what it gets."""

from __future__ import annotations

import uuid
from enum import StrEnum
from hashlib import sha256

from volery.contracts.base import Call, Message


class DeviceKind(StrEnum):
    """How libvirt gives it to a guest."""

    PCI = "pci"
    USB = "usb"
    SCSI = "scsi"
    MDEV = "mdev"
    """A part of a device, made for one VM when it starts (mediated device)."""


class MdevType(Message):
    """Mediated devices that a device can be divided into."""

    id: str
    """As VMs ask for it: nvidia-11, i915-GVTg_V5_4, …"""
    name: str = ""
    api: str = ""
    """vfio-pci, vfio-ccw, vfio-ap"""
    available: int = 0
    """Instances that could still be made."""
    made: int = 0
    """Instances that Volery made for VMs."""

    @property
    def most(self) -> int:
        return self.available + self.made


class HostDevice(Message):
    """One device of a host, as its agent found it."""

    name: str
    """libvirt's name of it: pci_0000_65_00_0. The same slot has the same name in hosts of one kind."""
    kind: DeviceKind
    address: str = ""
    """0000:65:00.0; of USB bus.device (1.4), of SCSI host:bus:target:unit (2:0:0:0)."""
    vendor_id: str = ""
    """Four hexadecimal digits, like `product_id`; of SCSI neither is known."""
    product_id: str = ""
    vendor: str = ""
    product: str = ""
    class_code: str = ""
    """Of PCI: six hexadecimal digits."""
    driver: str = ""
    """The host's driver that has it now."""
    iommu_group: int = -1
    """Devices of one group go to one VM; -1: it is in none."""
    parent: str = ""
    """Of a virtual function the device whose function it is."""
    in_use: str = ""
    """Why the host keeps it for itself; "": a VM may have it."""
    mdev_types: tuple[MdevType, ...] = ()

    @property
    def model(self) -> str:
        """As VMs ask for it; "" for one that has no such numbers."""
        return f"{self.vendor_id}:{self.product_id}" if self.vendor_id else ""


class AskedDevice(Message):
    """What a VM asks for: a certain device by its name, or `count` of a model or of mediated devices of a type."""

    device: str = ""
    """libvirt's name of it, pci_0000_65_00_0: only hosts that have a device of this name can run the VM."""
    model: str = ""
    """vendor:product in hexadecimal digits, 10de:1eb8."""
    mdev_type: str = ""
    count: int = 1

    @property
    def text(self) -> str:
        """For people: pci_0000_65_00_0, 2 of 10de:1eb8."""
        named = self.device or self.model or f"mediated device {self.mdev_type}"
        return named if self.count == 1 else f"{self.count} of {named}"


class GivenDevice(Message):
    """What a VM gets of one host: a whole device, or one mediated device made of it."""

    name: str
    """The device's name."""
    kind: DeviceKind
    address: str = ""
    mdev_type: str = ""
    api: str = ""
    """Of a mediated device: vfio-pci, …"""
    number: int = 0
    """Counts the VM's mediated devices; with the VM's id it makes the instance's UUID."""


class DeviceUse(Message):
    """A device, and who has it."""

    device: HostDevice
    vm_ids: tuple[str, ...] = ()
    """VMs that hold it, or mediated devices of it; of an IOMMU group one VM holds all."""
    reason: str = ""
    """Why no VM can be given it now; "" when one can."""


class HostDevices(Message):
    host_id: str
    devices: tuple[DeviceUse, ...] = ()


class AskHostDevices(Message):
    id: str


LIST_HOST_DEVICES = Call("scheduler.host.devices", AskHostDevices, HostDevices)
"""Raises not_found for a host that the scheduler never heard of."""

_MADE = "766f6c72"
"""How the UUIDs of mediated devices begin that some Volery made: "volr"."""


def mdev_prefix(installation: str) -> str:
    """How the UUIDs begin of those that this Volery made."""
    return f"{_MADE}-{sha256(installation.encode()).hexdigest()[:4]}-"


def mdev_uuid(installation: str, vm_id: str, number: int) -> str:
    """The same for the same mediated device, so that whoever makes it again finds it."""
    digits = sha256(f"{vm_id} {number}".encode()).hexdigest()
    whole = mdev_prefix(installation).replace("-", "") + f"8{digits[:3]}8{digits[3:18]}"
    return str(uuid.UUID(whole))
