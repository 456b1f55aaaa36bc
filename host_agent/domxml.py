"""Domain XML: a DomainSpec in libvirt's words.

Pure. Trees are built, never strings, so that no name or path can become markup.
"""

from __future__ import annotations

import re
import uuid
import xml.etree.ElementTree as ET
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

from host_agent import cell_pins, hostdevs, pins
from host_agent.cell_pins import Cells
from volery.contracts.cpus import GivenCpus
from volery.contracts.domain import (
    ChainSource,
    DiskBus,
    DomainDisk,
    DomainLease,
    DomainNic,
    DomainSpec,
    FileSource,
    ImageFormat,
    IscsiSource,
    NumaNode,
)

NAMESPACE = "https://volery.dev/domain/1"
SECRETS = uuid.UUID("6f0f2f58-7ce5-4c0e-9e53-6f1c0a1f6d4e")
PCIE_ROOT_PORTS = 16
"""So many devices can be plugged in while it runs."""
BALLOON_SECONDS = 5
ALIAS = "ua-"
SERIAL_LENGTH = 20
"""virtio-blk has no longer serial numbers."""
_NOT_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")

ET.register_namespace("volery", NAMESPACE)


@dataclass(frozen=True, slots=True)
class Placement:
    """Which decision put the domain here: kept in its metadata, so that it survives a lost journal."""

    epoch: int
    order_seq: int
    pinned: bool = False
    """It has CPUs of its own choice, so it is left where it is when others get theirs."""
    exclusive: tuple[int, ...] = ()
    """Physical CPUs that no other guest may use while it lives."""

    def on(self, cpus: GivenCpus | None) -> Placement:
        """The same, with what the domain gets of the host's CPUs."""
        if cpus is None:
            return self
        return replace(self, pinned=True, exclusive=cpus.exclusive)


@dataclass(frozen=True, slots=True)
class Machine:
    """What decides between equivalent XML on different hosts."""

    domain_type: str = "qemu"
    """kvm, qemu (TCG) or test."""
    arch: str = "x86_64"


def domain_xml(
    spec: DomainSpec,
    placement: Placement,
    machine: Machine,
    shared: Collection[int] | None = None,
    cells: Cells = MappingProxyType({}),
) -> str:
    """The whole domain, for virDomainCreateXML. `shared`: the CPUs for guests that have none of their own; None: all.
    `cells`: those of the host, if its nodes are to run where their memory is."""
    root = ET.Element("domain", type=machine.domain_type)
    _text(root, "name", spec.name)
    _text(root, "uuid", spec.vm_id)
    root.append(_in_metadata(spec, placement))
    _memory(root, spec)
    _text(root, "vcpu", str(spec.vcpus))
    pins.put(root, spec.cpus, shared)
    _firmware(root, spec, machine)
    features = ET.SubElement(root, "features")
    ET.SubElement(features, "acpi")
    if machine.domain_type != "test":
        ET.SubElement(features, "apic")
        _cpu(root, spec, machine)
        _numatune(root, spec.numa_nodes)
        if spec.cpus is None:
            cell_pins.put(root, cells, shared)
    ET.SubElement(root, "clock", offset="utc")
    for event, action in (("on_poweroff", "destroy"), ("on_reboot", "restart"), ("on_crash", "destroy")):
        _text(root, event, action)
    _devices(ET.SubElement(root, "devices"), spec, machine)
    return written(root)


def metadata_xml(title: str, installation: str, placement: Placement) -> str:
    """The metadata element alone, for virDomainSetMetadata, which puts it into our namespace itself."""
    element = _metadata(title, installation, placement)
    element.tag = "domain"
    return written(element)


def disk_xml(disk: DomainDisk, installation: str) -> str:
    """One disk, for attach and update."""
    holder = ET.Element("devices")
    return written(disk_element(holder, disk, installation))


def nic_xml(nic: DomainNic) -> str:
    """One NIC, for attach and update."""
    holder = ET.Element("devices")
    return written(nic_element(holder, nic))


