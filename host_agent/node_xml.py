"""libvirt's XML of node devices: what of a host's devices could be a VM's. Pure."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from msgspec.structs import replace

from volery.contracts.host_devices import DeviceKind, GivenDevice, HostDevice, MdevType

NEVER = ("05", "06", "08", "0c05", "11", "13")
"""PCI classes that are of use to the host alone: memory, bridges, timers and the like, SMBus, sensors."""
BRIDGES = ("0604", "0609")
"""Those between two PCI buses: they may have a driver while a VM has the rest of their IOMMU group."""
HARMLESS = frozenset({"", "vfio-pci", "pci-stub", "pcieport"})
"""Drivers beside which a VM may have the rest of an IOMMU group."""
NO_IOMMU = "the host's IOMMU is off: switch it on in the firmware (VT-d, AMD-Vi), and boot an Intel host with intel_iommu=on"


@dataclass(frozen=True, slots=True)
class Found:
    """One node device."""

    device: HostDevice
    path: str
    """In sysfs."""
    functions: int = 0
    """Virtual functions that it has now."""


@dataclass(frozen=True, slots=True)
class FoundMdev:
    """A mediated device that exists."""

    name: str
    uuid: str
    parent: str
    type: str


@dataclass(frozen=True, slots=True)
class Uses:
    """What the host itself does with devices: sysfs paths of what it uses, and why."""

    paths: Mapping[str, str]
    hubs: frozenset[str] = frozenset()
    """Paths of USB hubs."""


def found(root: ET.Element) -> Found | None:
    """None for what is none of the kinds that VMs can have."""
    for capability in root.findall("capability"):
        reader = _READERS.get(capability.get("type", ""))
        if reader is not None:
            device = reader(root.findtext("name", ""), capability)
            functions = capability.findall("capability[@type='virt_functions']/address")
            driver = root.findtext("driver/name", "")
            return Found(replace(device, driver=driver), root.findtext("path", ""), len(functions))
    return None


def found_mdev(root: ET.Element) -> FoundMdev | None:
    capability = root.find("capability[@type='mdev']")
    if capability is None:
        return None
    kind = capability.find("type")
    assert kind is not None, "libvirt says of which type each is"
    name = root.findtext("name", "")
    # Before 5.x libvirt names no UUID; it is part of the name: mdev_3627463d_b7f0_…_0000_06_00_0.
    uuid = capability.findtext("uuid") or "-".join(name.split("_")[1:6])
    return FoundMdev(name, uuid, root.findtext("parent", ""), kind.get("id", ""))


def _number(element: ET.Element, tag: str) -> int:
    return int(element.findtext(tag, "0"))


def _pci(name: str, capability: ET.Element) -> HostDevice:
    group, parent = (
        capability.find("iommuGroup"),
        capability.find("capability[@type='phys_function']/address"),
    )
    device = HostDevice(
        name=name,
        kind=DeviceKind.PCI,
        address="{:04x}:{:02x}:{:02x}.{:x}".format(
            *(_number(capability, tag) for tag in ("domain", "bus", "slot", "function"))
        ),
        class_code=_digits(capability.findtext("class", "")),
        iommu_group=int(group.get("number", "-1")) if group is not None else -1,
        parent=_name_of(parent) if parent is not None else "",
        mdev_types=tuple(_mdev_types(capability)),
    )
    return replace(device, **_model(capability))


def _usb(name: str, capability: ET.Element) -> HostDevice:
    address = f"{_number(capability, 'bus')}.{_number(capability, 'device')}"
    return replace(HostDevice(name=name, kind=DeviceKind.USB, address=address), **_model(capability))


def _scsi(name: str, capability: ET.Element) -> HostDevice:
    address = ":".join(str(_number(capability, tag)) for tag in ("host", "bus", "target", "lun"))
    return HostDevice(
        name=name, kind=DeviceKind.SCSI, address=address, product=capability.findtext("type", "")
    )


_READERS: Mapping[str, Callable[[str, ET.Element], HostDevice]] = {
    "pci": _pci,
    "usb_device": _usb,
    "scsi": _scsi,
}


def _digits(text: str) -> str:
    return text.removeprefix("0x").lower()


def _model(capability: ET.Element) -> dict[str, str]:
    said: dict[str, str] = {}
    for tag in ("vendor", "product"):
        element = capability.find(tag)
        if element is not None:
            said |= {f"{tag}_id": _digits(element.get("id", "")), tag: element.text or ""}
    return said


def _name_of(address: ET.Element) -> str:
    """libvirt's name of the PCI device at an address."""
    parts = [int(address.get(part, "0"), 16) for part in ("domain", "bus", "slot", "function")]
    return "pci_{:04x}_{:02x}_{:02x}_{:x}".format(*parts)


