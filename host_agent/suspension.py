"""Suspend to disk and back: a domain's memory in a file."""

from __future__ import annotations

import asyncio
from pathlib import PurePath

from host_agent import children, disk_locks, runningxml
from host_agent.action import Host, Running
from host_agent.domxml import Placement
from volery.contracts.base import Done
from volery.contracts.domain import DomainState
from volery.contracts.domain_orders import RunDomain, SaveDomain
from volery.contracts.errors import Kind, Refused, conflict

FILE_SECONDS = 30.0
"""For one look at, or one removal of, a file on a mount that may hang."""


async def save_domain(host: Host, order: SaveDomain, running: Running) -> Done:
    """Done when the file is complete and QEMU has ended. Cancelled, the domain goes on and no file stays."""
    now = await host.hypervisor.domain(order.vm_id)
    if now.state in (DomainState.GONE, DomainState.SHUTOFF):
        if running.resumed and await _exists(order.path):
            return Done()
        raise conflict(f"VM {order.vm_id} doesn't run on this host, so there is no memory to save")
    if now.epoch > running.epoch or not now.installation:
        raise Refused(
            Kind.STALE,
            f"VM {order.vm_id} is here with epoch {now.epoch}, not {running.epoch}: ask for the VM's state",
        )
    await _check_directory(order.path)
    saving = asyncio.ensure_future(host.hypervisor.save(order.vm_id, order.path, running.deadline_seconds))
    try:
        await asyncio.shield(saving)
    except asyncio.CancelledError:
        await asyncio.gather(host.hypervisor.abort_job(order.vm_id), saving, return_exceptions=True)
        if (await host.hypervisor.domain(order.vm_id)).state is not DomainState.GONE:
            await remove_file(order.path)
        raise
    return Done()


async def restore(host: Host, order: RunDomain, placement: Placement) -> None:
    """Start from saved memory, with this order's epoch and disk sources; the file is removed afterwards."""
    xml = ""
    if host.hypervisor.domain_type != "test":
        root = runningxml.parsed(await host.hypervisor.saved_xml(order.restore_path))
        runningxml.replace_sources(root, order.spec.disks, order.spec.nics, order.spec.installation)
        xml = runningxml.with_placement(root, placement)
    start = host.hypervisor.restore(order.restore_path, xml, paused=order.paused)
    await disk_locks.started("restore the VM", start, order.spec.disks)
    await remove_file(order.restore_path)


async def _check_directory(path: str) -> None:
    """Raises Refused when the file's directory isn't there or hangs: libvirtd would hang with it, for every VM."""
    directory = str(PurePath(path).parent)
    try:
        await children.run(["test", "-d", directory], timeout_seconds=FILE_SECONDS)
    except children.ChildFailed as failure:
        raise Refused(
            Kind.UNAVAILABLE,
            f"the memory can't be saved in {directory} on this host: {failure.reason}; activate its storage domain",
            path=path,
        ) from failure


async def _exists(path: str) -> bool:
    try:
        await children.run(["test", "-s", path], timeout_seconds=FILE_SECONDS)
    except children.ChildFailed:
        return False
    return True


async def remove_file(path: str) -> None:
    """Gone, or was never there. Raises Refused when it can't be removed."""
    try:
        await children.run(["rm", "-f", "--", path], timeout_seconds=FILE_SECONDS)
    except children.ChildFailed as failure:
        raise Refused(
            Kind.UNAVAILABLE,
            f"the saved memory {path} could not be removed: {failure.reason}; remove it by hand",
            path=path,
        ) from failure