def secret_uuid(source: IscsiSource, installation: str) -> str:
    """The id of the libvirt secret that holds the CHAP password for this portal, target and user."""
    return str(uuid.uuid5(SECRETS, "\0".join((installation, source.portal, source.iqn, source.chap_user))))


def secret_xml(source: IscsiSource, installation: str) -> str:
    """An ephemeral, private secret: it lives in libvirtd's memory and can't be read back."""
    root = ET.Element("secret", ephemeral="yes", private="yes")
    ident = secret_uuid(source, installation)
    _text(root, "uuid", ident)
    usage = ET.SubElement(root, "usage", type="iscsi")
    _text(usage, "target", f"volery-{ident}")
    return written(root)


def written(root: ET.Element) -> str:
    """The tree as text for libvirt."""
    return ET.tostring(root, encoding="unicode")


def _legal(text: str) -> str:
    """The text with what XML can't carry at all (most control characters) replaced."""
    return _NOT_XML.sub("\ufffd", text)


def _text(parent: ET.Element, tag: str, text: str, **attributes: str) -> ET.Element:
    made = ET.SubElement(parent, tag, {k: _legal(v) for k, v in attributes.items()})
    made.text = _legal(text)
    return made


def _sub(parent: ET.Element, tag: str, **attributes: str) -> ET.Element:
    return ET.SubElement(parent, tag, {k: _legal(v) for k, v in attributes.items()})


def _metadata(title: str, installation: str, placement: Placement) -> ET.Element:
    made = ET.Element(
        f"{{{NAMESPACE}}}domain",
        installation=_legal(installation),
        epoch=str(placement.epoch),
        order_seq=str(placement.order_seq),
        title=_legal(title),
    )
    put_pinning(made, placement)
    return made


def put_pinning(metadata: ET.Element, placement: Placement) -> None:
    """Nothing is written of a domain that isn't pinned."""
    said = {"pinned": "yes" if placement.pinned else "", "exclusive": pins.text_of(placement.exclusive)}
    for name, text in said.items():
        metadata.attrib.pop(name, None)
        if text:
            metadata.set(name, text)


def _in_metadata(spec: DomainSpec, placement: Placement) -> ET.Element:
    metadata = ET.Element("metadata")
    metadata.append(_metadata(spec.title, spec.installation, placement))
    return metadata


def _memory(root: ET.Element, spec: DomainSpec) -> None:
    if spec.max_memory_bytes > spec.memory_bytes:
        _text(root, "maxMemory", str(spec.max_memory_bytes), slots="16", unit="b")
    _text(root, "memory", str(spec.memory_bytes), unit="b")
    _text(root, "currentMemory", str(spec.memory_bytes), unit="b")
    if spec.hugepage_kib:
        backing = ET.SubElement(ET.SubElement(root, "memoryBacking"), "hugepages")
        _sub(backing, "page", size=str(spec.hugepage_kib), unit="KiB")


def _firmware(root: ET.Element, spec: DomainSpec, machine: Machine) -> None:
    """`<os>` and `<sysinfo>`: the guest reads its name as SMBIOS family and as fw_cfg opt/volery/hostname."""
    system = ET.SubElement(root, "os")
    if machine.domain_type == "test":
        _text(system, "type", "hvm")
        return
    if spec.uefi:
        system.set("firmware", "efi")
    _text(system, "type", "hvm", arch=machine.arch, machine=spec.machine)
    for tag, value in (
        ("kernel", spec.kernel_path),
        ("initrd", spec.initrd_path),
        ("cmdline", spec.kernel_cmdline),
    ):
        if value:
            _text(system, tag, value)
    if spec.boot_menu:
        _sub(system, "bootmenu", enable="yes", timeout="3000")
    _sub(system, "smbios", mode="sysinfo")

    block = _sub(ET.SubElement(root, "sysinfo", type="smbios"), "system")
    for name, value in (
        ("manufacturer", "Volery"),
        ("product", "KVM virtual machine"),
        ("serial", spec.vm_id),
        ("uuid", spec.vm_id),
        ("family", spec.hostname),
    ):
        if value:
            _text(block, "entry", value, name=name)
    if spec.hostname:
        block = ET.SubElement(root, "sysinfo", type="fwcfg")
        _text(block, "entry", spec.hostname, name="opt/volery/hostname")


