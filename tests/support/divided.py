"""libvirtd of a machine in memory whose GPU can be divided: node devices beside the simulation's domains."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from dataclasses import dataclass, field
from typing import Any

from host_agent.refusals import LibvirtError
from sim.qemu import Daemon, MemoryError_

GPU = "pci_0000_65_00_0"
_GPU = """<device><name>pci_0000_65_00_0</name><path>/sys/devices/nowhere/0000:65:00.0</path><parent>computer</parent>
<driver><name>nvidia</name></driver><capability type='pci'><class>0x030200</class><domain>0</domain><bus>101</bus>
<slot>0</slot><function>0</function><product id='0x1eb8'>TU104GL [Tesla T4]</product><vendor id='0x10de'>NVIDIA Corporation</vendor>
<capability type='mdev_types'><type id='nvidia-11'><name>GRID T4-1Q</name><deviceAPI>vfio-pci</deviceAPI>
<availableInstances>{available}</availableInstances></type></capability>
<iommuGroup number='7'><address domain='0x0000' bus='0x65' slot='0x00' function='0x0'/></iommuGroup></capability></device>"""


@dataclass
class NodeDevice:
    daemon: DividingDaemon
    name_: str
    xml: str

    def name(self) -> str:
        return self.name_

    def XMLDesc(self, flags: int = 0) -> str:
        return self.xml

    def destroy(self) -> None:
        if self.daemon.stubborn:
            raise MemoryError_(LibvirtError.OPERATION_FAILED, "operation failed: device is busy")
        self.daemon.mdevs.pop(self.name_, None)


@dataclass(eq=False)
class DividingDaemon(Daemon):
    """Four instances of nvidia-11."""

    mdevs: dict[str, NodeDevice] = field(default_factory=dict)
    most: int = 4
    stubborn: bool = False
    """Takes nothing away."""
    deaf: bool = False
    """Its part for devices doesn't answer."""

    def uuids(self) -> set[str]:
        return {name.removeprefix("mdev_").replace("_", "-") for name in self.mdevs}

    def listAllDevices(self, flags: int) -> list[NodeDevice]:
        if self.deaf:
            raise MemoryError_(LibvirtError.OPERATION_FAILED, "operation failed: no virtnodedevd")
        gpu = NodeDevice(self, GPU, _GPU.format(available=self.most - len(self.mdevs)))
        return [gpu, *self.mdevs.values()]

    def nodeDeviceLookupByName(self, name: str) -> NodeDevice:
        if name not in self.mdevs:
            raise MemoryError_(LibvirtError.NO_NODE_DEVICE, f"no node device with matching name '{name}'")
        return self.mdevs[name]

    def nodeDeviceCreateXML(self, xml: str, flags: int) -> Any:
        asked = ET.fromstring(xml)
        uuid = asked.findtext("capability/uuid", "")
        kind = asked.find("capability/type")
        assert kind is not None
        name = f"mdev_{uuid.replace('-', '_')}"
        if len(self.mdevs) == self.most:
            raise MemoryError_(LibvirtError.OPERATION_FAILED, "operation failed: No space left on device")
        made = f"""<device><name>{name}</name><path>/sys/devices/nowhere/{uuid}</path><parent>{asked.findtext("parent")}</parent>
            <capability type='mdev'><type id='{kind.get("id")}'/><uuid>{uuid}</uuid></capability></device>"""
        self.mdevs[name] = NodeDevice(self, name, made)
        return self.mdevs[name]
