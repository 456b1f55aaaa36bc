"""Orders about single devices of a running domain: disks, CD media, NICs."""

from __future__ import annotations

import copy
import xml.etree.ElementTree as ET
from typing import Any

from host_agent import chains, domxml, runningxml
from host_agent.action import Action, Host, Running, whole
from host_agent.domain_waits import settled, wait_removed
from host_agent.events import EventName
from host_agent.refusals import LibvirtError, is_libvirt
from volery.contracts.base import Done
from volery.contracts.domain import DomainDisk, DomainState, IscsiSource
from volery.contracts.domain_orders import (
    ATTACH_DISK,
    ATTACH_NIC,
    CHANGE_MEDIA,
    DETACH_DISK,
    DETACH_NIC,
    RESIZE_DOMAIN_DISK,
    UPDATE_NIC,
    AttachDisk,
    AttachNic,
    ChangeMedia,
    DetachDisk,
    DetachNic,
    ResizeDomainDisk,
    UpdateNic,
)
from volery.contracts.errors import Kind, Refused, conflict, invalid, not_found

REPLUG_SECONDS = 30.0


async def prepare(host: Host, disks: tuple[DomainDisk, ...], installation: str) -> None:
    """Before QEMU opens disks: the files below them are the right ones, and CHAP passwords are in libvirtd's memory, where
    QEMU gets them from."""
    await chains.check_disks(host.config, disks)
    for disk in disks:
        source = disk.source
        if isinstance(source, IscsiSource) and source.chap_user:
            xml = domxml.secret_xml(source, installation)
            await host.hypervisor.put_secret(xml, source.chap_password)


async def running_domain(host: Host, vm_id: str, running: Running) -> tuple[ET.Element, str]:
    """The running domain's XML, and the installation that made it."""
    now = await host.hypervisor.domain(vm_id)
    if now.state in (DomainState.GONE, DomainState.SHUTOFF, DomainState.INCOMING):
        raise conflict(
            f"VM {vm_id} is {now.state.value} on this host: its devices can be changed when it runs here",
            vm_id=vm_id,
        )
    if not now.installation or now.epoch > running.epoch:
        raise Refused(
            Kind.STALE,
            f"VM {vm_id} is here with epoch {now.epoch}, but the order is for epoch {running.epoch}: ask for the"
            " VM's state",
            vm_id=vm_id,
        )
    return runningxml.parsed(await host.hypervisor.domain_xml(vm_id)), now.installation


async def attach_disk(host: Host, order: AttachDisk, running: Running) -> Done:
    root, installation = await running_domain(host, order.vm_id, running)
    if order.disk.disk_id not in runningxml.disks_of(root):
        await prepare(host, (order.disk,), installation)
        await host.hypervisor.attach_device(order.vm_id, domxml.disk_xml(order.disk, installation))
    return Done()


async def attach_nic(host: Host, order: AttachNic, running: Running) -> Done:
    root, _ = await running_domain(host, order.vm_id, running)
    if order.nic.nic_id not in runningxml.nics_of(root):
        await host.hypervisor.attach_device(order.vm_id, domxml.nic_xml(order.nic))
    return Done()


async def detach_disk(host: Host, order: DetachDisk, running: Running) -> Done:
    root, _ = await running_domain(host, order.vm_id, running)
    if order.disk_id in runningxml.disks_of(root):
        await _detach(host, order.vm_id, order.disk_id, "disk", order.wait_seconds)
    return Done()


async def detach_nic(host: Host, order: DetachNic, running: Running) -> Done:
    root, _ = await running_domain(host, order.vm_id, running)
    if order.nic_id in runningxml.nics_of(root):
        await _detach(host, order.vm_id, order.nic_id, "NIC", order.wait_seconds)
    return Done()