def _cpu(root: ET.Element, spec: DomainSpec, machine: Machine) -> None:
    if spec.cpu_model:
        cpu = _sub(root, "cpu", mode="custom", match="exact", check="partial")
        _text(cpu, "model", spec.cpu_model, fallback="forbid")
    elif machine.domain_type == "kvm":
        cpu = _sub(root, "cpu", mode="host-passthrough", check="none", migratable="on")
    else:
        cpu = _sub(root, "cpu", mode="maximum", check="none")
    if spec.sockets and spec.cores and spec.threads:
        _sub(
            cpu,
            "topology",
            sockets=str(spec.sockets),
            cores=str(spec.cores),
            threads=str(spec.threads),
        )
    if spec.numa_nodes:
        _numa(cpu, spec.numa_nodes)
    elif spec.max_memory_bytes > spec.memory_bytes:
        cell = ET.SubElement(cpu, "numa")
        _sub(cell, "cell", id="0", cpus=f"0-{spec.vcpus - 1}", memory=str(spec.memory_bytes), unit="b")


def _numa(cpu: ET.Element, nodes: Sequence[NumaNode]) -> None:
    numa = ET.SubElement(cpu, "numa")
    for number, node in enumerate(nodes):
        cpus = ",".join(str(vcpu) for vcpu in node.vcpus)
        _sub(numa, "cell", id=str(number), cpus=cpus, memory=str(node.memory_bytes), unit="b")


def _numatune(root: ET.Element, nodes: Sequence[NumaNode]) -> None:
    """Which of the host's cells the nodes' memory comes from."""
    pinned = [(number, node) for number, node in enumerate(nodes) if node.host_cells]
    if not pinned:
        return
    tune = ET.SubElement(root, "numatune")
    for number, node in pinned:
        cells = ",".join(str(cell) for cell in node.host_cells)
        _sub(tune, "memnode", cellid=str(number), mode=str(node.mode), nodeset=cells)


def _devices(devices: ET.Element, spec: DomainSpec, machine: Machine) -> None:
    if machine.domain_type == "test":
        for disk in spec.disks:
            disk_element(devices, disk, spec.installation)
        for nic in spec.nics:
            nic_element(devices, nic)
        hostdevs.put(devices, spec)
        return
    if "q35" in spec.machine:
        _sub(devices, "controller", type="pci", index="0", model="pcie-root")
        for _ in range(PCIE_ROOT_PORTS):
            _sub(devices, "controller", type="pci", model="pcie-root-port")
    _sub(devices, "controller", type="scsi", index="0", model="virtio-scsi")
    _sub(devices, "controller", type="virtio-serial", index="0")
    for disk in spec.disks:
        disk_element(devices, disk, spec.installation)
    for nic in spec.nics:
        nic_element(devices, nic)
    hostdevs.put(devices, spec)
    if spec.lease is not None:
        _lease(devices, spec.lease)
    _graphics(devices, spec)
    _sub(_sub(devices, "serial", type="pty"), "target", port="0")
    _sub(_sub(devices, "console", type="pty"), "target", type="serial", port="0")
    _sub(_sub(devices, "channel", type="unix"), "target", type="virtio", name="org.qemu.guest_agent.0")
    _text(_sub(devices, "rng", model="virtio"), "backend", "/dev/urandom", model="random")
    _sub(_sub(devices, "memballoon", model="virtio"), "stats", period=str(BALLOON_SECONDS))
    _sub(devices, "panic", model="isa")
    if spec.watchdog_action:
        _sub(devices, "watchdog", model="i6300esb", action=spec.watchdog_action)


def _lease(devices: ET.Element, lease: DomainLease) -> None:
    made = _sub(devices, "lease")
    _text(made, "lockspace", lease.lockspace)
    _text(made, "key", lease.key)
    _sub(made, "target", path=lease.path, offset=str(lease.offset))


