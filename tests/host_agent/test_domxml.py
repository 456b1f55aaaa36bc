"""Domain XML: golden files for whole domains, properties for hostile text, and what is read back."""

from __future__ import annotations

import os
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from host_agent import domxml, runningxml
from host_agent.domxml import Machine, Placement
from volery.contracts.domain import (
    DiskBus,
    DomainDisk,
    DomainLease,
    DomainNic,
    DomainSpec,
    DomainState,
    FileSource,
    ImageFormat,
    IscsiSource,
    NicModel,
)

GOLDEN = Path(__file__).parent / "golden"
VM = "0192f0c4-1111-7abc-8def-000000000001"
DISK = "0192f0c4-2222-7abc-8def-00000000000{}"
NIC = "0192f0c4-3333-7abc-8def-00000000000{}"
ISCSI = IscsiSource(
    portal="10.0.0.9:3260",
    iqn="iqn.2026-01.dev.volery:store",
    lun=4,
    chap_user="host-a",
    chap_password="twelve-chars",
)

SMALL = DomainSpec(
    vm_id=VM, name="web-0192", title='Web <1> & "co"', memory_bytes=1 << 30, installation="a1b2c3"
)
FULL = DomainSpec(
    vm_id=VM,
    name="db-0192",
    title="Datenbank\nzwei",
    memory_bytes=2 << 30,
    max_memory_bytes=8 << 30,
    hugepage_kib=2048,
    vcpus=4,
    sockets=2,
    cores=2,
    threads=1,
    cpu_model="EPYC",
    uefi=True,
    disks=(
        DomainDisk(
            disk_id=DISK.format(1),
            source=FileSource(path="/rhev/a b/&<disk>.qcow2", format=ImageFormat.QCOW2),
            target="vda",
            shared_storage=True,
            boot_order=1,
        ),
        DomainDisk(
            disk_id=DISK.format(2), source=ISCSI, target="sdb", bus=DiskBus.VIRTIO_SCSI, shareable=True
        ),
        DomainDisk(
            disk_id=DISK.format(3),
            source=FileSource(path="/iso/boot.iso", format=ImageFormat.RAW),
            cdrom=True,
            target="sda",
            boot_order=2,
        ),
        DomainDisk(disk_id=DISK.format(4), cdrom=True, bus=DiskBus.SATA, target="sdc"),
        DomainDisk(
            disk_id=DISK.format(5),
            source=FileSource(path="/data/ro.raw", format=ImageFormat.RAW),
            target="vdb",
            read_only=True,
        ),
    ),
    nics=(
        DomainNic(
            nic_id=NIC.format(1), mac="52:54:00:00:00:01", bridge="vl-a1b2c3-1", mtu=1450, boot_order=3
        ),
        DomainNic(nic_id=NIC.format(2), mac="52:54:00:00:00:02", model=NicModel.E1000E, link_up=False),
    ),
    hostname="db2",
    boot_menu=True,
    kernel_path="/boot/vmlinuz",
    initrd_path="/boot/initrd",
    kernel_cmdline="console=ttyS0 root=LABEL=<x>",
    watchdog_action="reset",
    installation="a1b2c3",
    lease=DomainLease(
        lockspace="0192f0c4-4444-7abc-8def-000000000001",
        key=VM,
        path=f"/data/0192f0c4-4444-7abc-8def-000000000001/leases/{VM}",
    ),
)


@pytest.mark.parametrize(
    ("name", "spec", "machine"),
    [
        ("small-tcg", SMALL, Machine("qemu")),
        ("full-kvm", FULL, Machine("kvm")),
        ("full-test", FULL, Machine("test")),
    ],
)
def test_whole_domains_are_as_they_were(name: str, spec: DomainSpec, machine: Machine) -> None:
    root = ET.fromstring(domxml.domain_xml(spec, Placement(7, 42), machine))
    ET.indent(root)
    made = ET.tostring(root, encoding="unicode") + "\n"
    golden = GOLDEN / f"{name}.xml"
    if os.environ.get("VOLERY_TEST_WRITE_GOLDEN"):
        golden.write_text(made)
    assert made == golden.read_text()


TEXT = st.text(max_size=60)
HOSTILE = st.one_of(
    TEXT,
    st.sampled_from(
        [
            "</title><devices/>",
            "]]>",
            "<!--",
            "&lt;",
            "&#0;",
            "'\"",
            "\x00\x1b[31m",
            "\ud800",
            "\ufffe",
            "{{7*7}}",
            "../../etc/shadow",
            "a\r\nb",
        ]
    ),
)


