"""A running domain's XML: what we put there read back, and the few places in it that may change.

Pure. What libvirt added (addresses, backing chains) stays as it is, because it has to match the running QEMU.
"""

from __future__ import annotations

import posixpath
import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from dataclasses import dataclass

from host_agent import cell_pins, pins
from host_agent.cpu_room import CpuSeat
from host_agent.domxml import (
    ALIAS,
    NAMESPACE,
    Placement,
    disk_element,
    nic_element,
    put_pinning,
    written,
)
from volery.contracts.agent import DomainReport, OpenChain, OpenLun
from volery.contracts.domain import DomainDisk, DomainNic, DomainState

DEFAULT_PAGE_KIB = 2048
"""Of x86-64, where a domain names no size."""
UNIT_KIB = {"KiB": 1, "MiB": 1024, "M": 1024, "GiB": 1024**2, "G": 1024**2}
BY_PATH = re.compile(r"-iscsi-([^/]+)-lun-(\d+)")
"""udev's name for a LUN that the host's kernel is logged in to."""


@dataclass(frozen=True, slots=True)
class DomainMetadata:
    """What the metadata of a domain of ours says."""

    installation: str
    epoch: int
    order_seq: int
    title: str
    pinned: bool = False
    exclusive: tuple[int, ...] = ()


def metadata_of(root: ET.Element) -> DomainMetadata | None:
    """What we wrote into a domain; None for a domain that Volery did not make."""
    found = root.find(f"metadata/{{{NAMESPACE}}}domain")
    if found is None:
        return None
    return DomainMetadata(
        installation=found.get("installation", ""),
        epoch=int(found.get("epoch", "0")),
        order_seq=int(found.get("order_seq", "0")),
        title=found.get("title", ""),
        pinned=found.get("pinned", "") == "yes",
        exclusive=tuple(sorted(pins.read(found.get("exclusive", "")))),
    )


def cpu_seat(xml: str, vm_id: str) -> CpuSeat:
    """The CPUs that a domain has and may use."""
    root = parsed(xml)
    metadata, bound = metadata_of(root), cell_pins.bound(root)
    return CpuSeat(
        vm_id,
        ours=metadata is not None,
        pinned=metadata is not None and metadata.pinned,
        exclusive=frozenset(metadata.exclusive) if metadata is not None else frozenset(),
        allowed=pins.allowed(root, but=bound),
        bound=bound,
        vcpus={vcpu: pins.read(cpus) for vcpu, cpus in pins.of_vcpus(root).items() if vcpu in bound},
    )


def cpu_seats_in(xml: str, vm_id: str) -> list[CpuSeat]:
    return [cpu_seat(xml, vm_id)]


def parsed(xml: str) -> ET.Element:
    """XML that libvirt wrote."""
    return ET.fromstring(xml)  # noqa: S314 - libvirt parsed it before us and knows no entities


@dataclass(frozen=True, slots=True)
class Device:
    """A disk or NIC of ours in a running domain."""

    ident: str
    """disk_id or nic_id."""
    target: str
    """vda, sdb; of a NIC its device on the host (vnet0)."""
    element: ET.Element


def disks_of(root: ET.Element) -> dict[str, Device]:
    """The domain's disks that carry our alias, by disk_id."""
    return {d.ident: d for d in _aliased(root, "devices/disk")}


def nics_of(root: ET.Element) -> dict[str, Device]:
    """The domain's NICs that carry our alias, by nic_id."""
    return {d.ident: d for d in _aliased(root, "devices/interface")}


def hostdevs_of(root: ET.Element) -> Iterator[str]:
    """Addresses of the host's devices that a running domain has, as its agent reports them; of mediated ones the UUIDs."""
    for source in root.iterfind("devices/hostdev[@mode='subsystem']/source"):
        address = source.find("address")
        if address is not None:
            yield _hostdev(source, address)


def _hostdev(source: ET.Element, address: ET.Element) -> str:
    if uuid := address.get("uuid", ""):
        return uuid
    if address.get("device"):  # USB
        return f"{address.get('bus', '')}.{address.get('device', '')}"
    if (adapter := source.find("adapter")) is not None:
        host = adapter.get("name", "").removeprefix("scsi_host")
        return ":".join((host, *(address.get(part, "0") for part in ("bus", "target", "unit"))))
    parts = (int(address.get(part, "0"), 16) for part in ("domain", "bus", "slot", "function"))
    return "{:04x}:{:02x}:{:02x}.{:x}".format(*parts)


def luns_of(root: ET.Element, vm_id: str) -> list[OpenLun]:
    """The iSCSI LUNs that a running domain has open: by QEMU itself, or as a block device of the host's kernel;
    mirrors and backing files count as well."""
    found = {}
    for device in root.iterfind("devices/*"):
        alias = device.find("alias")
        name = alias.get("name", "") if alias is not None else ""
        disk_id = name.removeprefix(ALIAS) if name.startswith(ALIAS) else ""
        for source in device.iter("source"):
            if (place := _lun(source)) is not None:
                found[place] = OpenLun(iqn=place[0], lun=place[1], vm_id=vm_id, disk_id=disk_id)
    return list(found.values())


def luns_in(xml: str, vm_id: str) -> list[OpenLun]:
    return luns_of(parsed(xml), vm_id)


def chains_in(xml: str, vm_id: str) -> list[tuple[str, OpenChain]]:
    """What QEMU has open for each of our disks that are files: the path that is written, and the names of all."""
    found = []
    for disk in disks_of(parsed(xml)).values():
        paths = list[str]()
        level: ET.Element | None = disk.element
        while level is not None and (source := level.find("source")) is not None:
            paths.append(source.get("file", ""))
            level = level.find("backingStore")
        if paths and all(paths):
            names = tuple(posixpath.basename(path) for path in paths)
            found.append((paths[0], OpenChain(disk_id=disk.ident, vm_id=vm_id, files=names)))
    return found


