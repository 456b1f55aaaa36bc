"""Orders that begin and end a domain or act on a whole one: run, stop, act, save, forget.

Each looks first and makes true what is not, so that a repeat, or a resumption after a crash, does no harm.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

from host_agent import (
    cpus,
    devices,
    disk_locks,
    domxml,
    host_devices,
    huge_pages,
    leases,
    migration,
    runningxml,
    suspension,
    switching,
)
from host_agent.action import Action, Host, Running, to_its_end
from host_agent.domain_waits import settled, wait_gone
from host_agent.domxml import Placement
from host_agent.refusals import LibvirtError, is_libvirt
from host_agent.suspension import NOT_SPENT, discard_memory, save_domain
from volery.contracts.agent import DomainReport
from volery.contracts.base import Done, Message
from volery.contracts.domain import DomainLease, DomainSpec, DomainState
from volery.contracts.domain_orders import (
    ACT_ON_DOMAIN,
    DISCARD_MEMORY,
    FORGET_DOMAIN,
    RUN_DOMAIN,
    SAVE_DOMAIN,
    STOP_DOMAIN,
    UNKILLABLE,
    ActOnDomain,
    DomainAction,
    DomainRunning,
    DomainStopped,
    ForgetDomain,
    RunDomain,
    StopDomain,
    StopMethod,
)
from volery.contracts.errors import Kind, Refused, conflict
from volery.contracts.leases import DEFAULT_IO_TIMEOUT_SECONDS, LEASE_HELD, dead_seconds
from volery.runtime.clock import monotonic

log = logging.getLogger(__name__)
Q = TypeVar("Q", bound=Message)
A = TypeVar("A")

ENDED = (DomainState.GONE, DomainState.SHUTOFF)
ALIVE = (DomainState.RUNNING, DomainState.PAUSED, DomainState.PMSUSPENDED, DomainState.SHUTTING_DOWN)
ASK_AGAIN_SECONDS = 15.0
"""A guest that is booting doesn't hear the power button: it is pressed again."""
DESTROY_SECONDS = 60.0
LET_GO_SECONDS = 2.0
LOOK_AGAIN_SECONDS = 0.2
NEVER_RAN = (NOT_SPENT, LEASE_HELD)
"""Rules of refusals to let a restored guest run after which it surely hasn't."""


def check_ours(now: DomainReport, installation: str | None = None) -> None:
    """Raises Refused for a domain that Volery, or this Volery, did not make."""
    if not now.installation or (installation is not None and now.installation != installation):
        whose = f"Volery installation {now.installation}" if now.installation else "somebody else"
        raise conflict(
            f"domain {now.name} with the id of VM {now.vm_id} was made by {whose} and is left alone; end it on the"
            " host by hand if it isn't wanted",
            vm_id=now.vm_id,
            installation=now.installation,
        )


def check_epoch(now: DomainReport, running: Running) -> None:
    """Raises Refused when a newer decision than this order's put the domain here."""
    if now.epoch > running.epoch:
        raise Refused(
            Kind.STALE,
            f"VM {now.vm_id} is here with epoch {now.epoch}, but the order is for epoch {running.epoch}: a newer"
            " decision holds, ask for the VM's state",
            vm_id=now.vm_id,
            epoch=now.epoch,
        )


async def run_domain(host: Host, order: RunDomain, running: Running) -> DomainRunning:
    """A domain of this epoch that lives is a success; one of an earlier epoch that lives becomes this epoch's.

    What can't live any more (crashed, or waiting for a migration that won't come) is ended first.
    """
    hypervisor, spec = host.hypervisor, order.spec
    placement = Placement(running.epoch, running.order_seq).on(spec.cpus)
    now = await hypervisor.domain(order.vm_id)
    if now.state not in ENDED:
        check_ours(now, spec.installation)
        check_epoch(now, running)
        waits = _waits(now, placement)
        if order.restore_path and (waits or now.state in ALIVE):
            return await to_its_end(_run_on(host, order, placement, waits=waits))
        if now.state in ALIVE:
            if waits:
                await hypervisor.resume(order.vm_id)  # a start that was interrupted left it so
            return await _running(host, order.vm_id, spec, placement)
    if order.goes_on:
        raise conflict(
            f"VM {order.vm_id} doesn't run on this host any more ({now.state.value}), so it can't go on there: nothing was "
            "started",
            vm_id=order.vm_id,
            state=now.state,
        )
    if now.state not in ENDED:
        await _end(host, order.vm_id)
    await leases.check_lease(spec.lease)
    await asyncio.to_thread(huge_pages.check, spec)
    await devices.prepare(host, spec.disks, spec.installation)
    if order.restore_path:
        async with cpus.placed(host, order.vm_id, spec.cpus), _taken_back(host, order.vm_id, placement):
            await suspension.restore(host, order, placement)
        return await to_its_end(_run_on(host, order, placement, waits=True))
    return await _create(host, order, placement)


