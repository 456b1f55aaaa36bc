"""Suspend to disk and back: a domain's memory in a file.

That memory fits the disks as they were when the guest stopped, so it is good for one start. A guest goes on from it in
this order: QEMU loads it and waits, the file is spent (renamed, and that is on the disk), the guest runs, the file goes.
Cut short anywhere, either the guest has not run, or the memory is never found again. libvirt's own managed save removes
the file after the guest runs, and only warns when it can't. Between the two the memory is in QEMU alone: a host that
dies then loses it, as any death loses a guest's memory.
"""

from __future__ import annotations

import asyncio
from pathlib import PurePath

from host_agent import cell_pins, children, disk_locks, pins, runningxml
from host_agent.action import Host, Running
from host_agent.children import ChildFailed
from host_agent.domxml import Placement
from host_agent.memory_files import SPENT
from volery.contracts.base import Done, Message
from volery.contracts.domain import DomainState
from volery.contracts.domain_orders import DiscardMemory, RunDomain, SaveDomain
from volery.contracts.errors import Kind, Refused, conflict, invalid

NOT_SPENT = "memory_not_spent"
"""The rule of a refusal to let a restored guest run."""
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
    if not running.resumed:  # else libvirt may still be writing it
        await remove_file(order.path)  # an older one would pass for this one after a crash
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
    """QEMU with the saved memory, this order's epoch and disk sources. Its guest waits, and the memory is there as before."""
    if not await _exists(order.restore_path):
        raise conflict(
            f"the saved memory {order.restore_path} of VM {order.vm_id} isn't on this host any more: its guest has run on from "
            "it, or it was removed by hand. Stop the VM, which gives its memory up, then start it",
            path=order.restore_path,
        )
    xml = ""
    if host.hypervisor.domain_type != "test":
        root = runningxml.parsed(await host.hypervisor.saved_xml(order.restore_path))
        runningxml.replace_sources(root, order.spec.disks, order.spec.nics, order.spec.installation)
        pins.put(root, order.spec.cpus, host.hypervisor.cpus.shared)
        if order.spec.cpus is None:
            cell_pins.put(root, host.hypervisor.cpus.cells, host.hypervisor.cpus.shared)
        xml = runningxml.with_placement(root, placement)
    start = host.hypervisor.restore(order.restore_path, xml, paused=True)
    await disk_locks.started("restore the VM", start, order.spec.disks)


async def spend(path: str) -> None:
    """From now on nothing is restored from this memory: a guest may run on with it. Raises Refused when that isn't certain."""
    try:
        await _ask(
            "spend",
            path,
            Done,
            "can't be put aside, and once it runs the guest could be restored from it again",
        )
    except Refused as problem:
        raise Refused(problem.kind, problem.message, **problem.details, rule=NOT_SPENT) from problem


async def unspend(path: str) -> None:
    """The guest with this memory did not run: it may be restored again. Raises Refused when it can't be."""
    await _ask(
        "unspend", path, Done, f"is intact, but under the name {path}{SPENT}: give it its name back by hand"
    )


async def discard_memory(host: Host, order: DiscardMemory, running: Running) -> Done:
    """Raises Refused for a file that isn't a memory of this VM by its name."""
    name = PurePath(order.path).name
    if not name.startswith(order.of_vm_id) or not name.endswith(".save"):
        raise invalid(f"{name!r} isn't the name of a saved memory of VM {order.of_vm_id}", field="path")
    await remove_file(order.path)
    return Done()


async def _check_directory(path: str) -> None:
    """Raises Refused when the file's directory isn't there or hangs: libvirtd would hang with it, for every VM."""
    directory = str(PurePath(path).parent)
    try:
        await children.run(["test", "-d", directory], timeout_seconds=FILE_SECONDS)
    except ChildFailed as failure:
        raise Refused(
            Kind.UNAVAILABLE,
            f"the memory can't be saved in {directory} on this host: {failure.reason}; activate its storage domain",
            path=path,
        ) from failure


class _File(Message):
    path: str


class _Found(Message):
    exists: bool


async def _exists(path: str) -> bool:
    """Raises Refused when its directory hangs: then nobody knows."""
    return (await _ask("look", path, _Found, "could not be looked for")).exists


async def remove_file(path: str) -> None:
    """Gone, spent or not, or was never there. Raises Refused when it can't be removed."""
    await _ask("remove", path, Done, "could not be removed; remove it by hand")


async def _ask(verb: str, path: str, answer: type[children.T], otherwise: str) -> children.T:
    try:
        return await children.python(
            "host_agent.memory_files", verb, _File(path=path), answer, timeout_seconds=FILE_SECONDS
        )
    except (ChildFailed, Refused) as problem:
        reason = problem.reason if isinstance(problem, ChildFailed) else problem.message
        message = f"the saved memory {path} {otherwise}: {reason}"
        raise Refused(Kind.UNAVAILABLE, message, path=path) from problem
