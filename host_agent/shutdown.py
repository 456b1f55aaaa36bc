"""Whether this host is being shut down by its administrator, and the orderly end of its guests before it goes.

A supervisor ends the agent in the same way when it restarts the agent alone, and that touches no VM. So somebody else
must say that the whole host goes: `WAYS`, of which one that says so is enough.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final

from host_agent import children
from host_agent.config import AgentConfig
from host_agent.domain_waits import wait_gone
from host_agent.hypervisor import Hypervisor
from volery.contracts.agent import DomainReport
from volery.contracts.domain import DomainState
from volery.contracts.domain_orders import StopMethod
from volery.contracts.errors import Refused

log = logging.getLogger(__name__)

HOST_SHUTDOWN: Final = "host_shutdown"
"""The reason of a domain that ended since its host is going down."""
KEEPS_ITS_REASON: Final = frozenset({"migrated", "saved"})
"""Ends that mean the same on a host that is going down."""
SYSTEMD_SECONDS: Final = 5.0
DESTROY_SECONDS: Final = 10.0
HEARS_ACPI: Final = frozenset({DomainState.RUNNING, DomainState.PMSUSPENDED})
ENDS: Final = HEARS_ACPI | {DomainState.PAUSED, DomainState.SHUTTING_DOWN}


async def by_mark(config: AgentConfig) -> bool:
    """Whether the file is there that somebody makes before he ends everything."""
    return bool(config.shutdown_mark_path) and Path(config.shutdown_mark_path).exists()


async def by_systemd(config: AgentConfig, program: str = "systemctl") -> bool:
    """Whether systemd is stopping the machine: to power it off, reboot it, or run another kernel."""
    try:
        # It ends with a status other than 0 for every state but `running`, and says the state all the same.
        said = await children.run(
            ["sh", "-c", '"$1" is-system-running || :', "sh", program], timeout_seconds=SYSTEMD_SECONDS
        )
    except (children.ChildFailed, OSError) as failure:
        log.debug("systemd doesn't say whether this host is being shut down: %s", failure)
        return False
    return said.decode(errors="replace").strip() == "stopping"


WAYS: tuple[Callable[[AgentConfig], Awaitable[bool]], ...] = (by_mark, by_systemd)
"""How the agent learns that its host is going down, the quickest first."""


async def is_going_down(config: AgentConfig) -> bool:
    for way in WAYS:
        if await way(config):
            return True
    return False


async def end_guests(hypervisor: Hypervisor, seconds: float) -> list[str]:
    """Every VM of Volery's is asked to shut down, and ended after so many seconds: the host goes in any case, and who
    knows that a VM has ended may start it elsewhere. The ids of those that have."""
    try:
        domains = [d for d in await hypervisor.list_domains() if d.installation and d.state in ENDS]
    except Refused as problem:
        log.error("what runs here can't be ended in order: %s", problem.message)
        return []
    ended = await asyncio.gather(*(_end(hypervisor, domain, seconds) for domain in domains))
    return [domain.vm_id for domain, gone in zip(domains, ended, strict=True) if gone]


async def _end(hypervisor: Hypervisor, domain: DomainReport, seconds: float) -> bool:
    try:
        if await _asked(hypervisor, domain) and await wait_gone(hypervisor, domain.vm_id, seconds):
            return True
        log.warning("VM %s did not shut down; it is ended, since its host goes", domain.name)
        await hypervisor.destroy(domain.vm_id)
        return await wait_gone(hypervisor, domain.vm_id, DESTROY_SECONDS)
    except Refused as problem:
        log.error("VM %s could not be ended: %s", domain.name, problem.message)
        return False


async def _asked(hypervisor: Hypervisor, domain: DomainReport) -> bool:
    """Whether it shuts down by itself, or was asked to."""
    if domain.state not in HEARS_ACPI:
        return domain.state is DomainState.SHUTTING_DOWN
    try:
        await hypervisor.shutdown(domain.vm_id, StopMethod.ACPI)
    except Refused as problem:
        log.warning("VM %s can't be asked to shut down: %s", domain.name, problem.message)
        return False
    return True
