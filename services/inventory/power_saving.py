"""A host sleeps to save power: its VMs leave it, it is switched off by ha; and it is woken when somebody wants it back.

From the moment that it is to sleep nothing new comes to it: whoever writes that a VM may run on it shares a lock on its row
and finds it awake (`Store.takes_vms`). So once no VM may run there, and a report that was asked for after that names no
domain, none does until it is awake again; only then power is cut. From then on the operation goes only forward: ha says for
certain whether it is off, and what isn't certain leaves it asleep, which harms nobody.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from datetime import datetime
from functools import partial

from msgspec.structs import replace

from services.inventory import admission, emptying, model
from services.inventory.clearing import Clearing
from services.inventory.desk import Inventory
from services.inventory.host_facts import ENDED_STATES
from services.inventory.store import HOSTS, HostPrivate
from volery.contracts.base import Call, Message
from volery.contracts.errors import Kind, Refused, conflict
from volery.contracts.fencing import PowerState
from volery.contracts.host import SAVE_POWER, WAKE_HOST, Host, HostStatus, PowerSaving, SavePower, WakeHost
from volery.contracts.ids import new_id
from volery.contracts.operation import Operation
from volery.contracts.power import POWER_DOWN, POWER_UP, OrderPower, PowerOrdered
from volery.runtime import checks
from volery.runtime.bus import LOST, Caller
from volery.runtime.clock import monotonic, utc_now
from volery.runtime.operations import busy
from volery.runtime.run import Run
from volery.runtime.service import Part
from volery.runtime.tables import Row, Stale

log = logging.getLogger(__name__)

part = Part()

SAVE_SECONDS = 4 * 3600.0
AGAIN_SECONDS = 2.0
"""Between two questions about a power that isn't certain."""
NAMED = 5
NOTHING_DONE = frozenset({Kind.CONFLICT, Kind.NOT_FOUND, Kind.INVALID, Kind.FORBIDDEN})
"""How ha refuses what it has not begun. Anything else, a failure of its own too, leaves open what it did."""
SLEEPING = frozenset({PowerSaving.FALLING_ASLEEP, PowerSaving.ASLEEP})

HostRow = Row[Host, HostPrivate]


class Waking(Message):
    """What waking a host needs to know of the time before."""

    id: str
    boot_id: str = ""
    reason: str = ""


class Decided(Message):
    """The state of a host under which its power is decided about, the same after a crash."""

    id: str
    revision: int
    boot_id: str


def sleeps(host: Host) -> bool:
    """Whether it sleeps, or it isn't known whether it does, and nobody is at work on it."""
    return host.power_saving in SLEEPING and not host.busy_with


# To sleep


@part.answers(SAVE_POWER)
async def save_power(inv: Inventory, ask: SavePower, caller: Caller) -> Operation:
    """Raises Refused(conflict) when it is not up, or what it is for couldn't be kept."""
    inv.core.quarantine.check()
    while True:
        row = await HOSTS.get(inv.core.pool, ask.id)
        host = row.public
        checks.revision(host, ask.if_revision, "host")
        checks.text(ask.reason, "reason")
        busy(host, "host", host.busy_with)
        if host.status is not HostStatus.UP:
            raise conflict(
                f"host {host.name} is {host.status}; only one that is up is put to sleep", status=host.status
            )
        if ask.empty_only:
            await _check_empty(inv, host)
        await _check_power(inv, host, caller)
        await admission.of_leaving(inv, host, caller, stops_vms=False, dry_run=ask.dry_run)
        op, begun = inv.core.operations.begin(
            "host.save_power",
            object_kind="host",
            object_id=host.id,
            object_name=host.name,
            question=ask,
            caller=caller,
            deadline_seconds=SAVE_SECONDS,
        )
        if ask.dry_run:
            return replace(op, id="", result=await emptying.plan_of(inv, host, caller))
        new = replace(
            host,
            status=HostStatus.PREPARING_FOR_MAINTENANCE,
            busy_with=op.id,
            power_saving=PowerSaving.FALLING_ASLEEP,
            power_saving_reason=ask.reason,
        )
        update = HOSTS.update(row, new, replace(row.private, maintenance=True))
        try:
            await inv.core.commit(update, begun, caller=caller, answer=op)
        except Stale:
            continue
        return op


async def _check_power(inv: Inventory, host: Host, caller: Caller) -> None:
    """Raises Refused with what ha has against it."""
    question = OrderPower(id=host.id, revision=host.revision, dry_run=True)
    await inv.core.bus.ask(POWER_DOWN, question, Caller(caller.principal, new_id()), again=False)


async def _check_empty(inv: Inventory, host: Host) -> None:
    """Raises Refused(conflict) naming what may run there."""
    ids = [
        placement.vm_id for placement in await inv.store.placements_on(host.id) if placement.state != "none"
    ]
    named = {row.id: row.public.name for row in await inv.store.vms_with(ids)}
    named |= {row.id: row.public.name for row in await inv.store.vms_on(host.id) if row.public.external}
    if named or ids:
        more = "" if len(named) <= NAMED else f" and {len(named) - NAMED} more"
        raise conflict(
            f"host {host.name} is not empty: VMs {', '.join(sorted(named.values())[:NAMED])}{more} run there, or may",
            vm_ids=sorted(named.keys() | set(ids)),
        )


