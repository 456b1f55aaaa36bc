"""Which devices a host has, and which VMs have them."""

from __future__ import annotations

from collections.abc import Iterator

from services.scheduler import device_store
from services.scheduler.device_store import Listed
from services.scheduler.policies.devices import HostState, read_devices
from services.scheduler.state import Scheduler
from volery.contracts.errors import not_found
from volery.contracts.host_devices import (
    LIST_HOST_DEVICES,
    AskHostDevices,
    DeviceUse,
    HostDevice,
    HostDevices,
)
from volery.runtime.bus import Caller
from volery.runtime.service import Part

part = Part()


@part.answers(LIST_HOST_DEVICES)
async def list_host_devices(scheduler: Scheduler, ask: AskHostDevices, caller: Caller) -> HostDevices:
    found = await device_store.listed(scheduler.core.pool, [ask.id])
    if ask.id in found:
        return HostDevices(host_id=ask.id, devices=tuple(_used(found[ask.id])))
    if ask.id not in scheduler.fleet.rows:
        raise not_found("host", ask.id)
    return HostDevices(host_id=ask.id)


def _used(listed: Listed) -> Iterator[DeviceUse]:
    held = listed.held
    host = HostState(read_devices(listed.devices), held.whole, held.parts)
    for device in host.devices:
        vm_ids = tuple(vm_id for vm_id, _ in held.holders.get(device.name, ()))
        yield DeviceUse(device=device, vm_ids=vm_ids, reason=_reason(host, device))


def _reason(host: HostState, device: HostDevice) -> str:
    if any(host.room_for(device, kind.id) for kind in device.mdev_types) or host.is_free(device):
        return ""
    if device.in_use:
        return device.in_use
    if host.obstacle(device) in ("held", "divided"):
        return "a VM has it" if device.name in host.whole else "VMs have all that it can be divided into"
    other = next(each for each in host.units[device.name] if host.obstacle(each))
    return f"{other.name} of its IOMMU group {device.iommu_group} can't be given"
