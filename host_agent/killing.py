"""Ending QEMU, also one that doesn't end by SIGKILL, and telling of it as what it is.

The kernel ends a process once none of its threads waits for what can't be interrupted: mostly a read or a write that was
given to storage which doesn't answer. Until then it has the VM's disks open, and that write may still arrive. libvirt
either refuses, or gives the domain up and says that it has stopped: its word is not taken for that while there is a
process.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
from collections.abc import Collection, Mapping
from typing import Any

from msgspec.structs import replace

from host_agent import qemu_processes
from host_agent.config import AgentConfig
from host_agent.connections import Connections, Driver
from host_agent.events import EventName, HypervisorEvent
from volery.contracts.agent import DomainReport
from volery.contracts.domain import DomainState
from volery.contracts.domain_orders import UNKILLABLE
from volery.contracts.errors import Kind, Refused

log = logging.getLogger("volery.agent.hypervisor")

SENT = "Failed to terminate process"
"""What libvirt says some seconds after SIGKILL."""
ENDED = (DomainState.GONE, DomainState.SHUTOFF)


class Killing(Connections):
    """`destroy`, and what there is to tell of domains that libvirt can't end, or has given up."""

    def __init__(self, config: AgentConfig, driver: Driver) -> None:
        super().__init__(config, driver)
        self._undying: dict[str, int] = {}
        """VM → libvirt's number of the domain that was sent SIGKILL: its next life has another."""
        self._last: dict[str, DomainReport] = {}
        """What was told last of each domain that has not ended."""
        self._watched: dict[str, int] = {}
        """VM → a descriptor of its process, of those that libvirt has given up."""

    def expect(self, epochs: Mapping[str, int], told: Mapping[str, DomainReport], installation: str) -> None:
        """VMs that a former run of this agent was told of, the epochs of its orders, and what it told of them last: one of
        them may have been given up since."""
        for vm_id, epoch in epochs.items():
            report = told.get(vm_id) or DomainReport(
                vm_id=vm_id,
                epoch=epoch,
                order_seq=0,
                name=vm_id,
                state=DomainState.RUNNING,
                installation=installation,
            )
            self._last.setdefault(vm_id, report)

    async def close(self) -> None:
        for vm_id in list(self._watched):
            self._unwatch(vm_id)
        await super().close()

    async def destroy(self, vm_id: str) -> None:
        """End QEMU now, whatever state it is in. Raises Refused by rule UNKILLABLE when it doesn't end."""
        refusal: Refused | None = None
        try:
            await self._rescue_call(vm_id, "power off", lambda d: d.destroy())
        except Refused as problem:
            refusal = problem
        pid = (await self.processes({vm_id})).get(vm_id, 0)
        if pid and refusal is not None and refusal.kind is Kind.NOT_FOUND:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)  # libvirt has given it up: it may live on for another reason
        undying = bool(pid) and (refusal is None or qemu_processes.is_killed(pid))
        if refusal is not None and SENT in refusal.message:
            undying = True
            await self._mark_undying(vm_id)
        if undying:
            self.emit(HypervisorEvent(EventName.UNDYING, vm_id))
            raise unkillable(vm_id, pid) from refusal
        if refusal is not None:
            raise refusal

    async def _mark_undying(self, vm_id: str) -> None:
        """libvirt goes on having it."""
        with contextlib.suppress(Refused):
            doing = f"look at VM {vm_id}"
            self._undying[vm_id] = await self._listing(doing, lambda c: int(c.lookupByUUIDString(vm_id).ID()))

    async def processes(self, vm_ids: Collection[str]) -> dict[str, int]:
        """VM → the id of its QEMU's process, for those that have one."""
        return await asyncio.to_thread(qemu_processes.find, vm_ids)

    def told(self, domain: Any, report: DomainReport) -> DomainReport:
        """The report as it is to be told. In a thread."""
        vm_id = report.vm_id
        if vm_id in self._undying and domain.ID() == self._undying[vm_id]:
            report = replace(report, reason=UNKILLABLE, responsive=False)
        if report.state not in ENDED:
            self._last[vm_id] = report
        return report

    async def not_listed(self, vm_id: str) -> DomainReport:
        """What becomes of a domain that libvirt doesn't have: GONE, once it has no process."""
        left = await self._left({vm_id} & set(self._last))
        gone = DomainReport(vm_id=vm_id, epoch=0, order_seq=0, name="", state=DomainState.GONE)
        return left[0] if left else gone

    async def with_left(self, listed: list[DomainReport]) -> list[DomainReport]:
        """And those that libvirt has given up. Of what has ended nothing is remembered."""
        return listed + await self._left(set(self._last) - {report.vm_id for report in listed})

    async def _left(self, vm_ids: Collection[str]) -> list[DomainReport]:
        if not vm_ids:
            return []
        found = await self.processes(vm_ids)
        here = await self._listing("look for domains", lambda c: _ids(c, found)) if found else set()
        reports = []
        for vm_id in vm_ids:
            if vm_id in here:  # it was just being started
                continue
            last = self._last.get(vm_id) if vm_id in found else self._last.pop(vm_id, None)
            if vm_id not in found or last is None:
                continue
            if not last.disk_ids and not last.nic_ids:
                disk_ids, nic_ids = await asyncio.to_thread(qemu_processes.devices, found[vm_id])
                last = replace(last, disk_ids=disk_ids, nic_ids=nic_ids)
            report = replace(last, reason=UNKILLABLE, responsive=False, agent_connected=False)
            self._last[vm_id] = report
            self._watch(vm_id, found[vm_id])
            reports.append(report)
        return reports

    def _watch(self, vm_id: str, pid: int) -> None:
        """libvirt won't say when it ends."""
        if vm_id in self._watched:
            return
        try:
            descriptor = os.pidfd_open(pid)
        except ProcessLookupError:
            return
        log.error("libvirt has given VM %s up, but its QEMU, process %d, has not ended", vm_id, pid)
        self._watched[vm_id] = descriptor
        self._loop.add_reader(descriptor, self._ended, vm_id)

    def _unwatch(self, vm_id: str) -> None:
        descriptor = self._watched.pop(vm_id)
        self._loop.remove_reader(descriptor)
        os.close(descriptor)

    def _ended(self, vm_id: str) -> None:
        self._unwatch(vm_id)
        details = {"event": "stopped", "reason": "failed"}
        self.emit(HypervisorEvent(EventName.LIFECYCLE, vm_id, details, DomainState.GONE))


def _ids(connection: Any, vm_ids: Collection[str]) -> set[str]:
    return {domain.UUIDString() for domain in connection.listAllDomains(0)} & set(vm_ids)


def unkillable(vm_id: str, pid: int) -> Refused:
    """`pid`: 0 when only libvirt can see the process."""
    threads = qemu_processes.waits(pid) if pid else ""
    why = f", since threads of it can't be interrupted ({threads})" if threads else ""
    return Refused(
        Kind.TIMEOUT,
        f"VM {vm_id} could not be powered off: its QEMU{f', process {pid} on its host,' if pid else ''} was sent SIGKILL and"
        f" does not end{why}. It has the VM's disks and lease as before, so the VM counts as running and is started nowhere"
        " else. It ends by itself as soon as what it waits for comes, mostly an answer of its storage: bring that back."
        " Otherwise move the host's other VMs away, then switch the host off: that proves that this one has ended, too",
        rule=UNKILLABLE,
        vm_id=vm_id,
        pid=pid,
    )
