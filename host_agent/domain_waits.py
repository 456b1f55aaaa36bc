"""Waiting for what libvirt announces: a domain's end, a device's removal, libvirtd's return."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Awaitable, Callable
from typing import TypeVar

from host_agent import runningxml
from host_agent.action import Host, Running
from host_agent.events import EventName, HypervisorEvent
from host_agent.hypervisor import Hypervisor
from host_agent.refusals import Disconnected, LibvirtError, is_libvirt
from volery.contracts.base import Message
from volery.contracts.domain import DomainState
from volery.contracts.errors import Refused
from volery.runtime.clock import monotonic

Q = TypeVar("Q", bound=Message)
A = TypeVar("A")
ENDED = (DomainState.GONE, DomainState.SHUTOFF)


def settled(
    run: Callable[[Host, Q, Running], Awaitable[A]],
) -> Callable[[Host, Q, Running], Awaitable[A]]:
    """The same action, begun again when libvirtd went away in the middle: for actions that look before they act."""

    @functools.wraps(run)
    async def again(host: Host, order: Q, running: Running) -> A:
        end = monotonic() + running.deadline_seconds
        while True:
            try:
                return await run(host, order, running)
            except Disconnected:
                left = end - monotonic()
                if left <= 0:
                    raise
                await host.hypervisor.wait_connected(left)

    return again


async def wait_gone(hypervisor: Hypervisor, vm_id: str, seconds: float) -> bool:
    """Whether QEMU has ended within so many seconds."""
    with hypervisor.events() as events:
        try:
            async with asyncio.timeout(seconds):
                while (await hypervisor.domain(vm_id)).state not in ENDED:
                    await _heard(events, lambda e: e.vm_id == vm_id and e.state is DomainState.GONE)
        except TimeoutError:
            return False
    return True


async def wait_removed(
    hypervisor: Hypervisor, events: asyncio.Queue[HypervisorEvent], vm_id: str, alias: str, seconds: float
) -> EventName | None:
    """What became of an unplugged device: DEVICE_REMOVED, DEVICE_REMOVAL_FAILED, or None after so many seconds.

    `events` was opened before the device was unplugged. A domain that ends has lost its devices too.
    """
    outcomes = (EventName.DEVICE_REMOVED, EventName.DEVICE_REMOVAL_FAILED)

    def matters(event: HypervisorEvent) -> bool:
        if event.vm_id != vm_id:
            return False
        return event.state is DomainState.GONE or (
            event.name in outcomes and event.details.get("device") == alias
        )

    try:
        async with asyncio.timeout(seconds):
            while (event := await _heard(events, matters)).name is EventName.CONNECTED:
                if not await _has(hypervisor, vm_id, alias):
                    return EventName.DEVICE_REMOVED
    except TimeoutError:
        return None
    return event.name if event.name in outcomes else EventName.DEVICE_REMOVED


async def _has(hypervisor: Hypervisor, vm_id: str, alias: str) -> bool:
    """Whether the domain still has the device: its removal may have been announced while libvirtd was away."""
    try:
        root = runningxml.parsed(await hypervisor.domain_xml(vm_id))
    except Refused as problem:
        if is_libvirt(problem, LibvirtError.NO_DOMAIN):
            return False
        raise
    return any(element.get("name") == alias for element in root.iter("alias"))


async def _heard(
    events: asyncio.Queue[HypervisorEvent], matters: Callable[[HypervisorEvent], bool]
) -> HypervisorEvent:
    """The next event that matters, or that libvirtd came back: then look again."""
    while True:
        event = await events.get()
        if event.name is EventName.CONNECTED or matters(event):
            return event