def _shape(element: ET.Element) -> list[object]:
    return [element.tag, [_shape(child) for child in element]]


@given(HOSTILE, HOSTILE, HOSTILE, HOSTILE, HOSTILE)
def test_hostile_text_stays_text(title: str, hostname: str, path: str, bridge: str, cmdline: str) -> None:
    def made(*texts: str) -> ET.Element:
        title, hostname, path, bridge, cmdline = texts
        spec = DomainSpec(
            vm_id=VM,
            name="n",
            title=title,
            memory_bytes=1 << 30,
            hostname=hostname,
            kernel_cmdline=cmdline,
            installation="i",
            disks=(
                DomainDisk(disk_id="d", target="vda", source=FileSource(path=path, format=ImageFormat.RAW)),
            ),
            nics=(DomainNic(nic_id="n", mac="52:54:00:00:00:01", bridge=bridge),),
        )
        return ET.fromstring(domxml.domain_xml(spec, Placement(1, 1), Machine()))

    plain = made(*("x" if text else "" for text in (title, hostname, path, bridge, cmdline)))
    assert _shape(made(title, hostname, path, bridge, cmdline)) == _shape(plain)


LEGAL = st.text(
    st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="\ufffe\uffff"), max_size=60
)


@given(LEGAL, st.integers(0, 2**53), st.integers(0, 2**53), st.from_regex(r"[0-9a-f]{6}", fullmatch=True))
def test_metadata_comes_back(title: str, epoch: int, order_seq: int, installation: str) -> None:
    spec = DomainSpec(vm_id=VM, name="n", title=title, memory_bytes=1 << 30, installation=installation)
    root = runningxml.parsed(domxml.domain_xml(spec, Placement(epoch, order_seq), Machine()))
    assert runningxml.metadata_of(root) == runningxml.DomainMetadata(installation, epoch, order_seq, title)
    moved = runningxml.parsed(runningxml.with_placement(root, Placement(epoch + 1, 3)))
    assert runningxml.metadata_of(moved) == runningxml.DomainMetadata(installation, epoch + 1, 3, title)


def test_a_strangers_domain_has_no_metadata_of_ours() -> None:
    root = runningxml.parsed("<domain><name>virsh-made</name><memory>1024</memory><vcpu>1</vcpu></domain>")
    assert runningxml.metadata_of(root) is None
    report = runningxml.report(root, VM, DomainState.RUNNING, "booted", responsive=True)
    assert (report.installation, report.epoch, report.disk_ids) == ("", 0, ())
    with pytest.raises(ValueError):
        runningxml.with_placement(root, Placement(1, 1))


def test_devices_are_found_by_alias() -> None:
    root = runningxml.parsed(domxml.domain_xml(FULL, Placement(7, 42), Machine("kvm")))
    assert list(runningxml.disks_of(root)) == [disk.disk_id for disk in FULL.disks]
    assert [d.target for d in runningxml.disks_of(root).values()] == ["vda", "sdb", "sda", "sdc", "vdb"]
    assert list(runningxml.nics_of(root)) == [nic.nic_id for nic in FULL.nics]


def test_the_chap_password_is_in_no_xml() -> None:
    texts = [
        domxml.domain_xml(FULL, Placement(1, 1), Machine("kvm")),
        domxml.disk_xml(FULL.disks[1], "a1b2c3"),
        domxml.secret_xml(ISCSI, "a1b2c3"),
    ]
    assert all(ISCSI.chap_password not in text for text in texts)
    assert domxml.secret_uuid(ISCSI, "a1b2c3") in texts[0]
    assert domxml.secret_uuid(ISCSI, "a1b2c3") != domxml.secret_uuid(ISCSI, "another")


def test_the_destinations_places_replace_the_sources() -> None:
    root = runningxml.parsed(domxml.domain_xml(FULL, Placement(1, 1), Machine("kvm")))
    moved = DomainDisk(
        disk_id=FULL.disks[0].disk_id,
        source=FileSource(path="/other/mount/d.qcow2", format=ImageFormat.QCOW2),
        target="vda",
        shared_storage=True,
    )
    nic = DomainNic(nic_id=FULL.nics[0].nic_id, mac=FULL.nics[0].mac, bridge="vl-other-1")
    runningxml.replace_sources(root, (moved,), (nic,), "a1b2c3")
    first = runningxml.disks_of(root)[moved.disk_id].element.find("source")
    assert first is not None
    assert first.get("file") == "/other/mount/d.qcow2"
    bridge = runningxml.nics_of(root)[nic.nic_id].element.find("source")
    assert bridge is not None
    assert bridge.get("bridge") == "vl-other-1"