@part.runs("host.save_power", deadline_seconds=SAVE_SECONDS)
async def carry_out(inv: Inventory, run: Run) -> None:
    ask = run.input(SavePower)
    if not run.goes_only_forward:
        run.undo("awake", lambda: _awake(inv, ask.id, "", revoked=True))
        if not ask.empty_only:
            await _leave(inv, run, ask.id)
        await run.step("look", "Making sure that nothing runs there", lambda: _check_silent(inv, run, ask.id))
        await run.only_forward()
    decided = await run.step("decided", "Deciding", lambda: _decided(inv, ask.id), Decided)
    boot_id = decided.boot_id
    off = partial(_power, inv, run, POWER_DOWN, "off", decided)
    ordered = await run.step("off", "Switching it off", off, PowerOrdered)
    if ordered.state is PowerState.ON:
        await _awake(inv, ask.id, "")
        raise conflict(
            f"host {run.operation.object_name} stays up: {ordered.words or 'its BMC says that it is on'}"
        )
    certain = ordered.state is PowerState.OFF
    await _asleep(
        inv, ask.id, boot_id, ask.reason if certain else f"it isn't certain that it is off: {ordered.words}"
    )
    if not certain:
        raise Refused(
            Kind.UNAVAILABLE,
            f"it isn't certain whether host {run.operation.object_name} is off ({ordered.words}). Nothing runs on it. Look at "
            "it, or wake it",
        )


async def _leave(inv: Inventory, run: Run, host_id: str) -> None:
    """As for maintenance: by a plan, and what that leaves without one."""
    clearing = Clearing(inv, run, host_id)
    host = (await HOSTS.get(inv.core.pool, host_id)).public
    await emptying.follow(inv, run, clearing, host, ())
    if failed := await clearing.clear():
        names = "; ".join(f"{name}: {why}" for name, why in failed.items())
        raise conflict(f"these VMs can't leave host {host.name}, which stays up: {names}", vms=failed)


async def _check_silent(inv: Inventory, run: Run, host_id: str) -> None:
    """Nothing may run there by what is written, which stays so while it isn't awake; and nothing does, as it says itself after
    that, nor is it at work on a disk. Raises Refused(conflict)."""
    host = (await HOSTS.get(inv.core.pool, host_id)).public
    await _check_empty(inv, host)
    until = monotonic() + inv.config.power_seconds
    while work := await _reported_work(inv, run, host):
        if monotonic() > until or run.cancelling.is_set():
            raise conflict(
                f"host {host.name} stays up, since it is at work for storage ({', '.join(sorted(set(work)))}): wait for these "
                "operations, or cancel them",
                work=list(work),
            )
        await asyncio.sleep(AGAIN_SECONDS)
    await _check_empty(inv, host)


async def _reported_work(inv: Inventory, run: Run, host: Host) -> tuple[str, ...]:
    """What it does for storage. Raises Refused(conflict) when it doesn't answer, or runs something."""
    until = monotonic() + inv.config.power_seconds
    if not await inv.fresh_report(host.id, lambda: monotonic() > until or run.cancelling.is_set()):
        raise conflict(f"host {host.name} has not said what runs on it, and stays up")
    running = [
        report.name or vm_id
        for (at, vm_id), report in inv.seen.items()
        if at == host.id and report.state not in ENDED_STATES
    ]
    if running:
        raise conflict(
            f"host {host.name} stays up, since it says that it runs {', '.join(sorted(running)[:NAMED])}"
        )
    return inv.storage_work.get(host.id, ())


# Its power


async def _power(
    inv: Inventory, run: Run, call: Call[OrderPower, PowerOrdered], step: str, decided: Decided
) -> PowerOrdered:
    """What ha says for certain, or that nothing is. What it refuses it has not done and won't do: then it is as it was."""
    until, words = monotonic() + inv.config.power_seconds, ""
    host_id = decided.id
    question = OrderPower(id=host_id, revision=decided.revision, boot_id=decided.boot_id)
    stays = PowerState.ON if call is POWER_DOWN else PowerState.OFF
    while monotonic() < until:
        try:
            return await inv.core.bus.ask(call, question, run.caller_for(step), again=False)
        except Refused as refused:
            words = refused.message
            if refused.kind in NOTHING_DONE and not refused.details.get(LOST):
                return PowerOrdered(id=host_id, state=stays, words=words)
        log.info("the power of host %s is asked about again: %s", host_id, words)
        await asyncio.sleep(AGAIN_SECONDS)
    return PowerOrdered(id=host_id, state=PowerState.UNKNOWN, words=words)


