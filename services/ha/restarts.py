"""Restarts of highly available VMs that ended, by themselves or with their host: asked of inventory, at most so often."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, TypeAlias

from msgspec.structs import replace

from services.ha import rooms, turns, waits, watched_vms
from services.ha.policies.restart_order import Step, Verdict, WatchedVm, decide, ended, is_over, within
from services.ha.state import Ha, WaitsFor
from services.ha.store import RESTARTS, RestartPrivate
from volery.contracts.base import Owner
from volery.contracts.errors import Kind, Problem, Refused
from volery.contracts.leases import FREE_LATER, IMAGE_HELD, LEASE_HELD
from volery.contracts.liveness import LIST_RESTARTS, VmRestart
from volery.contracts.operation import ENDED, GET_OPERATION, GetOperation, ListQuery, Operation
from volery.contracts.together import HELD
from volery.contracts.vm import RESTART_VM, VM_CHANGED, VM_DELETED, RestartVm, Vm, VmStatus
from volery.runtime.bus import Caller
from volery.runtime.clock import utc_now
from volery.runtime.hear_owners import Said
from volery.runtime.pages import page
from volery.runtime.service import Part
from volery.runtime.tables import Change, Row, Stale

log = logging.getLogger(__name__)

part = Part()

KEY = "restarts"
LOOK_SECONDS = 1.0
FORGET_SECONDS = 30.0
TOGETHER = 16
"""Restarts of equally important VMs that are asked for at a time."""
WRITTEN_TOGETHER = 200
"""Those about which is decided, and written, in one go."""
RUNNING = frozenset(
    {VmStatus.UP, VmStatus.POWERING_UP, VmStatus.PAUSED, VmStatus.POWERING_DOWN, VmStatus.REBOOT_IN_PROGRESS}
)
RestartRow: TypeAlias = Row[VmRestart, RestartPrivate]
UNKNOWN_OUTCOMES = (Kind.TIMEOUT, Kind.UNAVAILABLE, Kind.EXHAUSTED, Kind.INTERNAL)
"""Refusals after which the same request is sent again."""
WAITED_FOR = {
    LEASE_HELD: "its lease",
    IMAGE_HELD: "a lock on its disk to go",
    HELD: "what is done with its disk to end",
}
"""A rule that time ends → what the VM waits for."""


@part.hears_together(VM_CHANGED)
async def vms_changed(ha: Ha, said: Sequence[Said]) -> list[Change]:
    vms: list[Vm] = [vm for _, vm in said]
    running = await watched_vms.among(ha.core.pool, [vm.id for vm in vms], RUNNING)
    if any(vm.status not in RUNNING and vm.id in running for vm in vms):
        rooms.may_have_come(ha)
    return [watched_vms.saw(vms).and_then(lambda: ha.core.wake(KEY))]


@part.hears_together(VM_DELETED)
async def vms_deleted(ha: Ha, said: Sequence[Said]) -> list[Change]:
    return [watched_vms.gone([vm.id for _, vm in said])]


@dataclass(frozen=True, slots=True)
class Decided:
    """What is done about a VM that ended."""

    vm: WatchedVm
    row: RestartRow
    change: Change | None = None
    """What is written before it is done."""
    asks: bool = True


async def look(ha: Ha, key: str) -> None:
    """Every VM that ended, the most important first, equals together. One look at a time."""
    waiting = [vm for vm in await watched_vms.crashed(ha.core.pool) if ended(vm)]
    waits.keep_only(ha, {vm.id for vm in waiting})
    await rooms.look(ha, [vm.id for vm in waiting])
    for _, group in itertools.groupby(waiting, key=lambda vm: vm.priority):
        equals = list(group)
        order = await turns.now(ha, waiting)
        for start in range(0, len(equals), WRITTEN_TOGETHER):
            await _treat(ha, equals[start : start + WRITTEN_TOGETHER], order)


async def _treat(ha: Ha, vms: Sequence[WatchedVm], order: turns.Order) -> None:
    """What was decided is written before it is done, so that a crash in between neither forgets nor repeats it."""
    ids = [vm.id for vm in vms]
    rows = {row.id: row for row in await RESTARTS.where(ha.core.pool, "id = any($1::text[])", ids)}
    decided = [found for vm in vms if (found := await _decide(ha, vm, rows.get(vm.id), order)) is not None]
    written = await _written(ha, decided)
    places = asyncio.Semaphore(TOGETHER)
    await asyncio.gather(*(_ask_in_turn(ha, each, places) for each in written if each.asks))


async def _written(ha: Ha, decided: Sequence[Decided]) -> list[Decided]:
    """Those whose change, if any, was committed."""
    written = [each for each in decided if each.change is None]
    for new in (True, False):
        alike = [
            each for each in decided if each.change is not None and (each.row.public.revision == 1) is new
        ]
        if await _commit(ha, alike):
            written += alike
        else:
            written += [each for each in alike if await _commit(ha, [each])]
    return written


async def _commit(ha: Ha, decided: Sequence[Decided]) -> bool:
    """False, and nothing written, when one of them is not as it was any more: it is looked at again."""
    try:
        await ha.core.commit(*(each.change for each in decided if each.change is not None))
    except Stale:
        ha.core.wake(KEY)
        return False
    return True


async def _ask_in_turn(ha: Ha, decided: Decided, places: asyncio.Semaphore) -> None:
    async with places:
        try:
            await _ask(ha, decided.vm, decided.row)
        except Stale:
            ha.core.wake(KEY)


@part.every(LOOK_SECONDS)
async def look_again(ha: Ha) -> None:
    """What waits becomes due without an event."""
    ha.core.wake(KEY)


async def _decide(ha: Ha, vm: WatchedVm, row: RestartRow | None, order: turns.Order) -> Decided | None:
    if row is not None and row.private.pending:
        return Decided(vm, row)
    if row is not None and row.public.last_operation_id not in ("", row.private.learned):
        try:
            row = await _learn_outcome(ha, vm, row)
        except Stale:
            ha.core.wake(KEY)
            return None
        if row is None:
            return None
    if waits.goes_on(ha, vm.id):
        return None
    now = utc_now()
    attempts = within(row.private.attempts, now, ha.config) if row is not None else ()
    host = ha.watches.get(vm.host_id)
    last_reason = row.public.reason if row is not None else ""
    verdict = decide(vm, host.state if host is not None else None, attempts, now, ha.config, last_reason)
    since = _waits_since(vm, row, now)
    if verdict.step is Step.ASK:
        verdict = await _in_turn(ha, vm, order, verdict, (now - since).total_seconds())
    elif row is not None and row.private.epoch == vm.epoch and verdict.step is Step.WAIT:
        return None  # Asked for already: what came of it is on its way, or it isn't due yet.
    return _keep(vm, row, verdict, attempts, now, since)


def _waits_since(vm: WatchedVm, row: RestartRow | None, now: datetime) -> datetime:
    """Since when it could have been brought back. Having fitted nowhere since doesn't make it wait anew."""
    if row is None or row.private.waits_since is None:
        return now
    same = row.private.epoch == vm.epoch or not row.private.attempts
    return row.private.waits_since if same else now