def _mdev_types(capability: ET.Element) -> Iterable[MdevType]:
    for kind in capability.findall("capability[@type='mdev_types']/type"):
        yield MdevType(
            id=kind.get("id", ""),
            name=kind.findtext("name", ""),
            api=kind.findtext("deviceAPI", ""),
            available=int(kind.findtext("availableInstances", "0")),
        )


def assignable(
    devices: Sequence[Found], mdevs: Sequence[FoundMdev], uses: Uses, *, made: str, others: Mapping[str, str]
) -> tuple[HostDevice, ...]:
    """Those that VMs could have, by name, with why the host keeps one. `made`: how the UUIDs of mediated devices begin that
    this Volery made. `others`: address → the domain that has it and that Volery did not make."""
    said = [(each, _in_use(each, uses, others)) for each in devices if each.path not in uses.hubs]
    kept = _kept_groups(said)
    found = []
    for each, reason in said:
        device = each.device
        if device.class_code.startswith(NEVER) or (device.kind is DeviceKind.SCSI and _is_usb(each)):
            continue
        reason = reason or kept.get(device.iommu_group, "")
        types = tuple(_counted(kind, device, mdevs, made) for kind in device.mdev_types)
        found.append(replace(device, in_use=reason, mdev_types=types))
    return tuple(sorted(found, key=lambda device: device.name))


def _is_usb(each: Found) -> bool:
    """A disk that is plugged in by USB is given as what is plugged in."""
    return "/usb" in each.path


def _counted(kind: MdevType, device: HostDevice, mdevs: Collection[FoundMdev], made: str) -> MdevType:
    ours = (m for m in mdevs if m.parent == device.name and m.type == kind.id and m.uuid.startswith(made))
    return replace(kind, made=sum(1 for _ in ours))


def _in_use(each: Found, uses: Uses, others: Mapping[str, str]) -> str:
    device = each.device
    for path, reason in uses.paths.items():
        if each.path and f"{path}/".startswith(f"{each.path}/"):
            return reason
    if device.address in others:
        return f"domain {others[device.address]} has it, which Volery did not make"
    if each.functions:
        return f"it is divided into {each.functions} virtual functions, which VMs can have"
    if device.kind is DeviceKind.PCI and device.iommu_group < 0 and not device.mdev_types:
        return NO_IOMMU
    return ""


def _kept_groups(said: Sequence[tuple[Found, str]]) -> dict[int, str]:
    """IOMMU groups that no VM can have, and why."""
    kept: dict[int, str] = {}
    for each, reason in said:
        device = each.device
        if device.iommu_group < 0 or device.class_code.startswith(BRIDGES):
            continue
        if device.class_code.startswith(NEVER):
            reason = reason or (
                "" if device.driver in HARMLESS else f"the host's driver {device.driver} has it"
            )
        if reason:
            kept.setdefault(
                device.iommu_group, f"{device.name} is in its IOMMU group {device.iommu_group}: {reason}"
            )
    return kept


def mdev_xml(device: GivenDevice, uuid: str) -> str:
    """For virNodeDeviceCreateXML."""
    root = ET.Element("device")
    ET.SubElement(root, "parent").text = device.name
    capability = ET.SubElement(root, "capability", type="mdev")
    ET.SubElement(capability, "type", id=device.mdev_type)
    ET.SubElement(capability, "uuid").text = uuid
    return ET.tostring(root, encoding="unicode")