async def _decided(inv: Inventory, host_id: str) -> Decided:
    host = (await HOSTS.get(inv.core.pool, host_id)).public
    return Decided(id=host_id, revision=host.revision, boot_id=host.boot_id)


# Awake again


@part.answers(WAKE_HOST)
async def wake(inv: Inventory, ask: WakeHost, caller: Caller) -> Operation:
    while True:
        row = await HOSTS.get(inv.core.pool, ask.id)
        host = row.public
        checks.revision(host, ask.if_revision, "host")
        checks.text(ask.reason, "reason")
        busy(host, "host", host.busy_with)
        if not sleeps(host):
            raise conflict(f"host {host.name} doesn't sleep: it is {host.status}", status=host.status)
        op, begun = inv.core.operations.begin(
            "host.wake",
            object_kind="host",
            object_id=host.id,
            object_name=host.name,
            question=Waking(id=host.id, boot_id=host.boot_id, reason=ask.reason),
            caller=caller,
            deadline_seconds=2 * (inv.config.power_seconds + inv.config.wake_seconds),
        )
        new = replace(host, busy_with=op.id, power_saving=PowerSaving.WAKING)
        try:
            await inv.core.commit(HOSTS.update(row, new), begun, caller=caller, answer=op)
        except Stale:
            continue
        return op


@part.runs("host.wake", deadline_seconds=3600)
async def carry_out_waking(inv: Inventory, run: Run) -> None:
    ask = run.input(Waking)
    name = run.operation.object_name
    run.undo("asleep", lambda: _asleep(inv, ask.id, ask.boot_id, "it was not woken to the end"))
    decided = await run.step("decided", "Deciding", lambda: _decided(inv, ask.id), Decided)
    on = partial(_power, inv, run, POWER_UP, "on", decided)
    ordered = await run.step("on", "Switching it on", on, PowerOrdered)
    run.checkpoint()
    if ordered.state is not PowerState.ON:
        run.undone("asleep")
        await _asleep(inv, ask.id, ask.boot_id, f"it could not be woken: {ordered.words}", proven=False)
        raise conflict(f"host {name} could not be woken, and sleeps on: {ordered.words}")
    title = "Waiting until it reports"
    reported = await run.step("report", title, lambda: _reports(inv, run, ask.id), bool)
    run.checkpoint()
    run.undone("asleep")
    if not reported:
        said = f"it was switched on and has not reported for {inv.config.wake_seconds:g} s"
        await _awake(inv, ask.id, f"it could not be woken: {said}", proven=False)
        raise conflict(
            f"host {name} could not be woken: {said}. Look at its console; it counts as lost until it reports"
        )
    host = (await HOSTS.get(inv.core.pool, ask.id)).public
    proves = ordered.was is PowerState.OFF and host.boot_id != ask.boot_id
    await _awake(inv, ask.id, "", proven=True if proves else None)


async def _reports(inv: Inventory, run: Run, host_id: str) -> bool:
    until = monotonic() + inv.config.wake_seconds
    return await inv.fresh_report(host_id, lambda: monotonic() > until or run.cancelling.is_set())


async def _awake(
    inv: Inventory, host_id: str, reason: str, *, proven: bool | None = None, revoked: bool = False
) -> None:
    """It takes VMs again as far as it lives. `proven`: whether that it can be woken was; None leaves it. `revoked`: only if it
    was falling asleep."""

    def awake(row: HostRow) -> HostRow | None:
        if revoked and row.public.power_saving is not PowerSaving.FALLING_ASLEEP:
            return None
        private = replace(row.private, maintenance=False)
        new = replace(
            row.public,
            power_saving=PowerSaving.AWAKE,
            power_saving_reason=reason,
            power_on_proven_at=_proven(row.public, proven),
            maintenance_reason="",
        )
        return Row(model.host_with_status(new, private.liveness, False, False, inv.config), private)

    await _written(inv, host_id, awake)


def _proven(host: Host, proven: bool | None) -> datetime | None:
    return host.power_on_proven_at if proven is None else utc_now() if proven else None


async def _asleep(
    inv: Inventory, host_id: str, boot_id: str, reason: str, *, proven: bool | None = None
) -> None:
    """Also one that was switched on past us meanwhile: that is seen by its boot."""

    def asleep(row: HostRow) -> HostRow | None:
        new = replace(
            row.public,
            status=HostStatus.MAINTENANCE,
            power_saving=PowerSaving.ASLEEP,
            power_saving_reason=reason,
            power_on_proven_at=_proven(row.public, proven),
        )
        if row.public.boot_id != boot_id:
            new = model.switched_on(new)
        return Row(new, row.private)

    await _written(inv, host_id, asleep)


async def _written(inv: Inventory, host_id: str, decide: Callable[[HostRow], HostRow | None]) -> None:
    while True:
        row = await HOSTS.get(inv.core.pool, host_id)
        new = decide(row)
        if new is None:
            return
        try:
            await inv.core.commit(HOSTS.update(row, new.public, new.private))
        except Stale:
            continue
        return