async def _in_turn(ha: Ha, vm: WatchedVm, order: turns.Order, verdict: Verdict, waited: float) -> Verdict:
    """The verdict, unless others come first."""
    others = await turns.others_first(ha, vm, order, waited)
    if not others:
        ha.turns.pop(vm.id, None)
        return verdict
    return Verdict(Step.WAIT, f"VM {vm.name} ended ({vm.reason}) and is brought back in its turn: {others}")


async def _learn_outcome(ha: Ha, vm: WatchedVm, row: RestartRow) -> RestartRow | None:
    """A start that failed for what passes is no attempt: it is tried again as often as it takes. None: it isn't known yet
    what came of the last one."""
    operation: Operation | None
    try:
        operation = await ha.core.bus.ask(
            GET_OPERATION[Owner.INVENTORY], GetOperation(id=row.public.last_operation_id)
        )
    except Refused as refused:
        if refused.kind is not Kind.NOT_FOUND:
            return None
        operation = None  # Long ago: it counts.
    if operation is not None and operation.state not in ENDED:
        return None
    private, public = replace(row.private, learned=row.public.last_operation_id), row.public
    if (
        operation is not None
        and operation.problem is not None
        and (words := _passes(ha, vm, operation.problem))
    ):
        private = replace(private, attempts=row.private.attempts[:-1])
        public = replace(public, attempts=len(private.attempts), message=words)
        log.warning("%s", words)
    change = RESTARTS.update(row, public, private)
    await ha.core.commit(change)
    return Row(change.document, private)


