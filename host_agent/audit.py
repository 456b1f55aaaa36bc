"""Finds domains that ended or appeared without an event, and says the event that libvirt did not.

libvirtd forgets a QEMU that died while it was starting up itself without telling anybody.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

from host_agent.events import EventName, HypervisorEvent
from volery.contracts.domain import DomainState
from volery.contracts.errors import Refused

if TYPE_CHECKING:
    from host_agent.hypervisor import Hypervisor

AFTER_CONNECT_SECONDS = (1.0, 3.0, 10.0)
"""Looks after libvirtd came back, which takes its QEMUs over while it answers already."""
EVERY_SECONDS = 60.0
ENDED = (DomainState.GONE, DomainState.SHUTOFF)


async def audit(hypervisor: Hypervisor) -> None:
    """Runs for as long as the hypervisor is used."""
    known: set[str] = set()
    loop = asyncio.get_running_loop()
    looks: list[float] = []
    with hypervisor.events() as events:
        while True:
            due = min(looks, default=loop.time() + EVERY_SECONDS)
            try:
                async with asyncio.timeout_at(due):
                    event = await events.get()
            except TimeoutError:
                looks = [look for look in looks if look > due]
                with contextlib.suppress(Refused):  # libvirtd is away: CONNECTED will come
                    await _compare(hypervisor, known)
                continue
            _follow(event, known)
            if event.name is EventName.CONNECTED:
                looks = [loop.time() + seconds for seconds in (0.0, *AFTER_CONNECT_SECONDS)]


def _follow(event: HypervisorEvent, known: set[str]) -> None:
    if event.state in ENDED:
        known.discard(event.vm_id)
    elif event.state is not None:
        known.add(event.vm_id)


async def _compare(hypervisor: Hypervisor, known: set[str]) -> None:
    """Each difference is looked at again by itself, since events may have overtaken the list."""
    listed = {d.vm_id for d in await hypervisor.list_domains() if d.state not in ENDED}
    for vm_id in sorted(known ^ listed):
        now = await hypervisor.domain(vm_id)
        if now.state in ENDED and vm_id in known:
            details = {"event": "stopped", "reason": "unnoticed"}
            hypervisor.emit(HypervisorEvent(EventName.LIFECYCLE, vm_id, details, DomainState.GONE))
            known.discard(vm_id)
        elif now.state not in ENDED:
            known.add(vm_id)
