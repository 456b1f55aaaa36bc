"""VMs for tests of the agent: specs of the tiny guest, and a host that carries orders out without a bus."""

from __future__ import annotations

import asyncio
import subprocess
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from host_agent.action import Host, Running
from host_agent.config import AgentConfig
from host_agent.domains import ACTIONS
from host_agent.events import EventName, HypervisorEvent
from host_agent.hypervisor import Hypervisor
from host_agent.tickets import Tickets
from tests.support.guest import guest
from volery.contracts.base import Message, Order
from volery.contracts.domain import DomainDisk, DomainNic, DomainSpec, FileSource, ImageFormat
from volery.contracts.domain_orders import RUN_DOMAIN, STOP_DOMAIN, RunDomain, StopDomain, StopMethod

A = TypeVar("A")
INSTALLATION = "testing"
RUNNERS = {action.order.kind: action.run for action in ACTIONS}


def new_uuid() -> str:
    return str(uuid.uuid4())


def tiny_spec(**changes: Any) -> DomainSpec:
    """The tiny guest, booted by its kernel; 96 MB and one vCPU."""
    tiny = guest()
    vm_id = changes.pop("vm_id", "") or new_uuid()
    return DomainSpec(
        vm_id=vm_id,
        **{
            "name": f"t-{vm_id[:8]}",
            "title": "a test's VM",
            "memory_bytes": 96 << 20,
            "hostname": f"g{vm_id[:6]}",
            "kernel_path": str(tiny.kernel),
            "initrd_path": str(tiny.initrd),
            "kernel_cmdline": "console=ttyS0 quiet",
            "graphics": False,
            "installation": INSTALLATION,
        }
        | changes,
    )


def qcow2_disk(directory: Path, target: str = "vda", size: str = "64M", **changes: Any) -> DomainDisk:
    """A new empty image in the directory."""
    disk_id = new_uuid()
    path = directory / f"{disk_id}.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", path, size], check=True)
    source = FileSource(path=str(path), format=ImageFormat.QCOW2)
    return DomainDisk(disk_id=disk_id, source=source, target=target, **changes)


def nic(bridge: str = "", **changes: Any) -> DomainNic:
    nic_id = new_uuid()
    mac = "52:54:00:" + ":".join(nic_id[i : i + 2] for i in (0, 2, 4))
    return DomainNic(nic_id=nic_id, mac=mac, bridge=bridge, **changes)


@dataclass
class VmHost:
    """Orders straight to their actions, with everything the hypervisor said in `heard`."""

    host: Host
    heard: list[HypervisorEvent] = field(default_factory=list)
    progress: list[tuple[float, dict[str, Any]]] = field(default_factory=list)
    _changed: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def hypervisor(self) -> Hypervisor:
        return self.host.hypervisor

    async def order(
        self,
        order: Order[Any, A],
        body: Message,
        epoch: int = 1,
        order_seq: int = 1,
        *,
        resumed: bool = False,
        deadline_seconds: float = 60.0,
    ) -> A:
        vm_id = str(getattr(body, "vm_id", ""))
        running = Running(
            order_id=new_uuid(),
            owner="inventory",
            object_id=vm_id,
            epoch=epoch,
            order_seq=order_seq,
            deadline_seconds=deadline_seconds,
            resumed=resumed,
            progress=lambda percent, details: self.progress.append((percent, details)),
        )
        result: A = await RUNNERS[order.kind](self.host, body, running)
        return result

    async def run(self, spec: DomainSpec, epoch: int = 1, order_seq: int = 1, **options: Any) -> Any:
        body = RunDomain(vm_id=spec.vm_id, spec=spec, **options)
        return await self.order(RUN_DOMAIN, body, epoch, order_seq)

    async def power_off(self, vm_id: str, epoch: int = 1000) -> Any:
        return await self.order(STOP_DOMAIN, StopDomain(vm_id=vm_id, methods=(StopMethod.DESTROY,)), epoch)

    async def until(
        self, matters: Callable[[HypervisorEvent], bool], seconds: float = 30.0, *, since: int = 0
    ) -> HypervisorEvent:
        """The first event from number `since` on that matters; waits for it."""
        async with asyncio.timeout(seconds):
            while True:
                for event in self.heard[since:]:
                    if matters(event):
                        return event
                since = len(self.heard)
                self._changed.clear()
                await self._changed.wait()

    async def agent_up(self, vm_id: str, seconds: float = 60.0, *, since: int = 0) -> None:
        """Until the guest's agent answers: the guest has booted."""
        await self.until(
            lambda e: (
                e.vm_id == vm_id and e.name is EventName.AGENT_LIFECYCLE and e.details["state"] == "connected"
            ),
            seconds,
            since=since,
        )

    def hear(self, event: HypervisorEvent) -> None:
        self.heard.append(event)
        self._changed.set()


@asynccontextmanager
async def vm_host(
    uri: str, state_dir: Path, make: Callable[[AgentConfig], Hypervisor] = Hypervisor, **settings: Any
) -> AsyncIterator[VmHost]:
    """A connected host; whatever domains of ours it still has at the end are powered off."""
    config = AgentConfig(
        **{
            "libvirt_uri": uri,
            "hypervisor": "qemu",
            "state_dir": str(state_dir),
            "installation": INSTALLATION,
        }
        | settings
    )
    hypervisor = make(config)
    made = VmHost(Host(config, hypervisor, Tickets(), "0192f0c4-0000-7000-8000-000000000001"))
    hypervisor.on_event(made.hear)
    await hypervisor.start()
    try:
        await hypervisor.wait_connected(20)
        yield made
        for domain in await hypervisor.list_domains():
            if domain.installation == INSTALLATION:
                await made.power_off(domain.vm_id)
    finally:
        await hypervisor.close()