def _waits(now: DomainReport, placement: Placement) -> bool:
    """Whether an earlier try of this order left a domain whose guest has not run yet."""
    if now.state is DomainState.INCOMING:  # so libvirt calls one that was restored and waits
        return _is(now, placement)
    return now.state is DomainState.PAUSED and now.reason == "starting_up"


def _is(now: DomainReport, placement: Placement) -> bool:
    return (now.epoch, now.order_seq) == (placement.epoch, placement.order_seq)


@asynccontextmanager
async def _taken_back(host: Host, vm_id: str, placement: Placement) -> AsyncIterator[None]:
    """Cancelled, what is done here leaves no domain behind."""
    try:
        yield
    except asyncio.CancelledError:
        now = await host.hypervisor.domain(vm_id)
        if now.state not in ENDED and _is(now, placement):
            await host.hypervisor.destroy(vm_id)
        raise


async def _create(host: Host, order: RunDomain, placement: Placement) -> DomainRunning:
    async def create(xml: str) -> None:
        start = host.hypervisor.create(xml, paused=order.paused)
        await disk_locks.started("start the VM", start, order.spec.disks)

    async with _taken_back(host, order.vm_id, placement):
        async with (
            cpus.placed(host, order.vm_id, order.spec.cpus) as shared,
            host_devices.made(host, order.spec),
        ):
            xml = domxml.domain_xml(
                order.spec, placement, host.hypervisor.machine, shared, host.hypervisor.cpus.cells
            )
            await _leased(order.spec.lease, partial(create, xml))
        await _check_held(host, order)
        return await _running(host, order.vm_id, order.spec, placement)


async def _run_on(host: Host, order: RunDomain, placement: Placement, *, waits: bool) -> DomainRunning:
    """A restored guest goes on, once nothing can be restored from its memory any more. Not `waits`: it does already, and
    what is left of that memory is older."""
    path = order.restore_path
    if waits:
        await _mark(host, order.vm_id, order.spec, placement)  # which waits until libvirt has restored it
        try:
            await suspension.spend(path)
            if not order.paused:
                await _leased(order.spec.lease, partial(host.hypervisor.resume, order.vm_id))
        except Refused as problem:
            if problem.details.get("rule") in NEVER_RAN:
                await _end(host, order.vm_id)
                await suspension.unspend(path)
            raise
    try:
        await suspension.remove_file(path)
    except Refused as problem:
        log.warning("VM %s runs on, and %s", order.vm_id, problem.message)
    return await _running(host, order.vm_id, order.spec, placement)


async def _leased(lease: DomainLease | None, start: Callable[[], Awaitable[None]]) -> None:
    """A lease whose last holder has just ended is free a moment later: sanlock writes so to the storage first."""
    deadline = monotonic() + LET_GO_SECONDS
    while True:
        try:
            return await start()
        except Refused as problem:
            if lease is None or not is_libvirt(problem, LibvirtError.RESOURCE_BUSY):
                raise
            if monotonic() > deadline:
                raise _lease_held(lease) from problem
        await asyncio.sleep(LOOK_AGAIN_SECONDS)


def _lease_held(lease: DomainLease) -> Refused:
    return Refused(
        Kind.CONFLICT,
        f"the lease of VM {lease.key} on storage domain {lease.lockspace} is held by another host, or by one that died: "
        "then it is free 8 io_timeouts and 60 s after that host's last renewal "
        f"({dead_seconds(DEFAULT_IO_TIMEOUT_SECONDS)} s at the usual io_timeout); try again then",
        rule=LEASE_HELD,
        key=lease.key,
    )


async def _check_held(host: Host, order: RunDomain) -> None:
    """Ends a domain that libvirt let start without its lease. (A paused one holds none: it may not run.)"""
    if order.spec.lease is None or order.paused:
        return
    try:
        await leases.check_held(order.spec.lease)
    except Refused:
        await _end(host, order.vm_id)
        raise


async def _running(host: Host, vm_id: str, spec: DomainSpec, placement: Placement) -> DomainRunning:
    """What runs now, with the order's epoch in its metadata."""
    now = await host.hypervisor.domain(vm_id)
    if now.state in ENDED:
        raise conflict(
            f"VM {vm_id} started and ended at once; look at its QEMU log on the host, /var/log/libvirt/qemu/{spec.name}.log",
            vm_id=vm_id,
        )
    if not _is(now, placement):
        await _mark(host, vm_id, spec, placement)
    root = runningxml.parsed(await host.hypervisor.domain_xml(vm_id))
    return DomainRunning(vm_id=vm_id, state=now.state, graphics_port=runningxml.graphics_port(root))


