"""Live migration: the destination admits, the source moves the domain, and a failed move leaves it where it was."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

from host_agent import cpus, devices, huge_pages, leases, pins, runningxml
from host_agent.action import Action, Host, Running
from host_agent.domain_waits import settled
from host_agent.domxml import Placement
from host_agent.events import EventName
from host_agent.migration_parameters import MigrationParameters, MigrationStats, migration_stats
from host_agent.refusals import LibvirtError, is_libvirt
from volery.contracts.agent import DomainReport
from volery.contracts.domain import DomainState, FileSource
from volery.contracts.domain_orders import (
    ADMIT_MIGRATION,
    MIGRATE_DOMAIN,
    AdmitMigration,
    MigrateDomain,
    MigrationAdmitted,
    MigrationDone,
)
from volery.contracts.errors import Kind, Refused, conflict
from volery.runtime.clock import monotonic

PROGRESS_SECONDS = 0.5
END_SECONDS = 20.0
"""What an aborted migration gets to clean up on both sides."""


async def admit_migration(host: Host, order: AdmitMigration, running: Running) -> MigrationAdmitted:
    """On the destination: no domain of this VM is in the way, and QEMU will reach its disks."""
    now = await host.hypervisor.domain(order.vm_id)
    if now.state not in (DomainState.GONE, DomainState.SHUTOFF):
        raise conflict(
            f"VM {order.vm_id} is already on this host ({now.state.value}, epoch {now.epoch}), so it can't arrive"
            " here: ask for its state",
            vm_id=order.vm_id,
        )
    await leases.check_lease(order.spec.lease)
    await asyncio.to_thread(huge_pages.check, order.spec)
    await devices.prepare(host, order.spec.disks, order.spec.installation)
    await cpus.make_room(host, order.vm_id, order.spec.cpus)
    shared = host.hypervisor.cpus.shared
    return MigrationAdmitted(shared_cpus=None if shared is None else tuple(sorted(shared)))


async def migrate_domain(host: Host, order: MigrateDomain, running: Running) -> MigrationDone:
    """On the source. Cancelled, refused or out of time, the domain runs on here, and nothing waits over there."""
    now = await host.hypervisor.domain(order.vm_id)
    _check(now, order, running)
    parameters = await _parameters(host, order, now)
    await host.hypervisor.set_max_downtime(order.vm_id, order.max_downtime_ms)
    with host.hypervisor.events() as events:
        seconds = order.timeout_seconds + END_SECONDS
        moving = asyncio.ensure_future(_move(host, order, parameters, seconds))
        try:
            async with asyncio.timeout(order.timeout_seconds):
                last = await _watch(host, order, running, moving)
        except TimeoutError:
            await _abort(host, order.vm_id, moving)
            if not await _left(host, order.vm_id):
                raise Refused(
                    Kind.TIMEOUT,
                    f"the migration of VM {order.vm_id} did not finish within {order.timeout_seconds:g} s and was"
                    " stopped; the VM runs on where it was. Allow more time, downtime or post-copy",
                    vm_id=order.vm_id,
                ) from None
            last = MigrationStats()
        except asyncio.CancelledError:
            await _abort(host, order.vm_id, moving)
            if not _succeeded(moving):
                raise
            last = MigrationStats()
        while not events.empty():
            event = events.get_nowait()
            if event.name is EventName.JOB_COMPLETED and event.vm_id == order.vm_id:
                last = migration_stats(event.details)
    return MigrationDone(
        vm_id=order.vm_id,
        downtime_ms=last.downtime_ms,
        total_ms=last.elapsed_ms,
        transferred_bytes=last.processed_bytes,
    )


def _check(now: DomainReport, order: MigrateDomain, running: Running) -> None:
    if now.state not in (DomainState.RUNNING, DomainState.PAUSED):
        raise conflict(
            f"VM {order.vm_id} is {now.state.value} on this host: only a running VM can be moved live",
            vm_id=order.vm_id,
        )
    if not now.installation or now.epoch > running.epoch:
        raise Refused(
            Kind.STALE,
            f"VM {order.vm_id} is here with epoch {now.epoch}, but the order is for epoch {running.epoch}: ask for"
            " the VM's state",
            vm_id=order.vm_id,
        )


async def _parameters(host: Host, order: MigrateDomain, now: DomainReport) -> MigrationParameters:
    root = runningxml.parsed(await host.hypervisor.domain_xml(order.vm_id, migratable=True))
    runningxml.replace_sources(root, order.disks, order.nics, now.installation)
    pins.put(
        root, order.cpus, order.shared_cpus
    )  # should more be given away there meanwhile, its agent moves it
    placement = Placement(order.destination_epoch, order.destination_order_seq).on(order.cpus)
    return MigrationParameters(
        destination_uri=order.destination_uri,
        destination_address=order.destination_address,
        destination_xml=runningxml.with_placement(root, placement),
        bandwidth_mib_per_second=order.bandwidth_mib_per_second,
        auto_converge=order.auto_converge,
        post_copy=order.post_copy,
        parallel_connections=order.parallel_connections,
    )


async def _move(host: Host, order: MigrateDomain, parameters: MigrationParameters, seconds: float) -> None:
    """libvirt calls a directory unsafe that it can't see is shared; the disks' owner knows better.

    Safe are disks without a page cache on storage that both hosts reach: that, and nothing else, is overruled.
    """
    try:
        await host.hypervisor.migrate(order.vm_id, parameters, seconds)
    except Refused as problem:
        shared = all(d.shared_storage for d in order.disks if isinstance(d.source, FileSource))
        if not is_libvirt(problem, LibvirtError.MIGRATE_UNSAFE) or not order.disks or not shared:
            raise
        await host.hypervisor.migrate(order.vm_id, replace(parameters, unsafe=True), seconds)


async def _watch(
    host: Host, order: MigrateDomain, running: Running, moving: asyncio.Future[None]
) -> MigrationStats:
    """Tell the progress until it ends. Raises what the migration raises."""
    last = MigrationStats()
    while True:
        done, _ = await asyncio.wait({moving}, timeout=PROGRESS_SECONDS)
        if done:
            moving.result()
            return last
        try:
            last = await host.hypervisor.job_stats(order.vm_id)
        except Refused:
            continue
        running.progress(last.percent, _details(last))
        if order.post_copy and last.iteration > 1:
            await _switch(host, order.vm_id)


async def _switch(host: Host, vm_id: str) -> None:
    try:
        await host.hypervisor.start_post_copy(vm_id)
    except Refused:
        return  # it was switched before, or has just ended


def _details(stats: MigrationStats) -> dict[str, Any]:
    return {
        "remaining_bytes": stats.remaining_bytes,
        "total_bytes": stats.total_bytes,
        "bytes_per_second": stats.bytes_per_second,
        "dirty_pages_per_second": stats.dirty_pages_per_second,
        "iteration": stats.iteration,
        "downtime_ms": stats.downtime_ms,
        "throttle_percent": stats.throttle_percent,
    }


async def _abort(host: Host, vm_id: str, moving: asyncio.Future[None]) -> None:
    """Stop the job and wait for its end. One that has just begun can't be stopped yet: it is tried again."""
    end = monotonic() + END_SECONDS
    while not moving.done() and monotonic() < end:
        await asyncio.gather(host.hypervisor.abort_job(vm_id), return_exceptions=True)
        await asyncio.wait({moving}, timeout=PROGRESS_SECONDS)
    if moving.done() and not moving.cancelled():
        moving.exception()


def _succeeded(moving: asyncio.Future[None]) -> bool:
    """Whether the move was over before it could be stopped: then it is told as what it is."""
    return moving.done() and not moving.cancelled() and moving.exception() is None


async def _left(host: Host, vm_id: str) -> bool:
    """Whether it had arrived before it could be stopped."""
    return (await host.hypervisor.domain(vm_id)).state is DomainState.GONE


ACTIONS: tuple[Action[Any, Any], ...] = (
    Action(ADMIT_MIGRATION, settled(admit_migration)),
    Action(MIGRATE_DOMAIN, migrate_domain),
)
