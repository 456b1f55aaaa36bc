"""Claims against facts, level-triggered: what contradicts is put right, having missed every event."""

from __future__ import annotations

import logging

from msgspec.structs import replace

from services.scheduler import licence_store, model, store
from services.scheduler.model import SeenVm, Settling
from services.scheduler.state import Scheduler
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
ADOPT_AFTER_SECONDS = 15.0
"""A VM may be ending while its last fact still says that it runs."""


@part.every(RECONCILE_SECONDS)
async def settle_claims(scheduler: Scheduler) -> None:
    config = scheduler.config
    now = await store.now(scheduler.core.pool)
    found = await store.suspicious_claims(scheduler.core.pool, config.claim_seconds, config.settled_seconds)
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
    """Claims for VMs that run without one, also beyond the host's limit: what is used is used."""
    for vm in await store.unclaimed_vms(scheduler.core.pool, ADOPT_AFTER_SECONDS):
        claim = _adopted(scheduler, vm)
        try:
            await scheduler.core.commit(
                store.force_capacity(claim),
                store.CLAIMS.insert(claim, store.ClaimPrivate()),
            )
        except Taken:
            continue
        scheduler.took(claim)
        log.info("VM %s runs on host %s without a claim; it has one now", vm.id, vm.host_id)


def _adopted(scheduler: Scheduler, vm: SeenVm) -> Claim:
    now = utc_now()
    return Claim(
        id=new_id(),
        revision=1,
        created_at=now,
        updated_at=now,
        vm_id=vm.id,
        epoch=vm.epoch,
        host_id=vm.host_id,
        memory_bytes=model.memory_taken(vm.memory_bytes, scheduler.config),
        vcpus=vm.vcpus,
        state=model.CONFIRMED,
    )


@part.every(CHECK_SECONDS)
async def check_counters(scheduler: Scheduler) -> None:
    """The counters equal the sums of the claims, always; if they ever don't, that is a bug worth a loud line."""
    for host_id, memory, vcpus in await store.correct_counters(scheduler.core.pool):
        log.error(
            "host %s was off by %+d bytes and %+d vCPUs from its claims; corrected", host_id, memory, vcpus
        )


@part.every(CHECK_SECONDS)
async def close_uses(scheduler: Scheduler) -> None:
    await licence_store.close_uses(scheduler.core.pool)


@part.every(FORGET_SECONDS)
async def forget(scheduler: Scheduler) -> None:
    await store.forget_decisions(scheduler.core.pool, scheduler.config.decision_days)
    await store.forget_gone(scheduler.core.pool)
    await licence_store.forget_uses(scheduler.core.pool, scheduler.config.licence_days)
