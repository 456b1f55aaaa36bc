"""Devices of a host: what libvirt says of them, what the host keeps for itself, domains' XML, and mediated devices' lives."""

from __future__ import annotations

import asyncio
import xml.etree.ElementTree as ET
from collections.abc import Callable
from functools import partial
from pathlib import Path
from uuid import UUID

import libvirt
import pytest
from msgspec.structs import replace

from host_agent import domxml, host_devices, host_uses, node_devices, runningxml
from host_agent.action import Host
from host_agent.domxml import Machine, Placement, domain_xml
from host_agent.node_xml import NO_IOMMU, Found, FoundMdev, Uses, assignable, found, found_mdev
from host_agent.refusals import Disconnected, LibvirtError
from sim.hypervisor import MemoryHypervisor
from sim.loop import new_loop
from sim.qemu import Guest
from tests.support.divided import GPU, DividingDaemon
from tests.support.vms import INSTALLATION, VmHost, new_uuid, tiny_spec, vm_host
from volery.contracts.domain import DomainSpec
from volery.contracts.errors import Kind, Refused
from volery.contracts.host_devices import (
    DeviceKind,
    GivenDevice,
    HostDevice,
    MdevType,
    mdev_prefix,
    mdev_uuid,
)

# As libvirt's own documentation and tests have them (nodedevschemadata), and this machine's libvirt.
FUNCTION = """<device><name>pci_0000_02_10_7</name><path>/sys/devices/pci0000:00/0000:00:04.0/0000:02:10.7</path>
<parent>pci_0000_00_04_0</parent><driver><name>igbvf</name></driver><capability type='pci'><class>0x020000</class>
<domain>0</domain><bus>2</bus><slot>16</slot><function>7</function><product id='0x10CA'>82576 Virtual Function</product>
<vendor id='0x8086'>Intel Corporation</vendor>
<capability type='phys_function'><address domain='0x0000' bus='0x02' slot='0x00' function='0x1'/></capability>
<iommuGroup number='31'><address domain='0x0000' bus='0x02' slot='0x10' function='0x7'/></iommuGroup>
</capability></device>"""
PORT = """<device><name>pci_0000_02_00_1</name><path>/sys/devices/pci0000:00/0000:00:04.0/0000:02:00.1</path>
<parent>pci_0000_00_04_0</parent><driver><name>igb</name></driver><capability type='pci'><class>0x020000</class>
<domain>0</domain><bus>2</bus><slot>0</slot><function>1</function><product id='0x10c9'>82576 Gigabit</product>
<vendor id='0x8086'>Intel Corporation</vendor><capability type='virt_functions' maxCount='7'>
<address domain='0x0000' bus='0x02' slot='0x10' function='0x1'/><address domain='0x0000' bus='0x02' slot='0x10' function='0x7'/>
</capability><iommuGroup number='15'><address domain='0x0000' bus='0x02' slot='0x00' function='0x1'/></iommuGroup>
</capability></device>"""
USB = """<device><name>usb_1_1_4</name><path>/sys/devices/pci0000:00/0000:00:1d.0/usb1/1-1/1-1.4</path><parent>usb_1_1</parent>
<driver><name>usb</name></driver><capability type='usb_device'><bus>1</bus><device>9</device>
<product id='0x2303'>PL2303 Serial Port</product><vendor id='0x067b'>Prolific</vendor></capability></device>"""
SCSI = """<device><name>scsi_2_0_0_3</name><path>/sys/devices/pci0000:00/0000:00:1f.2/host2/target2:0:0/2:0:0:3</path>
<parent>scsi_target2_0_0</parent><driver><name>st</name></driver><capability type='scsi'><host>2</host><bus>0</bus>
<target>0</target><lun>3</lun><type>tape</type></capability></device>"""
MDEV = """<device><name>mdev_3627463d_b7f0_4fea_b468_f1da537d301b_0000_65_00_0</name><parent>pci_0000_65_00_0</parent>
<capability type='mdev'><type id='nvidia-11'/>{uuid}<iommuGroup number='12'/></capability></device>"""
NET = """<device><name>net_eth0_52_54</name><capability type='net'><interface>eth0</interface></capability></device>"""


def read(xml: str) -> HostDevice:
    one = found(runningxml.parsed(xml))
    assert one is not None
    return one.device


