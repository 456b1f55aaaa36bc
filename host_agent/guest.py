"""What guests tell about themselves through their agents: name, addresses, operating system.

Asked when an agent connects, again until it knows an address, then every half minute; one guest at a time, and
one whose agent is stuck less and less often, so that it never holds up the others.
"""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass, field

from host_agent.action import Host
from host_agent.events import EventName, HypervisorEvent
from host_agent.hypervisor import Hypervisor
from volery.contracts.domain import DomainState
from volery.contracts.errors import Refused
from volery.runtime.clock import monotonic

REFRESH_SECONDS = 30.0
FIRST_SECONDS = 1.0
"""A guest that has no address yet is asked again after this, then after twice as long, …"""
STUCK_SECONDS = 600.0
"""A stuck agent is asked at least this often."""


@dataclass(slots=True)
class _Turns:
    """When whom to ask next, on the event loop's clock."""

    due: dict[str, float] = field(default_factory=dict)
    pause: dict[str, float] = field(default_factory=dict)

    def add(self, vm_id: str, now: float) -> None:
        self.due[vm_id] = now
        self.pause[vm_id] = FIRST_SECONDS

    def drop(self, vm_id: str) -> None:
        self.due.pop(vm_id, None)
        self.pause.pop(vm_id, None)

    def again(self, vm_id: str, now: float, longest: float) -> None:
        """After the pause, which grows up to `longest`."""
        if vm_id in self.due:
            pause = min(self.pause[vm_id], longest)
            self.due[vm_id] = now + pause
            self.pause[vm_id] = 2 * pause

    def next(self) -> tuple[str, float] | None:
        return min(self.due.items(), key=lambda item: item[1], default=None)


async def watch_guests(host: Host) -> None:
    """Runs for as long as the agent; keeps `hypervisor.remember_guest` up to date."""
    hypervisor, loop, turns = host.hypervisor, asyncio.get_running_loop(), _Turns()
    with hypervisor.events() as events:
        if hypervisor.connected:
            await _find(hypervisor, turns)
        while True:
            upcoming = turns.next()
            wait = None if upcoming is None else max(0.0, upcoming[1] - loop.time())
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait):
                    await _hear(hypervisor, turns, await events.get())
                continue
            if upcoming is not None:
                await _ask(hypervisor, turns, upcoming[0])


async def _hear(hypervisor: Hypervisor, turns: _Turns, event: HypervisorEvent) -> None:
    if event.name is EventName.CONNECTED:
        await _find(hypervisor, turns)
    elif event.state is DomainState.GONE or event.details.get("state") == "disconnected":
        turns.drop(event.vm_id)
        hypervisor.remember_guest(event.vm_id, None)
    elif event.name is EventName.AGENT_LIFECYCLE:
        turns.add(event.vm_id, monotonic())


async def _find(hypervisor: Hypervisor, turns: _Turns) -> None:
    """Whose agent is connected now; what happened before is lost."""
    with contextlib.suppress(Refused):  # libvirtd went away again: CONNECTED comes again
        now = monotonic()
        for domain in await hypervisor.list_domains():
            if domain.agent_connected:
                turns.add(domain.vm_id, now)


async def _ask(hypervisor: Hypervisor, turns: _Turns, vm_id: str) -> None:
    """Domains that Volery did not make are left alone."""
    loop = asyncio.get_running_loop()
    try:
        domain = await hypervisor.domain(vm_id)
        if not domain.installation or not domain.agent_connected:
            turns.drop(vm_id)
            return
        info = await hypervisor.guest_info(vm_id)
    except Refused:
        turns.again(vm_id, loop.time(), STUCK_SECONDS)
        return
    hypervisor.remember_guest(vm_id, info)
    if info.ip_addresses and vm_id in turns.pause:
        turns.pause[vm_id] = REFRESH_SECONDS
    turns.again(vm_id, loop.time(), REFRESH_SECONDS)