async def _mark(host: Host, vm_id: str, spec: DomainSpec, placement: Placement) -> None:
    """Waits for what libvirt is doing to the domain. Which CPUs it has isn't this order's to change."""
    has = runningxml.metadata_of(runningxml.parsed(await host.hypervisor.domain_xml(vm_id)))
    if has is not None:
        placement = replace(placement, pinned=has.pinned, exclusive=has.exclusive)
    await host.hypervisor.set_metadata(vm_id, domxml.metadata_xml(spec.title, spec.installation, placement))


async def stop_domain(host: Host, order: StopDomain, running: Running) -> DomainStopped:
    """Each method in turn, each for `wait_seconds`, until QEMU has ended. Raises Refused(timeout) if it goes on, by rule
    UNKILLABLE if the kernel can't end it."""
    now = await host.hypervisor.domain(order.vm_id)
    if now.state in ENDED:
        return DomainStopped(vm_id=order.vm_id)
    check_ours(now)
    check_epoch(now, running)
    reasons: list[str] = []
    for method in order.methods:
        reason = await _stop_by(host, order.vm_id, method, order.wait_seconds)
        if not reason:
            return DomainStopped(vm_id=order.vm_id, method=method)
        reasons.append(f"{method.value.replace('_', ' ')}: {reason}")
    raise Refused(
        Kind.TIMEOUT,
        f"VM {order.vm_id} still runs ({'; '.join(reasons)}). Wait for its guest, or power it off",
        vm_id=order.vm_id,
    )


async def _stop_by(host: Host, vm_id: str, method: StopMethod, seconds: float) -> str:
    """Why it still runs; "" when it has ended."""
    hypervisor = host.hypervisor
    if method is StopMethod.DESTROY:
        seconds = max(seconds, DESTROY_SECONDS)
    end = monotonic() + seconds
    reason = ""
    while (left := end - monotonic()) > 0:
        try:
            await hypervisor.shutdown(vm_id, method)
        except Refused as problem:
            if problem.kind is Kind.NOT_FOUND:
                return ""
            if problem.details.get("rule") == UNKILLABLE:
                raise
            if not reason:  # it was never heard: waiting would change nothing
                return problem.message
        reason = f"its guest did not power off within {seconds:g} s"
        if await wait_gone(hypervisor, vm_id, min(ASK_AGAIN_SECONDS, left)):
            return ""
    return reason


async def act_on_domain(host: Host, order: ActOnDomain, running: Running) -> Done:
    now = await host.hypervisor.domain(order.vm_id)
    if now.state not in ALIVE:
        raise conflict(
            f"VM {order.vm_id} is {now.state.value} on this host, so it can't {order.action.value}: start it first",
            vm_id=order.vm_id,
            state=now.state,
        )
    check_ours(now)
    check_epoch(now, running)
    act, already = _ACTS[order.action]
    if now.state is not already:
        await act(host)(order.vm_id)
    return Done()


_ACTS: dict[DomainAction, tuple[Callable[[Host], Callable[[str], Awaitable[None]]], DomainState | None]] = {
    DomainAction.PAUSE: (lambda host: host.hypervisor.pause, DomainState.PAUSED),
    DomainAction.RESUME: (lambda host: host.hypervisor.resume, DomainState.RUNNING),
    DomainAction.RESET: (lambda host: host.hypervisor.reset, None),
    DomainAction.REBOOT: (lambda host: host.hypervisor.reboot, None),
}
"""How, and the state in which there is nothing to do."""


async def forget_domain(host: Host, order: ForgetDomain, running: Running) -> Done:
    """Ends what an earlier decision left here. Refused while a newer one holds, or for a stranger's domain."""
    now = await host.hypervisor.domain(order.vm_id)
    if now.state not in ENDED:
        check_ours(now)
        check_epoch(now, running)
        await _end(host, order.vm_id)
    await cpus.let_go(host, order.vm_id)
    return Done()


async def _end(host: Host, vm_id: str) -> None:
    """Ends QEMU. Raises Refused(timeout) when it is still there: nobody may take it for ended then."""
    await host.hypervisor.destroy(vm_id)
    if not await wait_gone(host.hypervisor, vm_id, DESTROY_SECONDS):
        raise Refused(
            Kind.TIMEOUT,
            f"QEMU of VM {vm_id} was killed and has not ended within {DESTROY_SECONDS:g} s: it may hang in its storage, and "
            "may still write. Look at the host's storage, or reset the host",
            vm_id=vm_id,
        )


ACTIONS: tuple[Action[Any, Any], ...] = (
    Action(RUN_DOMAIN, settled(run_domain)),
    Action(STOP_DOMAIN, settled(stop_domain)),
    Action(ACT_ON_DOMAIN, act_on_domain),
    Action(SAVE_DOMAIN, settled(save_domain)),
    Action(DISCARD_MEMORY, discard_memory),
    Action(FORGET_DOMAIN, settled(forget_domain)),
    *devices.ACTIONS,
    *switching.ACTIONS,
    *migration.ACTIONS,
)
"""Every order about domains except OPEN_CONSOLE, which is the data server's."""
