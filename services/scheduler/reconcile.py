"""Claims against facts, level-triggered: what contradicts is put right, having missed every event."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import msgspec
from msgspec.structs import replace

from services.scheduler import (
    adoption_store,
    capacity_store,
    cell_claims,
    cell_store,
    decision_store,
    device_claims,
    device_store,
    licence_store,
    model,
    store,
)
from services.scheduler.cells import claims_of, needs_of
from services.scheduler.model import SeenVm, Settling
from services.scheduler.pages import pages_taken
from services.scheduler.shortage import shortage
from services.scheduler.state import Scheduler
from volery.contracts.domain import NumaNode
from volery.contracts.host_devices import GivenDevice
from volery.contracts.ids import new_id
from volery.contracts.scheduling import Claim
from volery.runtime.clock import utc_now
from volery.runtime.service import Part
from volery.runtime.tables import Row, Stale, Taken

log = logging.getLogger(__name__)

part = Part()

RECONCILE_SECONDS = 5.0
CHECK_SECONDS = 60.0
FORGET_SECONDS = 3600.0
NODES = msgspec.json.Decoder(tuple[NumaNode, ...])
DEVICES = msgspec.json.Decoder(tuple[GivenDevice, ...])
ADOPT_AFTER_SECONDS = 15.0
"""A VM may be ending while its last fact still says that it runs."""
ADOPTED_ONCE = 2000
"""VMs that are looked for at a time."""
ADOPTED_TOGETHER = 50
"""Claims that are committed in one statement: the hosts of them wait for each other for a few milliseconds."""


@part.every(RECONCILE_SECONDS)
async def settle_claims(scheduler: Scheduler) -> None:
    config = scheduler.config
    now = await store.now(scheduler.core.pool)
    async with scheduler.looks.one("claims") as recent:
        found = await store.suspicious_claims(
            scheduler.core.pool, config.claim_seconds, config.settled_seconds, recent=recent
        )
    for row, vm, replaced in found:
        verdict, why = model.settle(row.public, vm, now, config, replaced=replaced)
        await _apply(scheduler, row, verdict, why)


async def _apply(
    scheduler: Scheduler, row: Row[Claim, store.ClaimPrivate], verdict: Settling, why: str
) -> None:
    claim = row.public
    try:
        if verdict is Settling.RELEASE:
            await scheduler.core.commit(*store.release(row))
            scheduler.gave_back(claim)
        elif verdict is Settling.CONFIRM:
            await scheduler.core.commit(store.CLAIMS.update(row, replace(claim, state=model.CONFIRMED)))
        else:
            return
    except Stale:
        return
    log.info(
        "claim of VM %s on host %s, epoch %d: %s, %s", claim.vm_id, claim.host_id, claim.epoch, verdict, why
    )


@part.every(RECONCILE_SECONDS)
async def adopt_vms(scheduler: Scheduler) -> None:
    """Claims for VMs that run without one, also beyond the host's limit: what is used is used. A database that was lost, or
    a data center that is taken over, has hundreds of thousands of them."""
    pool = scheduler.core.pool
    async with scheduler.looks.one("unclaimed") as recent:
        while vms := await adoption_store.unclaimed_vms(
            pool, ADOPT_AFTER_SECONDS, ADOPTED_ONCE, recent=recent
        ):
            adopted = 0
            for at in range(0, len(vms), ADOPTED_TOGETHER):
                adopted += await _adopt(scheduler, vms[at : at + ADOPTED_TOGETHER])
            if not adopted or len(vms) < ADOPTED_ONCE:
                return


async def _adopt(scheduler: Scheduler, vms: Sequence[SeenVm]) -> int:
    """How many have a claim now that had none. Where one can't be had, the others are adopted one by one."""
    claims = [_adopted(scheduler, vm) for vm in vms]
    if len(claims) > 1 and any(claim.cells or claim.devices for claim in claims):
        # One cell, or a host's list of devices, can't be written twice in a statement.
        return sum([await _adopt(scheduler, [vm]) for vm in vms])
    try:
        await scheduler.core.commit(
            adoption_store.force_capacities(claims),
            *(change for claim in claims for change in cell_claims.take(claim, forced=True)),
            *(
                change
                for c, vm in zip(claims, vms, strict=True)
                for change in device_claims.force(c, vm.name)
            ),
            *(store.CLAIMS.insert(claim, store.ClaimPrivate()) for claim in claims),
        )
    except (Taken, Stale):
        return 0 if len(vms) == 1 else sum([await _adopt(scheduler, [vm]) for vm in vms])
    for claim in claims:
        scheduler.took(claim)
    log.info("VMs run without a claim; they have one now: %s", ", ".join(_where(vm) for vm in vms))
    return len(vms)


def _where(vm: SeenVm) -> str:
    return f"{vm.id} on host {vm.host_id}"


def _adopted(scheduler: Scheduler, vm: SeenVm) -> Claim:
    now, pages = utc_now(), pages_taken(vm.memory_bytes, vm.hugepage_kib)
    return Claim(
        id=new_id(),
        revision=1,
        created_at=now,
        updated_at=now,
        vm_id=vm.id,
        epoch=vm.epoch,
        host_id=vm.host_id,
        memory_bytes=model.memory_taken(vm.memory_bytes, scheduler.config, vm.hugepage_kib),
        vcpus=vm.vcpus,
        state=model.CONFIRMED,
        pages_2m=pages.small,
        pages_1g=pages.large,
        cells=claims_of(needs_of(NODES.decode(vm.numa_nodes), vm.hugepage_kib)),
        devices=DEVICES.decode(vm.devices),
    )


@part.every(CHECK_SECONDS)
async def check_counters(scheduler: Scheduler) -> None:
    """The counters equal the sums of the claims, always; if they ever don't, that is a bug worth a loud line."""
    for host_id, memory, vcpus in await store.correct_counters(scheduler.core.pool):
        log.error(
            "host %s was off by %+d bytes and %+d vCPUs from its claims; corrected", host_id, memory, vcpus
        )
    for host_id in await cell_store.correct(scheduler.core.pool):
        log.error("NUMA cells of host %s were off from its claims; corrected", host_id)
    await device_store.correct(scheduler.core.pool)


@part.every(RECONCILE_SECONDS)
async def warn_of_shortages(scheduler: Scheduler) -> None:
    """Once for each that begins, or says something else."""
    said = {}
    for host in await capacity_store.short_hosts(scheduler.core.pool):
        said[host.host_id] = problem = shortage(host)
        if scheduler.short.get(host.host_id) != problem:
            log.warning("%s", problem)
    scheduler.short = said


@part.every(CHECK_SECONDS)
async def close_uses(scheduler: Scheduler) -> None:
    await licence_store.close_uses(scheduler.core.pool)


@part.every(FORGET_SECONDS)
async def forget(scheduler: Scheduler) -> None:
    await decision_store.forget_decisions(scheduler.core.pool, scheduler.config.decision_days)
    await store.forget_gone(scheduler.core.pool)
    await licence_store.forget_uses(scheduler.core.pool, scheduler.config.licence_days)