def test_what_libvirt_says_of_devices_is_read() -> None:
    assert read(FUNCTION) == HostDevice(
        name="pci_0000_02_10_7", kind=DeviceKind.PCI, address="0000:02:10.7", vendor_id="8086", product_id="10ca",
        vendor="Intel Corporation", product="82576 Virtual Function", class_code="020000", driver="igbvf",
        iommu_group=31, parent="pci_0000_02_00_1",
    )  # fmt: skip
    assert (read(USB).address, read(USB).model, read(USB).driver) == ("1.9", "067b:2303", "usb")
    assert (read(SCSI).address, read(SCSI).model, read(SCSI).product) == ("2:0:0:3", "", "tape")
    port = found(runningxml.parsed(PORT))
    assert port is not None
    assert port.functions == 2
    assert found(runningxml.parsed(NET)) is None

    uuid = "3627463d-b7f0-4fea-b468-f1da537d301b"
    for said in (f"<uuid>{uuid}</uuid>", ""):  # older libvirt names it in the device's name only
        mdev = found_mdev(runningxml.parsed(MDEV.format(uuid=said)))
        assert mdev is not None
        assert (mdev.uuid, mdev.parent, mdev.type) == (uuid, "pci_0000_65_00_0", "nvidia-11")


def test_numbers_of_libvirt_are_its_own() -> None:
    assert node_devices.Listed.PCI == libvirt.VIR_CONNECT_LIST_NODE_DEVICES_CAP_PCI_DEV
    assert node_devices.Listed.USB == libvirt.VIR_CONNECT_LIST_NODE_DEVICES_CAP_USB_DEV
    assert node_devices.Listed.SCSI == libvirt.VIR_CONNECT_LIST_NODE_DEVICES_CAP_SCSI
    assert node_devices.Listed.MDEV == libvirt.VIR_CONNECT_LIST_NODE_DEVICES_CAP_MDEV
    assert node_devices.ACTIVE_DOMAINS == libvirt.VIR_CONNECT_LIST_DOMAINS_ACTIVE
    assert LibvirtError.NO_NODE_DEVICE == libvirt.VIR_ERR_NO_NODE_DEVICE


def pci(
    slot: int, function: int = 0, *, group: int = -1, path: str = "", functions: int = 0, **fields: str
) -> Found:
    name = f"pci_0000_00_{slot:02x}_{function}"
    address = f"0000:00:{slot:02x}.{function}"
    device = HostDevice(name=name, kind=DeviceKind.PCI, address=address, iommu_group=group)
    device = replace(device, **({"class_code": "030000"} | fields))
    return Found(device, path or f"/sys/devices/pci0000:00/{address}", functions)


def said(
    *devices: Found,
    uses: Uses | None = None,
    mdevs: tuple[FoundMdev, ...] = (),
    others: dict[str, str] | None = None,
) -> dict[str, HostDevice]:
    listed = assignable(devices, mdevs, uses or Uses({}), made=mdev_prefix(INSTALLATION), others=others or {})
    return {device.name: device for device in listed}


def test_a_host_keeps_what_it_uses_and_what_shares_an_iommu_group_with_that() -> None:
    disk = "/sys/devices/pci0000:00/0000:00:04.0/virtio1/block/vda"
    told = said(
        pci(3, group=1), pci(4, group=2), pci(4, 1, group=2), pci(5), pci(6, group=4, functions=8), pci(7, group=5),
        pci(8, group=6), uses=Uses({disk: "its disk vda is mounted"}), others={"0000:00:08.0": "router"},
    )  # fmt: skip
    assert {name: device.in_use for name, device in told.items()} == {
        "pci_0000_00_03_0": "",
        "pci_0000_00_04_0": "its disk vda is mounted",
        "pci_0000_00_04_1": "pci_0000_00_04_0 is in its IOMMU group 2: its disk vda is mounted",
        "pci_0000_00_05_0": NO_IOMMU,
        "pci_0000_00_06_0": "it is divided into 8 virtual functions, which VMs can have",
        "pci_0000_00_07_0": "",
        "pci_0000_00_08_0": "domain router has it, which Volery did not make",
    }


def test_bridges_are_nobodys_and_keep_a_group_only_with_a_driver_of_their_own() -> None:
    root_port, isa, smbus = (
        pci(1, group=1, class_code="060400", driver="shpchp"),
        pci(2, group=2, class_code="060100", driver="lpc_ich"),
        pci(3, group=3, class_code="0c0500"),
    )
    told = said(root_port, pci(1, 1, group=1), isa, pci(2, 1, group=2), smbus, pci(3, 1, group=3))
    assert {name: device.in_use for name, device in told.items()} == {
        "pci_0000_00_01_1": "",
        "pci_0000_00_02_1": "pci_0000_00_02_0 is in its IOMMU group 2: the host's driver lpc_ich has it",
        "pci_0000_00_03_1": "",
    }