def _graphics(devices: ET.Element, spec: DomainSpec) -> None:
    if not spec.graphics:
        _sub(devices, "controller", type="usb", index="0", model="none")
        _sub(_sub(devices, "video"), "model", type="none")
        return
    _sub(devices, "controller", type="usb", index="0", model="qemu-xhci")
    _sub(devices, "input", type="tablet", bus="usb")
    vnc = _sub(devices, "graphics", type="vnc", autoport="yes", listen="127.0.0.1")
    _sub(vnc, "listen", type="address", address="127.0.0.1")
    _sub(_sub(devices, "video"), "model", type="vga")


_BUS = {DiskBus.VIRTIO: "virtio", DiskBus.VIRTIO_SCSI: "scsi", DiskBus.SATA: "sata"}
_PREFIX = {"virtio": "vd", "scsi": "sd", "sata": "sd"}


def disk_element(devices: ET.Element, disk: DomainDisk, installation: str) -> ET.Element:
    source = disk.source
    bus = "scsi" if disk.cdrom and disk.bus is DiskBus.VIRTIO else _BUS[disk.bus]
    made = _sub(
        devices,
        "disk",
        type="network" if isinstance(source, IscsiSource) else "file",
        device="cdrom" if disk.cdrom else "disk",
    )
    driver = _sub(made, "driver", name="qemu", type=_format(disk))
    if not disk.cdrom:  # of a CD drive these can't change with its medium
        driver.attrib.update(error_policy="stop", discard="unmap", detect_zeroes="off")
        if disk.shared_storage or isinstance(source, IscsiSource):
            driver.set("cache", "none")
        if isinstance(source, FileSource):
            driver.set("io", "threads")
    if isinstance(source, FileSource):
        _sub(made, "source", file=source.path)
        if source.format is ImageFormat.QCOW2:
            _backing(made, source)
    elif isinstance(source, IscsiSource):
        _iscsi(made, source, installation)
    _sub(made, "target", dev=disk.target or f"{_PREFIX[bus]}a", bus=bus)
    if disk.read_only or disk.cdrom:
        _sub(made, "readonly")
    if disk.shareable:
        _sub(made, "shareable")
    _text(made, "serial", disk.disk_id[:SERIAL_LENGTH])
    if disk.boot_order:
        _sub(made, "boot", order=str(disk.boot_order))
    _sub(made, "alias", name=ALIAS + disk.disk_id)
    return made


def _backing(disk: ET.Element, source: FileSource) -> None:
    """What is below a volume, down to an end that says so: libvirt looks for nothing in the files' headers."""
    for file in source.backing if isinstance(source, ChainSource) else ():
        disk = _sub(disk, "backingStore", type="file")
        _sub(disk, "format", type=file.format.value)
        _sub(disk, "source", file=file.path)
    _sub(disk, "backingStore")


def _format(disk: DomainDisk) -> str:
    if isinstance(disk.source, FileSource):
        return disk.source.format.value
    return ImageFormat.RAW.value


def _iscsi(disk: ET.Element, source: IscsiSource, installation: str) -> None:
    where = _sub(disk, "source", protocol="iscsi", name=f"{source.iqn}/{source.lun}")
    host, _, port = source.portal.rpartition(":")
    _sub(where, "host", name=host.strip("[]"), port=port)
    if source.chap_user:
        auth = _sub(where, "auth", username=source.chap_user)
        _sub(auth, "secret", type="iscsi", uuid=secret_uuid(source, installation))


def nic_element(devices: ET.Element, nic: DomainNic) -> ET.Element:
    made = _sub(devices, "interface", type="bridge" if nic.bridge else "ethernet")
    _sub(made, "mac", address=nic.mac)
    if nic.bridge:
        _sub(made, "source", bridge=nic.bridge)
    _sub(made, "model", type=nic.model.value)
    if nic.mtu:
        _sub(made, "mtu", size=str(nic.mtu))
    _sub(made, "link", state="up" if nic.link_up else "down")
    if nic.boot_order:
        _sub(made, "boot", order=str(nic.boot_order))
    else:
        _sub(made, "rom", enabled="no")
    _sub(made, "alias", name=ALIAS + nic.nic_id)
    return made