def _passes(ha: Ha, vm: WatchedVm, problem: Problem) -> str:
    """What is waited for until it is tried again, as a sentence; "" when the failed start counts."""
    starting = turns.is_starting(ha)
    if problem.kind is Kind.EXHAUSTED and not (starting and problem.details.get("tried")):
        waits.begin(ha, vm.id, WaitsFor.ROOM, rooms.EXHAUSTED_SECONDS)
        return f"VM {vm.name} fits nowhere now; it is tried again when there is room: {problem.message}"
    if (rule := problem.details.get("rule")) in FREE_LATER:
        what, seconds = WaitsFor.LOCK, ha.config.lease_again_seconds
        why = f"waits for {WAITED_FOR[rule]}, and"
    elif starting:
        what, seconds = WaitsFor.HOSTS, ha.config.restart_first_delay_seconds
        why = "could not be started while hosts are coming back; it"
    else:
        return ""
    waits.begin(ha, vm.id, what, seconds)
    return f"VM {vm.name} {why} is tried again every {seconds:g} s: {problem.message}"


def _keep(
    vm: WatchedVm,
    row: RestartRow | None,
    verdict: Verdict,
    attempts: tuple[datetime, ...],
    now: datetime,
    waits_since: datetime,
) -> Decided:
    """The verdict as it is to be written."""
    asks = verdict.step is Step.ASK
    private = RestartPrivate(
        attempts=(*attempts, now) if asks else attempts,
        pending=f"restart-{vm.id}-{vm.epoch}-{len(attempts) + 1}" if asks else "",
        epoch=vm.epoch,
        preferred_host_id=verdict.preferred_host_id,
        avoided_host_ids=verdict.avoided_host_ids,
        only_host_id=verdict.only_host_id,
        waits_since=waits_since,
        learned=row.private.learned if row is not None else "",
    )
    old = row.public if row is not None else VmRestart(
        id=vm.id, revision=1, created_at=now, updated_at=now, vm_id=vm.id
    )  # fmt: skip
    new = replace(
        old,
        vm_name=vm.name,
        attempts=len(private.attempts),
        reason=vm.reason,
        next_attempt_at=verdict.due,
        gave_up=verdict.step is Step.GIVE_UP,
        message=verdict.message,
    )
    if row is None:
        return Decided(vm, Row(new, private), RESTARTS.insert(new, private), asks)
    if (new, private) == (row.public, row.private):
        return Decided(vm, row, None, asks)
    if new.gave_up and not old.gave_up:
        log.warning("%s", verdict.message)
    change = RESTARTS.update(row, new, private)
    return Decided(vm, Row(change.document, private), change, asks)


async def _ask(ha: Ha, vm: WatchedVm, row: RestartRow) -> None:
    """Ask inventory, under the same request id until the outcome is known."""
    request_id = row.private.pending
    question = RestartVm(
        vm_id=vm.id,
        epoch=row.private.epoch,
        reason=vm.reason,
        preferred_host_id=row.private.preferred_host_id,
        avoided_host_ids=row.private.avoided_host_ids,
        only_host_id=row.private.only_host_id,
    )
    try:
        operation = await ha.core.bus.ask(RESTART_VM, question, Caller("service:ha", request_id, request_id))
    except Refused as refused:
        if refused.kind in UNKNOWN_OUTCOMES:
            log.info("restart of VM %s: %s", vm.name, refused.message)
            return
        new = replace(row.public, message=f"the restart of VM {vm.name} was refused: {refused.message}")
    else:
        new = replace(row.public, last_operation_id=operation.id)
        log.warning("VM %s ended (%s): restart %s", vm.name, vm.reason, operation.id)
    await ha.core.commit(RESTARTS.update(row, new, replace(row.private, pending="")))


@part.every(FORGET_SECONDS)
async def forget(ha: Ha) -> None:
    """Records that say nothing any more."""
    now = utc_now()
    for row in await RESTARTS.where(ha.core.pool):
        vm = await watched_vms.find(ha.core.pool, row.id)
        if is_over(vm, within(row.private.attempts, now, ha.config), row.public.gave_up):
            try:
                await ha.core.commit(RESTARTS.delete(row))
            except Stale:
                continue


@part.answers(LIST_RESTARTS)
async def list_restarts(ha: Ha, ask: ListQuery, caller: Caller) -> Any:
    return await page(ha.core.pool, RESTARTS, ask)