async def _detach(host: Host, vm_id: str, ident: str, noun: str, seconds: float) -> None:
    """Ask the guest for the device and wait until it has let go."""
    alias = domxml.ALIAS + ident
    with host.hypervisor.events() as events:
        try:
            await host.hypervisor.detach_device(vm_id, alias)
        except Refused as problem:
            if is_libvirt(problem, LibvirtError.DEVICE_MISSING, LibvirtError.NO_DOMAIN):
                return
            if "in the process of unplug" not in problem.message:
                raise
        outcome = await wait_removed(host.hypervisor, events, vm_id, alias, seconds)
    if outcome is EventName.DEVICE_REMOVED:
        return
    why = "refused to let go of" if outcome else f"did not let go of within {seconds:g} s:"
    raise Refused(
        Kind.CONFLICT if outcome else Kind.TIMEOUT,
        f"the guest of VM {vm_id} {why} {noun} {ident}; unmount or unconfigure it in the guest and try again, or shut"
        " the VM down",
        vm_id=vm_id,
    )


async def change_media(host: Host, order: ChangeMedia, running: Running) -> Done:
    root, installation = await running_domain(host, order.vm_id, running)
    drive = runningxml.disks_of(root).get(order.disk_id)
    if drive is None or drive.element.get("device") != "cdrom":
        raise not_found("CD drive", order.disk_id)
    bare = DomainDisk(disk_id=order.disk_id, source=order.source, cdrom=True, target=drive.target)
    await prepare(host, (bare,), installation)
    wanted = copy.deepcopy(drive.element)
    runningxml.put_medium(wanted, bare, installation)
    if runningxml.same_source(wanted, drive.element):
        return Done()
    xml = domxml.written(wanted)
    try:
        await host.hypervisor.update_device(order.vm_id, xml)
    except Refused as problem:
        if not is_libvirt(problem, LibvirtError.OPERATION_FAILED, LibvirtError.OPERATION_TIMEOUT):
            raise
        await host.hypervisor.update_device(order.vm_id, xml, force=True)  # the guest locked the tray
    return Done()


async def resize_disk(host: Host, order: ResizeDomainDisk, running: Running) -> Done:
    root, _ = await running_domain(host, order.vm_id, running)
    disk = runningxml.disks_of(root).get(order.disk_id)
    if disk is None:
        raise not_found("disk", order.disk_id)
    size = await host.hypervisor.block_size(order.vm_id, disk.target)
    if order.size_bytes < size:
        raise invalid(
            f"disk {order.disk_id} of VM {order.vm_id} has {size} bytes and can't shrink to {order.size_bytes}: its"
            " guest would lose data. Copy it to a smaller disk instead",
            size_bytes=size,
        )
    if order.size_bytes > size:
        await host.hypervisor.block_resize(order.vm_id, disk.target, order.size_bytes)
    return Done()


async def update_nic(host: Host, order: UpdateNic, running: Running) -> Done:
    root, _ = await running_domain(host, order.vm_id, running)
    found = runningxml.nics_of(root).get(order.nic.nic_id)
    if found is None:
        raise not_found("NIC", order.nic.nic_id)
    if runningxml.is_plugged(found.element) != bool(order.nic.bridge):
        # Into the first bridge, or out of the last: only as a new device with the same address.
        await _detach(host, order.vm_id, order.nic.nic_id, "NIC", REPLUG_SECONDS)
        await host.hypervisor.attach_device(order.vm_id, domxml.nic_xml(order.nic))
        return Done()
    wanted = copy.deepcopy(found.element)
    if runningxml.put_link(wanted, order.nic):
        await host.hypervisor.update_device(order.vm_id, domxml.written(wanted))
    return Done()


ACTIONS: tuple[Action[Any, Any], ...] = (
    Action(ATTACH_DISK, settled(whole(attach_disk))),
    Action(DETACH_DISK, settled(detach_disk)),
    Action(CHANGE_MEDIA, settled(whole(change_media))),
    Action(RESIZE_DOMAIN_DISK, settled(whole(resize_disk))),
    Action(ATTACH_NIC, settled(whole(attach_nic))),
    Action(UPDATE_NIC, settled(update_nic)),
    Action(DETACH_NIC, settled(detach_nic)),
)