def test_mediated_devices_that_this_volery_made_count_as_its_own() -> None:
    types = (MdevType(id="nvidia-11", available=2), MdevType(id="nvidia-12", available=0))
    gpu = pci(5, group=1)
    gpu = Found(replace(gpu.device, mdev_types=types), gpu.path)
    name = gpu.device.name
    mdevs = (
        FoundMdev("mdev_1", mdev_uuid(INSTALLATION, "vm-1", 0), name, "nvidia-11"),
        FoundMdev("mdev_2", mdev_uuid("another", "vm-1", 0), name, "nvidia-11"),
        FoundMdev("mdev_3", mdev_uuid(INSTALLATION, "vm-1", 1), "pci_0000_00_06_0", "nvidia-11"),
    )
    kinds = said(gpu, mdevs=mdevs)[name].mdev_types
    assert [(kind.made, kind.most) for kind in kinds] == [(1, 3), (0, 0)]


def test_hubs_and_disks_that_are_plugged_in_are_not_given_twice() -> None:
    stick = Found(replace(read(USB), name="usb_1_2"), "/sys/devices/pci0000:00/usb1/1-2")
    hub = Found(replace(read(USB), name="usb_1_1"), "/sys/devices/pci0000:00/usb1/1-1")
    disk = Found(read(SCSI), "/sys/devices/pci0000:00/usb1/1-2/1-2:1.0/host2/target2:0:0/2:0:0:3")
    told = said(stick, hub, disk, uses=Uses({}, hubs=frozenset({hub.path})))
    assert list(told) == ["usb_1_2"]


def made_up(ground: Path, kind: str, name: str, path: str, **files: str) -> Path:
    """A device in a /sys of our own."""
    place = ground / "sys/devices" / path
    place.mkdir(parents=True, exist_ok=True)
    for file, text in files.items():
        (place / file).write_text(text)
    link = ground / "sys" / kind / name
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(place)
    return place


def test_what_a_host_uses_is_found_by_its_disks_and_interfaces(tmp_path: Path) -> None:
    block, net = "class/block", "class/net"
    made_up(tmp_path, block, "sda1", "a/host0/sda/sda1", dev="8:1")
    made_up(tmp_path, block, "sdb", "b/host1/sdb", dev="8:16")
    made_up(tmp_path, block, "sdc", "c/host2/sdc", dev="8:32")
    (made_up(tmp_path, block, "sdd", "d/host3/sdd", dev="8:48") / "holders").mkdir()
    (tmp_path / "sys/devices/d/host3/sdd/holders/dm-0").touch()
    made_up(tmp_path, block, "sde", "e/host4/sde", dev="8:64")
    (made_up(tmp_path, net, "eno1", "f/net/eno1") / "upper_br0").touch()
    made_up(tmp_path, net, "eno2", "g/net/eno2")
    made_up(tmp_path, net, "eno3", "h/net/eno3")
    made_up(tmp_path, "bus/usb/devices", "1-1", "i/usb1/1-1", bDeviceClass="09\n")
    made_up(tmp_path, "bus/usb/devices", "1-2", "i/usb1/1-2", bDeviceClass="00\n")
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/mountinfo").write_text(
        "22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw\n23 1 0:40 / /b rw - btrfs /dev/sdb rw,space_cache\n"
    )
    (tmp_path / "proc/swaps").write_text("Filename Type Size\n/dev/sdc partition 1048572\n")
    uses = host_uses.find(tmp_path, frozenset({"eno2", "lo"}))
    assert uses.paths == {
        "/sys/devices/a/host0/sda/sda1": "its disk sda1 is mounted",
        "/sys/devices/b/host1/sdb": "its disk sdb is mounted",
        "/sys/devices/c/host2/sdc": "its disk sdc is swapped to",
        "/sys/devices/d/host3/sdd": "its disk sdd is part of a volume of the host",
        "/sys/devices/f/net/eno1": "its network interface eno1 is part of br0",
        "/sys/devices/g/net/eno2": "its network interface eno2 has an address",
    }
    assert uses.hubs == {"/sys/devices/i/usb1/1-1"}


