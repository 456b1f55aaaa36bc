"""A host's devices in a domain's XML. Pure."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Callable, Mapping

from volery.contracts.domain import DomainSpec
from volery.contracts.host_devices import DeviceKind, GivenDevice, mdev_uuid

ALIAS = "ua-dev-"


def put(devices: ET.Element, spec: DomainSpec) -> None:
    for device in spec.devices:
        made = ET.SubElement(devices, "hostdev", mode="subsystem", type=str(device.kind), managed="yes")
        source = ET.SubElement(made, "source")
        ident = _SOURCES[device.kind](made, source, device, spec)
        ET.SubElement(made, "alias", name=ALIAS + ident)


def _pci(made: ET.Element, source: ET.Element, device: GivenDevice, spec: DomainSpec) -> str:
    domain, bus, rest = device.address.split(":")
    slot, _, function = rest.partition(".")
    where = {"domain": domain, "bus": bus, "slot": slot, "function": function}
    ET.SubElement(source, "address", {part: f"0x{digits}" for part, digits in where.items()})
    return device.name


def _usb(made: ET.Element, source: ET.Element, device: GivenDevice, spec: DomainSpec) -> str:
    bus, _, number = device.address.partition(".")
    ET.SubElement(source, "address", bus=bus, device=number)
    return device.name


def _scsi(made: ET.Element, source: ET.Element, device: GivenDevice, spec: DomainSpec) -> str:
    host, bus, target, unit = device.address.split(":")
    ET.SubElement(source, "adapter", name=f"scsi_host{host}")
    ET.SubElement(source, "address", bus=bus, target=target, unit=unit)
    return device.name


def _mdev(made: ET.Element, source: ET.Element, device: GivenDevice, spec: DomainSpec) -> str:
    made.attrib.pop("managed")  # it is made and taken away by the agent
    made.set("model", device.api)
    uuid = mdev_uuid(spec.installation, spec.vm_id, device.number)
    ET.SubElement(source, "address", uuid=uuid)
    return uuid


_SOURCES: Mapping[DeviceKind, Callable[[ET.Element, ET.Element, GivenDevice, DomainSpec], str]] = {
    DeviceKind.PCI: _pci,
    DeviceKind.USB: _usb,
    DeviceKind.SCSI: _scsi,
    DeviceKind.MDEV: _mdev,
}