def _lun(source: ET.Element) -> tuple[str, int] | None:
    """(target, LUN) of a device's source."""
    if source.get("protocol") == "iscsi":
        iqn, _, number = source.get("name", "").rpartition("/")
        return (iqn, int(number)) if iqn and number.isdecimal() else (source.get("name", ""), 0)
    by_path = BY_PATH.search(source.get("dev", ""))
    return (by_path[1], int(by_path[2])) if by_path else None


def graphics_port(root: ET.Element) -> int:
    """The VNC port on 127.0.0.1; 0 without one."""
    found = root.find("devices/graphics[@type='vnc']")
    return max(0, int(found.get("port", "0"))) if found is not None else 0


def hugepage_kib(root: ET.Element) -> int:
    """The size of the huge pages behind a domain's memory; 0: none are. Several sizes, which only others' domains have, count
    as their first."""
    backing = root.find("memoryBacking/hugepages")
    if backing is None:
        return 0
    page = backing.find("page")
    if page is None:
        return DEFAULT_PAGE_KIB
    return int(page.get("size", "0")) * UNIT_KIB.get(page.get("unit", "KiB"), 1)


def report(
    root: ET.Element, vm_id: str, state: DomainState, reason: str, *, responsive: bool
) -> DomainReport:
    """What is known about a domain from its XML and state; epoch 0 for one that Volery did not make."""
    metadata = metadata_of(root) or DomainMetadata("", 0, 0, "")
    agent = root.find("devices/channel/target[@name='org.qemu.guest_agent.0']")
    return DomainReport(
        vm_id=vm_id,
        epoch=metadata.epoch,
        order_seq=metadata.order_seq,
        name=root.findtext("name", ""),
        state=state,
        reason=reason,
        installation=metadata.installation,
        memory_bytes=int(root.findtext("memory", "0")) * 1024,
        vcpus=int(root.findtext("vcpu", "0")),
        hugepage_kib=hugepage_kib(root),
        responsive=responsive,
        agent_connected=agent is not None and agent.get("state") == "connected",
        disk_ids=tuple(disks_of(root)),
        nic_ids=tuple(nics_of(root)),
    )


def with_placement(root: ET.Element, placement: Placement) -> str:
    """The same domain with another placement in its metadata: what the destination of a migration gets."""
    found = root.find(f"metadata/{{{NAMESPACE}}}domain")
    if found is None:
        raise ValueError("the domain has no metadata of Volery's")
    found.set("epoch", str(placement.epoch))
    found.set("order_seq", str(placement.order_seq))
    put_pinning(found, placement)
    return written(root)


def replace_sources(
    root: ET.Element, disks: tuple[DomainDisk, ...], nics: tuple[DomainNic, ...], installation: str
) -> None:
    """Put in these disks' and NICs' places on the destination; what isn't listed stays as it is."""
    holder = ET.Element("devices")
    running_disks, running_nics = disks_of(root), nics_of(root)
    for disk in disks:
        if disk.disk_id in running_disks:
            _swap_source(running_disks[disk.disk_id].element, disk_element(holder, disk, installation))
    for nic in nics:
        if nic.nic_id in running_nics and nic.bridge:
            _swap_source(running_nics[nic.nic_id].element, nic_element(holder, nic))


def _swap_source(running: ET.Element, wanted: ET.Element) -> None:
    old, new = running.find("source"), wanted.find("source")
    if old is None or new is None:
        return
    place = list(running).index(old)
    running.remove(old)
    running.insert(place, new)
    if (below := wanted.find("backingStore")) is not None:
        for former in running.findall("backingStore"):
            running.remove(former)
        running.insert(place + 1, below)


def _aliased(root: ET.Element, path: str) -> Iterator[Device]:
    for element in root.findall(path):
        alias, target = element.find("alias"), element.find("target")
        name = alias.get("name", "") if alias is not None else ""
        if name.startswith(ALIAS):
            yield Device(
                name.removeprefix(ALIAS), target.get("dev", "") if target is not None else "", element
            )


def put_medium(drive: ET.Element, disk: DomainDisk, installation: str) -> None:
    """Another medium (or none) into a CD drive's element."""
    wanted = disk_element(ET.Element("devices"), disk, installation)
    drive.set("type", wanted.get("type", "file"))
    for tag in ("source", "backingStore", "driver"):
        for old in drive.findall(tag):
            drive.remove(old)
        for place, new in enumerate(wanted.findall(tag)):
            drive.insert(place, new)


def same_source(one: ET.Element, other: ET.Element) -> bool:
    """Whether two disks have the same medium."""
    return _place(one.find("source")) == _place(other.find("source"))


def _place(source: ET.Element | None) -> tuple[str | None, ...]:
    if source is None:
        return ()
    host = source.find("host")
    portal = (host.get("name"), host.get("port")) if host is not None else ()
    return (source.get("file"), source.get("name"), *portal)


def put_link(interface: ET.Element, nic: DomainNic) -> bool:
    """Link state and bridge into a NIC's element; whether that changed anything."""
    wanted = "up" if nic.link_up else "down"
    link, source = interface.find("link"), interface.find("source")
    changed = (link.get("state", "up") if link is not None else "up") != wanted
    if link is None:
        link = ET.SubElement(interface, "link")
    link.set("state", wanted)
    if nic.bridge and source is not None and source.get("bridge") != nic.bridge:
        changed = True
        source.attrib.clear()
        source.set("bridge", nic.bridge)
    return changed


def is_plugged(interface: ET.Element) -> bool:
    """Whether the NIC is in a bridge: libvirt can't change that of a running NIC."""
    return interface.get("type") == "bridge"