GIVEN = (
    GivenDevice(name="pci_0000_65_00_1", kind=DeviceKind.PCI, address="0000:65:00.1"),
    GivenDevice(name="usb_1_1_4", kind=DeviceKind.USB, address="1.9"),
    GivenDevice(name="scsi_2_0_0_3", kind=DeviceKind.SCSI, address="2:0:0:3"),
    GivenDevice(name=GPU, kind=DeviceKind.MDEV, mdev_type="nvidia-11", api="vfio-pci", number=0),
    GivenDevice(name=GPU, kind=DeviceKind.MDEV, mdev_type="nvidia-11", api="vfio-pci", number=1),
)


@pytest.mark.parametrize("domain_type", ["test", "qemu"])
def test_a_domains_xml_names_its_devices_and_libvirt_takes_it(domain_type: str) -> None:
    spec = tiny_spec(devices=GIVEN, name=f"t-devices-{domain_type}")
    xml = domain_xml(spec, Placement(1, 1), Machine(domain_type))
    root = runningxml.parsed(xml)
    assert [d.get("type") for d in root.findall("devices/hostdev")] == ["pci", "usb", "scsi", "mdev", "mdev"]
    assert {d.get("managed") for d in root.findall("devices/hostdev")[:3]} == {"yes"}
    uuids = [mdev_uuid(INSTALLATION, spec.vm_id, number) for number in (0, 1)]
    assert list(runningxml.hostdevs_of(root)) == ["0000:65:00.1", "1.9", "2:0:0:3", *uuids]

    if domain_type == "test":
        connection = libvirt.open("test:///default")
        domain = connection.defineXMLFlags(xml, libvirt.VIR_DOMAIN_DEFINE_VALIDATE)  # by libvirt's own schema
        assert list(runningxml.hostdevs_of(runningxml.parsed(domain.XMLDesc(0)))) == [
            "0000:65:00.1", "1.9", "2:0:0:3", *uuids,
        ]  # fmt: skip
        domain.undefine()
        connection.close()


def test_a_domain_without_devices_has_none_in_its_xml() -> None:
    assert "hostdev" not in domxml.domain_xml(tiny_spec(), Placement(1, 1), Machine())


def test_the_uuid_of_a_mediated_device_is_its_own_and_says_whose_it_is() -> None:
    made = {mdev_uuid(i, v, n) for i in ("a", "b") for v in ("vm-1", "vm-2") for n in range(3)}
    assert len(made) == 12
    assert all(str(UUID(uuid)) == uuid for uuid in made)
    assert sum(uuid.startswith(mdev_prefix("a")) for uuid in made) == 6


async def test_a_real_libvirt_tells_of_this_machines_devices(qemu: VmHost) -> None:
    devices, mdevs = await qemu.hypervisor.node_devices()
    there = {each.device.address for each in devices if each.device.kind is DeviceKind.PCI}
    on_the_bus = {entry.name for entry in Path("/sys/bus/pci/devices").iterdir()}
    assert there == on_the_bus
    assert mdevs == []
    told = await host_devices.describe(qemu.host)
    assert {device.name for device in told} < {each.device.name for each in devices}
    assert not any(device.class_code.startswith("06") for device in told)
    if not any(Path("/sys/kernel/iommu_groups").glob("*")):
        assert all(device.in_use for device in told if device.kind is DeviceKind.PCI)


async def test_a_libvirt_that_can_make_no_mediated_device_says_so_and_no_domain_is_made(qemu: VmHost) -> None:
    spec = tiny_spec(devices=GIVEN[3:])
    with pytest.raises(Refused) as refused:
        await qemu.run(spec)
    assert "could not make a mediated device" in refused.value.message
    assert all(domain.vm_id != spec.vm_id for domain in await qemu.hypervisor.list_domains())


# Mediated devices as long as VMs have them.


def divided(case: Callable[[VmHost, DividingDaemon], object], path: Path) -> None:
    """Plays a case on a machine in memory whose GPU can be divided into four."""
    loop = new_loop(600.0)

    async def main() -> None:
        daemon = DividingDaemon("here", guest_of=lambda vm_id: Guest(0.2))
        async with vm_host("qemu+sim://here", path, partial(MemoryHypervisor, daemon=daemon)) as vms:
            watching = asyncio.create_task(host_devices.watch(vms.host))
            try:
                await case(vms, daemon)
            finally:
                watching.cancel()
                await asyncio.gather(watching, return_exceptions=True)

    loop.run(main())
    assert not loop.failed


