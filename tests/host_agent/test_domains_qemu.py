"""Orders on domains, on a real QEMU: begin, end, devices, and what happens when things die."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from host_agent import qemu_processes, runningxml
from host_agent.events import EventName
from tests.support.libvirt_host import LibvirtHost
from tests.support.vms import VmHost, new_uuid, nic, qcow2_disk, tiny_spec
from volery.contracts.base import Done
from volery.contracts.domain import (
    DiskBus,
    DomainDisk,
    DomainState,
    FileSource,
    ImageFormat,
    IscsiSource,
    NicModel,
)
from volery.contracts.domain_orders import (
    ACT_ON_DOMAIN,
    ATTACH_DISK,
    ATTACH_NIC,
    CHANGE_MEDIA,
    DETACH_DISK,
    DETACH_NIC,
    RESIZE_DOMAIN_DISK,
    STOP_DOMAIN,
    UPDATE_NIC,
    ActOnDomain,
    AttachDisk,
    AttachNic,
    ChangeMedia,
    DetachDisk,
    DetachNic,
    DomainAction,
    ResizeDomainDisk,
    StopDomain,
    StopMethod,
    UpdateNic,
)
from volery.contracts.errors import Kind, Refused
from volery.contracts.leases import IMAGE_HELD

pytestmark = pytest.mark.timeout(180)


async def test_a_full_vm_starts_once_and_stops_by_its_guest(qemu: VmHost, tmp_path: Path) -> None:
    spec = tiny_spec(
        disks=(
            qcow2_disk(tmp_path, "vda", boot_order=1),
            qcow2_disk(tmp_path, "sdb", bus=DiskBus.VIRTIO_SCSI, shared_storage=True),
            qcow2_disk(tmp_path, "sdc", bus=DiskBus.SATA, read_only=False),
            DomainDisk(disk_id=new_uuid(), cdrom=True, target="sda"),
        ),
        nics=(nic("br-one"), nic("", link_up=False), nic("br-one", model=NicModel.E1000E, mtu=1400)),
        vcpus=2,
        sockets=1,
        cores=2,
        threads=1,
        graphics=True,
        watchdog_action="reset",
        boot_menu=True,
    )
    first = await qemu.run(spec)
    again = await qemu.run(spec)
    assert first == again
    assert first.state is DomainState.RUNNING
    assert first.graphics_port >= 5900
    await qemu.agent_up(spec.vm_id)

    (report,) = [d for d in await qemu.hypervisor.list_domains() if d.vm_id == spec.vm_id]
    assert (report.epoch, report.order_seq, report.installation) == (1, 1, "testing")
    assert set(report.disk_ids) == {d.disk_id for d in spec.disks}
    assert set(report.nic_ids) == {n.nic_id for n in spec.nics}
    assert report.agent_connected
    assert report.memory_bytes == spec.memory_bytes
    info = await qemu.hypervisor.guest_info(spec.vm_id)
    assert info.hostname == spec.hostname

    stopped = await qemu.order(STOP_DOMAIN, StopDomain(vm_id=spec.vm_id, wait_seconds=30))
    assert stopped.method is StopMethod.GUEST_AGENT
    assert (await qemu.hypervisor.domain(spec.vm_id)).state is DomainState.GONE
    assert (await qemu.order(STOP_DOMAIN, StopDomain(vm_id=spec.vm_id))).method is None


async def test_a_qemu_says_by_its_command_line_which_devices_it_was_started_with(
    qemu: VmHost, libvirt_host: LibvirtHost, tmp_path: Path
) -> None:
    disks = (
        qcow2_disk(tmp_path, "vda"),
        qcow2_disk(tmp_path, "sdb", bus=DiskBus.VIRTIO_SCSI),
        DomainDisk(disk_id="cdrom-sda", cdrom=True, target="sda"),
    )
    spec = tiny_spec(disks=disks, nics=(nic("br-one"), nic("")))
    await qemu.run(spec)
    report = await qemu.hypervisor.domain(spec.vm_id)
    found = qemu_processes.devices(libvirt_host.qemu(spec.vm_id))
    assert [set(ids) for ids in found] == [set(report.disk_ids), set(report.nic_ids)]
    assert set(report.disk_ids) == {disk.disk_id for disk in disks}


async def test_a_disk_that_another_program_has_locked_is_refused_until_it_ends(
    qemu: VmHost, tmp_path: Path
) -> None:
    """As after the death of another NFS client, whose locks the server keeps for a while: nothing is left behind."""
    disk = qcow2_disk(tmp_path, "vda")
    first, second = tiny_spec(disks=(disk,)), tiny_spec(disks=(disk,))
    await qemu.run(first)
    with pytest.raises(Refused, match="another QEMU program has locked the image") as refusal:
        await qemu.run(second)
    assert (refusal.value.kind, refusal.value.details["rule"]) == (Kind.CONFLICT, IMAGE_HELD)
    assert isinstance(disk.source, FileSource)
    assert disk.source.path in refusal.value.message
    assert (await qemu.hypervisor.domain(second.vm_id)).state is DomainState.GONE
    await qemu.order(STOP_DOMAIN, StopDomain(vm_id=first.vm_id, methods=(StopMethod.DESTROY,)))
    assert (await qemu.run(second)).state is DomainState.RUNNING


async def test_stop_escalates_from_a_silent_agent_to_the_power_button(qemu: VmHost) -> None:
    spec = tiny_spec()
    await qemu.run(spec)
    console = await qemu.hypervisor.open_console(spec.vm_id)
    heard = b""
    async with asyncio.timeout(60):
        while b"TICK" not in heard:
            heard += await console.read()
        await console.write(b"killall qemu-ga; rm /bin/qemu-ga\n")
    await console.close()
    await qemu.until(
        lambda e: e.details.get("state") == "disconnected" and e.details.get("reason") == "channel"
    )
    stopped = await qemu.order(STOP_DOMAIN, StopDomain(vm_id=spec.vm_id, wait_seconds=20))
    assert stopped.method is StopMethod.ACPI


async def test_a_guest_that_ignores_everything_goes_on_and_the_refusal_says_why(qemu: VmHost) -> None:
    spec = tiny_spec(
        kernel_path="", initrd_path="", kernel_cmdline=""
    )  # nothing to boot: stays in the firmware
    await qemu.run(spec)
    with pytest.raises(Refused) as refusal:
        await qemu.order(STOP_DOMAIN, StopDomain(vm_id=spec.vm_id, wait_seconds=1))
    assert refusal.value.kind is Kind.TIMEOUT
    assert "guest agent:" in refusal.value.message
    assert "power it off" in refusal.value.message
    assert (await qemu.hypervisor.domain(spec.vm_id)).state is DomainState.RUNNING
    methods = (StopMethod.ACPI, StopMethod.DESTROY)
    stopped = await qemu.order(STOP_DOMAIN, StopDomain(vm_id=spec.vm_id, methods=methods, wait_seconds=1))
    assert stopped.method is StopMethod.DESTROY


async def test_a_qemu_that_dies_is_heard_within_a_second(qemu: VmHost, libvirt_host: LibvirtHost) -> None:
    spec = tiny_spec()
    await qemu.run(spec)
    began = time.monotonic()
    os.kill(libvirt_host.qemu(spec.vm_id), signal.SIGKILL)
    event = await qemu.until(lambda e: e.state is DomainState.GONE, 5)
    assert time.monotonic() - began < 1.0
    assert event.details == {"event": "stopped", "reason": "crashed"} or event.details["reason"] == "failed"


async def test_a_guest_that_panics_is_crashed(qemu: VmHost) -> None:
    spec = tiny_spec()
    await qemu.run(spec)
    await qemu.agent_up(spec.vm_id)
    console = await qemu.hypervisor.open_console(spec.vm_id)
    await console.write(b"\necho c > /proc/sysrq-trigger\n")
    panic = await qemu.until(lambda e: e.name is EventName.PANIC)
    assert panic.happened
    assert panic.details["reason"] == "panicked"
    ended = await qemu.until(lambda e: e.state is DomainState.GONE)
    assert ended.details["reason"] == "crashed"
    await console.close()


async def test_act_is_level_triggered_and_refuses_what_is_not_here(qemu: VmHost) -> None:
    spec = tiny_spec(cpu_model="qemu64", max_memory_bytes=1 << 30, machine="q35")
    await qemu.run(spec)
    for action, state in (
        (DomainAction.PAUSE, DomainState.PAUSED),
        (DomainAction.PAUSE, DomainState.PAUSED),
        (DomainAction.RESUME, DomainState.RUNNING),
        (DomainAction.RESUME, DomainState.RUNNING),
        (DomainAction.RESET, DomainState.RUNNING),
        (DomainAction.REBOOT, DomainState.RUNNING),
    ):
        assert await qemu.order(ACT_ON_DOMAIN, ActOnDomain(vm_id=spec.vm_id, action=action)) == Done()
        assert (await qemu.hypervisor.domain(spec.vm_id)).state is state
    await qemu.until(lambda e: e.name is EventName.REBOOT)
    with pytest.raises(Refused) as refusal:
        await qemu.order(ACT_ON_DOMAIN, ActOnDomain(vm_id=new_uuid(), action=DomainAction.RESET))
    assert refusal.value.kind is Kind.CONFLICT
    assert "start it first" in refusal.value.message


async def test_disks_and_nics_come_and_go_while_it_runs(qemu: VmHost, tmp_path: Path) -> None:
    spec = tiny_spec(nics=(nic("br-one"),))
    await qemu.run(spec)
    await qemu.agent_up(spec.vm_id)
    disk, scsi = qcow2_disk(tmp_path, "vdb"), qcow2_disk(tmp_path, "sdb", bus=DiskBus.VIRTIO_SCSI)
    extra = nic("br-two")
    for _ in range(2):
        await qemu.order(ATTACH_DISK, AttachDisk(vm_id=spec.vm_id, disk=disk))
        await qemu.order(ATTACH_DISK, AttachDisk(vm_id=spec.vm_id, disk=scsi))
        await qemu.order(ATTACH_NIC, AttachNic(vm_id=spec.vm_id, nic=extra))
    report = await qemu.hypervisor.domain(spec.vm_id)
    assert set(report.disk_ids) == {disk.disk_id, scsi.disk_id}
    assert extra.nic_id in report.nic_ids

    size = 128 << 20
    for _ in range(2):
        await qemu.order(
            RESIZE_DOMAIN_DISK,
            ResizeDomainDisk(vm_id=spec.vm_id, disk_id=disk.disk_id, size_bytes=size),
        )
    assert await qemu.hypervisor.block_size(spec.vm_id, "vdb") == size
    smaller = ResizeDomainDisk(vm_id=spec.vm_id, disk_id=disk.disk_id, size_bytes=1 << 20)
    with pytest.raises(Refused, match="can't shrink"):
        await qemu.order(RESIZE_DOMAIN_DISK, smaller)

    for _ in range(2):
        await qemu.order(DETACH_DISK, DetachDisk(vm_id=spec.vm_id, disk_id=disk.disk_id))
        await qemu.order(DETACH_DISK, DetachDisk(vm_id=spec.vm_id, disk_id=scsi.disk_id))
        await qemu.order(DETACH_NIC, DetachNic(vm_id=spec.vm_id, nic_id=extra.nic_id))
    report = await qemu.hypervisor.domain(spec.vm_id)
    assert report.disk_ids == ()
    assert report.nic_ids == (spec.nics[0].nic_id,)


async def test_a_guest_that_does_not_let_go_keeps_its_disk(qemu: VmHost, tmp_path: Path) -> None:
    disk = qcow2_disk(tmp_path)
    spec = tiny_spec(kernel_path="", initrd_path="", kernel_cmdline="", disks=(disk,))
    await qemu.run(spec)
    with pytest.raises(Refused) as refusal:
        await qemu.order(DETACH_DISK, DetachDisk(vm_id=spec.vm_id, disk_id=disk.disk_id, wait_seconds=1))
    assert refusal.value.kind in (Kind.TIMEOUT, Kind.CONFLICT)
    assert "unmount" in refusal.value.message
    assert (await qemu.hypervisor.domain(spec.vm_id)).disk_ids == (disk.disk_id,)


async def test_a_new_libvirtd_is_no_word_from_the_guest(
    qemu: VmHost, libvirt_host: LibvirtHost, tmp_path: Path
) -> None:
    disk = qcow2_disk(tmp_path)
    spec = tiny_spec(kernel_path="", initrd_path="", kernel_cmdline="", disks=(disk,))
    await qemu.run(spec)
    unplug = DetachDisk(vm_id=spec.vm_id, disk_id=disk.disk_id, wait_seconds=6)
    order = asyncio.create_task(qemu.order(DETACH_DISK, unplug))
    await asyncio.sleep(1)  # libvirt asks the guest, and tells nobody
    await asyncio.to_thread(libvirt_host.kill_daemon)
    await asyncio.to_thread(libvirt_host.start_daemon)
    with pytest.raises(Refused) as refusal:
        await order
    assert refusal.value.kind in (Kind.TIMEOUT, Kind.CONFLICT)
    assert (await qemu.hypervisor.domain(spec.vm_id)).disk_ids == (disk.disk_id,)


async def test_media_change_and_eject_while_the_guest_runs(qemu: VmHost, tmp_path: Path) -> None:
    drive = DomainDisk(disk_id=new_uuid(), cdrom=True, target="sda")
    spec = tiny_spec(disks=(drive,))
    await qemu.run(spec)
    await qemu.agent_up(spec.vm_id)
    for letter in "ab":
        image = tmp_path / f"{letter}.iso"
        subprocess.run(["mkfs.ext4", "-q", "-F", image, "1M"], check=True)
        source = FileSource(path=str(image), format=ImageFormat.RAW)
        for _ in range(2):
            await qemu.order(
                CHANGE_MEDIA, ChangeMedia(vm_id=spec.vm_id, disk_id=drive.disk_id, source=source)
            )
        assert await _medium(qemu, spec.vm_id, drive.disk_id) == str(image)
    for _ in range(2):
        await qemu.order(CHANGE_MEDIA, ChangeMedia(vm_id=spec.vm_id, disk_id=drive.disk_id))
    assert await _medium(qemu, spec.vm_id, drive.disk_id) is None


async def _medium(qemu: VmHost, vm_id: str, disk_id: str) -> str | None:
    root = runningxml.parsed(await qemu.hypervisor.domain_xml(vm_id))
    source = runningxml.disks_of(root)[disk_id].element.find("source")
    return source.get("file") if source is not None else None


async def test_a_nic_changes_its_bridge_and_link(qemu: VmHost) -> None:
    spec = tiny_spec(nics=(nic("br-one"), nic("")))
    await qemu.run(spec)
    plugged, loose = spec.nics
    for bridge, up in (("br-two", True), ("br-two", False), ("br-one", True)):
        changed = nic(bridge, link_up=up)
        changed = type(changed)(nic_id=plugged.nic_id, mac=plugged.mac, bridge=bridge, link_up=up)
        for _ in range(2):
            assert await qemu.order(UPDATE_NIC, UpdateNic(vm_id=spec.vm_id, nic=changed)) == Done()
        root = runningxml.parsed(await qemu.hypervisor.domain_xml(spec.vm_id))
        element = runningxml.nics_of(root)[plugged.nic_id].element
        assert element.find("source").get("bridge") == bridge  # type: ignore[union-attr]
        link = element.find("link")
        assert (link is None or link.get("state") == "up") is up
    await qemu.agent_up(spec.vm_id)
    for bridge in ("br-one", ""):
        replugged = type(loose)(nic_id=loose.nic_id, mac=loose.mac, bridge=bridge)
        await qemu.order(UPDATE_NIC, UpdateNic(vm_id=spec.vm_id, nic=replugged))
        root = runningxml.parsed(await qemu.hypervisor.domain_xml(spec.vm_id))
        assert runningxml.is_plugged(runningxml.nics_of(root)[loose.nic_id].element) is bool(bridge)


async def test_iscsi_disks_with_chap_are_reached_by_qemu_alone(
    qemu: VmHost, libvirt_host: LibvirtHost
) -> None:
    iqn, password = "iqn.2026-11.test.volery:chap", "chap-password-1"
    portal = libvirt_host.iscsi_target(iqn, "volery", password, 32 << 20)

    def disk(secret: str, target: str) -> DomainDisk:
        source = IscsiSource(portal=portal, iqn=iqn, lun=1, chap_user="volery", chap_password=secret)
        return DomainDisk(disk_id=new_uuid(), source=source, target=target, shared_storage=True)

    wrong = tiny_spec(disks=(disk("not-the-password", "vda"),))
    with pytest.raises(Refused) as refusal:
        await qemu.run(wrong)
    assert "not-the-password" not in refusal.value.message
    assert (await qemu.hypervisor.domain(wrong.vm_id)).state is DomainState.GONE

    spec = tiny_spec(disks=(disk(password, "vda"),))
    await qemu.run(spec)
    assert await qemu.hypervisor.block_size(spec.vm_id, "vda") == 32 << 20
    assert password not in await qemu.hypervisor.domain_xml(spec.vm_id)
    process = libvirt_host.qemu(spec.vm_id)
    assert password not in Path(f"/proc/{process}/cmdline").read_text()
    await qemu.power_off(spec.vm_id)

    plugged = tiny_spec()
    await qemu.run(plugged)
    await qemu.agent_up(plugged.vm_id)
    extra = disk(password, "vdb")
    await qemu.order(ATTACH_DISK, AttachDisk(vm_id=plugged.vm_id, disk=extra))
    assert (await qemu.hypervisor.domain(plugged.vm_id)).disk_ids == (extra.disk_id,)
    await qemu.order(DETACH_DISK, DetachDisk(vm_id=plugged.vm_id, disk_id=extra.disk_id))
