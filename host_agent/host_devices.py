"""Devices of this host that VMs have for themselves: what there is, and mediated ones for as long as a VM has them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from host_agent import host_uses
from host_agent.action import Host
from host_agent.events import EventName, HypervisorEvent
from host_agent.node_xml import assignable, mdev_xml
from host_agent.refusals import Disconnected
from volery.contracts.domain import DomainSpec, DomainState
from volery.contracts.errors import Refused
from volery.contracts.host_devices import DeviceKind, HostDevice, mdev_prefix, mdev_uuid

log = logging.getLogger("volery.agent.devices")

AGAIN_SECONDS = 30.0
"""After a mediated device could not be taken away."""


async def describe(host: Host) -> tuple[HostDevice, ...]:
    """The host's devices that VMs could have. Where libvirt's part for devices doesn't answer, as they were told last: a host
    is no less a host for that."""
    room = host.hypervisor.mdevs
    try:
        room.told = await _describe(host)
    except Disconnected:
        raise
    except Refused as problem:
        log.warning("which devices this host has could not be seen: %s", problem.message)
    return room.told


async def _describe(host: Host) -> tuple[HostDevice, ...]:
    devices, mdevs = await host.hypervisor.node_devices()
    if not devices:
        return ()
    uses = await asyncio.to_thread(host_uses.find)
    others = {
        address: each.name
        for each in await host.hypervisor.hostdev_uses()
        if not each.installation
        for address in each.addresses
    }
    made = mdev_prefix(host.config.installation)
    return assignable(devices, mdevs, uses, made=made, others=others)


@asynccontextmanager
async def made(host: Host, spec: DomainSpec) -> AsyncIterator[None]:
    """While a domain is made: its mediated devices are there, and go again when it doesn't come."""
    wanted = {
        mdev_uuid(spec.installation, spec.vm_id, device.number): device
        for device in spec.devices
        if device.kind is DeviceKind.MDEV
    }
    if not wanted:
        yield
        return
    room = host.hypervisor.mdevs
    room.some = True
    room.beginning |= wanted.keys()
    try:
        async with room.turn:
            _, there = await host.hypervisor.node_devices()
            for uuid in sorted(wanted.keys() - {mdev.uuid for mdev in there}):
                await host.hypervisor.make_mdev(mdev_xml(wanted[uuid], uuid))
        yield
    except BaseException:  # also when it is cancelled: what was made for a VM that never ran must not stay
        room.beginning -= wanted.keys()
        await _try(host)
        raise
    room.beginning -= wanted.keys()


async def watch(host: Host) -> None:
    """For as long as the agent lives: what an ended VM had of divided devices is given back."""
    again = not await _try(host)
    with host.hypervisor.events() as events:
        while True:
            try:
                async with asyncio.timeout(AGAIN_SECONDS if again else None):
                    event = await events.get()
            except TimeoutError:
                again = not await _try(host)
                continue
            if host.hypervisor.mdevs.some and _matters(event):
                again = not await _try(host)


def _matters(event: HypervisorEvent) -> bool:
    return event.name is EventName.CONNECTED or event.state is DomainState.GONE


async def settle(host: Host) -> None:
    """Mediated devices that this Volery made and no domain has, or is about to have, are taken away."""
    hypervisor, room = host.hypervisor, host.hypervisor.mdevs
    made_here = mdev_prefix(host.config.installation)
    async with room.turn:
        _, mdevs = await hypervisor.node_devices()
        ours = [mdev for mdev in mdevs if mdev.uuid.startswith(made_here)]
        room.some = bool(ours or room.beginning)
        # Who is being made is asked first: one that has come meanwhile is among the domains.
        spared = frozenset(room.beginning)
        uses = await hypervisor.hostdev_uses() if ours else []
        spared = spared.union(*(each.addresses for each in uses))
        for mdev in ours:
            if mdev.uuid not in spared:
                await hypervisor.take_mdev(mdev.name)
                log.info("mediated device %s is nobody's any more, and was taken away", mdev.name)


async def _try(host: Host) -> bool:
    try:
        await settle(host)
    except Refused as problem:
        log.warning("mediated devices of VMs that ended may be left: %s", problem.message)
        return False
    return True