def with_mdevs(count: int, **fields: object) -> DomainSpec:
    devices = tuple(replace(GIVEN[3], number=number) for number in range(count))
    return tiny_spec(devices=devices, **fields)


def uuids_of(spec: DomainSpec) -> set[str]:
    return {mdev_uuid(INSTALLATION, spec.vm_id, device.number) for device in spec.devices}


async def _made(host: Host) -> int:
    (gpu,) = await host_devices.describe(host)
    return gpu.mdev_types[0].made


def test_instances_come_with_a_vm_and_go_with_it(tmp_path: Path) -> None:
    async def case(vms: VmHost, daemon: DividingDaemon) -> None:
        first, second = with_mdevs(2), with_mdevs(1)
        await vms.run(first)
        assert daemon.uuids() == uuids_of(first)
        await vms.run(second)
        assert await _made(vms.host) == 3
        await vms.run(first, epoch=2, order_seq=2)  # a repeat finds them
        assert daemon.uuids() == uuids_of(first) | uuids_of(second)
        await vms.power_off(first.vm_id)
        await asyncio.sleep(1)
        assert daemon.uuids() == uuids_of(second)
        await vms.power_off(second.vm_id)
        await asyncio.sleep(1)
        assert daemon.uuids() == set()

    divided(case, tmp_path)


def test_a_vm_that_can_not_have_all_leaves_none(tmp_path: Path) -> None:
    async def case(vms: VmHost, daemon: DividingDaemon) -> None:
        await vms.run(with_mdevs(3))
        before = daemon.uuids()
        late = with_mdevs(2)
        with pytest.raises(Refused) as refused:
            await vms.run(late)
        assert refused.value.kind is Kind.CONFLICT
        assert "No space left" in refused.value.message
        assert daemon.uuids() == before

    divided(case, tmp_path)


def test_what_an_agent_that_died_left_is_taken_away_and_others_are_left(tmp_path: Path) -> None:
    async def case(vms: VmHost, daemon: DividingDaemon) -> None:
        strangers = str(UUID(new_uuid()))
        other = mdev_uuid("another", new_uuid(), 0)
        left = mdev_uuid(INSTALLATION, new_uuid(), 0)
        for uuid in (strangers, other, left):
            daemon.nodeDeviceCreateXML(
                f"<device><parent>{GPU}</parent><capability><type id='nvidia-11'/><uuid>{uuid}</uuid></capability></device>",
                0,
            )
        await host_devices.settle(vms.host)
        assert daemon.uuids() == {strangers, other}

    divided(case, tmp_path)


def test_what_could_not_be_taken_away_is_tried_again(tmp_path: Path) -> None:
    async def case(vms: VmHost, daemon: DividingDaemon) -> None:
        spec = with_mdevs(1)
        await vms.run(spec)
        daemon.stubborn = True
        await vms.power_off(spec.vm_id)
        await asyncio.sleep(1)
        assert daemon.uuids() == uuids_of(spec)
        daemon.stubborn = False
        await asyncio.sleep(host_devices.AGAIN_SECONDS + 1)
        assert daemon.uuids() == set()

    divided(case, tmp_path)


def test_a_host_whose_libvirt_lists_no_devices_tells_those_that_it_told_last(tmp_path: Path) -> None:
    async def case(vms: VmHost, daemon: DividingDaemon) -> None:
        before = await host_devices.describe(vms.host)
        assert [device.name for device in before] == [GPU]
        daemon.deaf = True
        assert await host_devices.describe(vms.host) == before
        daemon.up = False
        with pytest.raises(Disconnected):
            await host_devices.describe(vms.host)
        daemon.up = True

    divided(case, tmp_path)


def test_a_look_while_a_vm_is_being_made_spares_its_instances(tmp_path: Path) -> None:
    async def case(vms: VmHost, daemon: DividingDaemon) -> None:
        specs = [with_mdevs(1) for _ in range(4)]
        starts = [asyncio.create_task(vms.run(spec)) for spec in specs]
        for _ in range(40):
            await host_devices.settle(vms.host)
            await asyncio.sleep(0.01)
        await asyncio.gather(*starts)
        assert len(daemon.uuids()) == 4

    divided(case, tmp_path)


def test_xml_of_devices_is_well_formed_whatever_their_names() -> None:
    spec = tiny_spec(devices=GIVEN)
    again = ET.fromstring(domain_xml(spec, Placement(1, 1), Machine()))
    aliases = [alias.get("name", "") for alias in again.findall("devices/hostdev/alias")]
    assert len(set(aliases)) == len(GIVEN)
