"""A VM that runs goes on in volumes that were made above its own: all disks at one point in time, or none."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Mapping

from host_agent import chains, devices, runningxml
from host_agent.action import Action, Host, Running, whole
from host_agent.domain_waits import settled
from host_agent.domxml import written
from volery.contracts.base import Done
from volery.contracts.domain import DomainDisk
from volery.contracts.domain_orders import NOT_SWITCHED, SWITCH_DISKS, SwitchDisks, SwitchedDisk
from volery.contracts.errors import Kind, Refused, conflict, not_found


async def switch(host: Host, order: SwitchDisks, running: Running) -> Done:
    """Looks first, and again after libvirt has refused: a repeat does no harm, and a refusal says what is certain."""
    root, _ = await devices.running_domain(host, order.vm_id, running)
    wanted = {disk.disk_id: disk for disk in order.disks}
    after = {disk.disk_id: disk.source.path for disk in order.disks}
    if _writes(root, order) == after:
        return Done()
    try:
        _refuse_others(root, order)
        await chains.check_disks(
            host.config, [DomainDisk(disk_id=disk.disk_id, source=disk.source) for disk in order.disks]
        )
    except Refused as refused:
        raise Refused(refused.kind, refused.message, **refused.details | {"rule": NOT_SWITCHED}) from refused
    before = _writes(root, order)
    targets = {device.target: wanted.get(ident) for ident, device in runningxml.disks_of(root).items()}
    try:
        await host.hypervisor.snapshot_disks(order.vm_id, _snapshot_xml(root, targets))
    except Refused as refused:
        now = _writes((await devices.running_domain(host, order.vm_id, running))[0], order)
        if now == after:
            return Done()
        if now == before:
            details = refused.details | {"rule": NOT_SWITCHED}
            raise Refused(refused.kind, refused.message, **details) from refused
        raise Refused(
            Kind.INTERNAL,
            f"some disks of VM {order.vm_id} go on in new volumes and others don't: {refused.message}",
        ) from refused
    return Done()


def _writes(root: ET.Element, order: SwitchDisks) -> dict[str, str]:
    """Where these disks are written, by disk."""
    has = runningxml.disks_of(root)
    found = {}
    for disk in order.disks:
        if disk.disk_id not in has:
            raise not_found("disk", disk.disk_id)
        source = has[disk.disk_id].element.find("source")
        found[disk.disk_id] = "" if source is None else source.get("file", "")
    return found


def _refuse_others(root: ET.Element, order: SwitchDisks) -> None:
    """Raises Refused unless each disk is written right below its new volume."""
    now = _writes(root, order)
    for disk in order.disks:
        if now[disk.disk_id] != disk.source.backing[0].path:
            raise conflict(
                f"disk {disk.disk_id} of VM {order.vm_id} is written to {now[disk.disk_id]}, and its new volume is above "
                f"{disk.source.backing[0].path}",
                disk_id=disk.disk_id,
            )


def _snapshot_xml(root: ET.Element, targets: Mapping[str, SwitchedDisk | None]) -> str:
    """Every disk is named, so that libvirt does nothing to those that aren't meant."""
    made = ET.Element("domainsnapshot")
    disks = ET.SubElement(made, "disks")
    for target in root.iterfind("devices/disk/target"):
        name = target.get("dev", "")
        disk = targets.get(name)
        if disk is None:
            ET.SubElement(disks, "disk", name=name, snapshot="no")
            continue
        element = ET.SubElement(disks, "disk", name=name, snapshot="external", type="file")
        ET.SubElement(element, "driver", type=disk.source.format)
        ET.SubElement(element, "source", file=disk.source.path)
    return written(made)


ACTIONS = (Action(SWITCH_DISKS, settled(whole(switch))),)
