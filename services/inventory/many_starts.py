"""Many VMs are started in one call: hosts are chosen for all of them at once, then each starts by itself with its claim.

A claim is asked for under the epoch that the VM's own start raises next, so that the start finds it: the scheduler gives the
first answer to whoever asks again. Whose place isn't found wasn't touched; a claim whose start never begins is given back.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any, TypeVar

import msgspec
from msgspec.structs import replace

from services.inventory import holders, leases, model, restored
from services.inventory.desk import Inventory
from services.inventory.specs import need_of
from services.inventory.starting import only_host
from services.inventory.store import VMS, VmPrivate
from volery.contracts.affinity_group import GET_AFFINITY_GROUP
from volery.contracts.base import Message
from volery.contracts.cluster import GetById
from volery.contracts.errors import Kind, Refused, invalid, not_found
from volery.contracts.operation import Operation, OperationState
from volery.contracts.scheduling import (
    PLACE_MANY,
    RELEASE_CLAIM,
    ClaimKey,
    Place,
    PlaceMany,
    Placement,
)
from volery.contracts.vm import START_VM, StartVm, Vm, VmStatus
from volery.contracts.vm_starts import START_VMS, Became, StartVms, VmStart
from volery.runtime import checks
from volery.runtime.bus import Caller
from volery.runtime.clock import monotonic
from volery.runtime.run import Run
from volery.runtime.service import Part
from volery.runtime.tables import Row, Stale
from volery.runtime.tasks import end

part = Part()

MOST = 500
AT_ONCE = 16
"""VMs whose needs are put together, or whose starts are begun, at the same time."""
SHOWN_SECONDS = 1.0
"""How often the operation shows how far it is."""
NAMED = 5
"""VMs that a refusal's sentence names; the result names all."""
WORDS = 600
"""Characters of an explanation in a result that names hundreds; the decision has all of it."""
STARTABLE = (VmStatus.DOWN, VmStatus.SUSPENDED)

A = TypeVar("A")
B = TypeVar("B")


class Asked(Message):
    """What an operation works on."""

    vm_ids: tuple[str, ...]
    host_id: str = ""
    all_or_nothing: bool = False


class Chosen(Message):
    """One VM as it was when its host was chosen."""

    start: VmStart
    revision: int = 0
    epoch: int = 0
    """Under which its place is claimed; 0: it has none."""
    absent: bool = False
    """It doesn't run and can't be started as it is: who must be on one host with it isn't started, either."""


@part.answers(START_VMS)
async def start_vms(inv: Inventory, ask: StartVms, caller: Caller) -> Operation:
    """Raises Refused(invalid) for no VMs or too many, Refused(not_found) for one that isn't there."""
    if ask.host_id:
        checks.object_id(ask.host_id, "host")
    vm_ids = await _selected(inv, ask, caller)
    asked = Asked(vm_ids=vm_ids, host_id=ask.host_id, all_or_nothing=ask.all_or_nothing)
    op, begun = inv.core.operations.begin(
        "vm.start_many",
        object_kind="vms",
        object_id=ask.affinity_group_id or ask.cluster_id,
        object_name=f"{len(vm_ids)} VM{'s' if len(vm_ids) > 1 else ''}",
        question=asked,
        caller=caller,
    )
    if ask.dry_run:
        chosen = await _choose(inv, asked, Caller(caller.principal), Caller(caller.principal), dry_run=True)
        return replace(op, id="", result=_result([each.start for each in chosen]))
    await inv.core.commit(begun, caller=caller, answer=op)
    return op


async def _selected(inv: Inventory, ask: StartVms, caller: Caller) -> tuple[str, ...]:
    chosen = ask.vm_ids
    if ask.affinity_group_id:
        checks.object_id(ask.affinity_group_id, "affinity group")
        group = await inv.core.bus.ask(
            GET_AFFINITY_GROUP, GetById(id=ask.affinity_group_id), Caller(caller.principal)
        )
        chosen = tuple(v for v in ask.vm_ids or group.vm_ids if v in group.vm_ids)
    if ask.cluster_id or ask.tag:
        named = set(chosen) if ask.vm_ids or ask.affinity_group_id else None
        chosen = tuple(v.id for v in await _that_rest(inv, ask) if named is None or v.id in named)
    if not chosen:
        raise invalid(
            "no VM is to be started: name VMs (vm_ids), an affinity group, or a cluster or tag of which some VM doesn't run",
            field="vm_ids",
        )
    if len(chosen) > MOST:
        raise invalid(
            f"at most {MOST} VMs are started in one call, not {len(chosen)}; start them in several",
            field="vm_ids",
        )
    if len(set(chosen)) < len(chosen):
        twice = next(v for number, v in enumerate(chosen) if v in chosen[:number])
        raise invalid(f"VM {twice} is named twice; name each VM once", field="vm_ids")
    for vm_id in chosen:
        checks.object_id(vm_id, "VM")
    rows = await inv.store.vms_with(chosen)
    if missing := set(chosen) - {row.id for row in rows}:
        raise not_found("VM", min(missing))
    return chosen


async def _that_rest(inv: Inventory, ask: StartVms) -> list[Vm]:
    """The most important first."""
    rows = await inv.store.vms_that_rest(ask.cluster_id, STARTABLE)
    vms = [row.public for row in rows if not ask.tag or ask.tag in row.public.tags]
    return sorted(vms, key=lambda vm: (-vm.high_availability.priority, vm.name, vm.id))


@part.runs("vm.start_many", deadline_seconds=900)
async def start_many(inv: Inventory, run: Run) -> None:
    asked = run.input(Asked)

    async def unclaimed() -> None:
        for each in run.recorded("places", list[Chosen]) or ():
            await _give_back(inv, run, each)

    async def choose() -> list[Chosen]:
        return await _choose(inv, asked, run.caller, run.caller_for("places"))

    restored.refuse_half_done(run, "look at which of these VMs run, and start the others again")
    run.undo("places", unclaimed)
    chosen = await run.step("places", "Choosing hosts for all of them", choose, list[Chosen])
    await _show(run, [each.start for each in chosen])
    starts = await run.step("starts", "Starting them", lambda: _begin(inv, run, asked, chosen), list[VmStart])
    run.undone("places")
    starts = await _Following(inv, run, starts).ended()
    failed = {each.vm_id for each in starts if each.became is Became.FAILED}
    for each in chosen:
        if each.start.vm_id in failed:  # it may have ended before it asked for its place
            await _give_back(inv, run, each)
    run.checkpoint()
    if missing := [each for each in starts if each.became in (Became.REFUSED, Became.FAILED)]:
        raise _some_missing(starts, missing)


def _some_missing(starts: Sequence[VmStart], missing: Sequence[VmStart]) -> Refused:
    named = "; ".join(f"{each.name}: {each.message}" for each in missing[:NAMED])
    more = f"; and {len(missing) - NAMED} more, see the result" if len(missing) > NAMED else ""
    return Refused(
        Kind.EXHAUSTED,
        f"{len(starts) - len(missing)} of {len(starts)} VMs run, {len(missing)} don't. {named}{more}",
        vm_ids=[each.vm_id for each in missing],
    )


# Choosing hosts


async def _choose(
    inv: Inventory, asked: Asked, caller: Caller, places: Caller, *, dry_run: bool = False
) -> list[Chosen]:
    """In the order asked for. Who can't be started as it is isn't asked a place for."""

    async def looked(vm_id: str) -> tuple[Chosen, Place | None]:
        return await _look(inv, vm_id, asked, caller)

    found = await _each(asked.vm_ids, looked)
    if asked.all_or_nothing and (why := _first_refusal(each for each, _ in found)):
        return [_not_alone(each, why) for each, _ in found]
    questions = tuple(place for _, place in found if place is not None)
    if not questions:
        return [each for each, _ in found]
    many = PlaceMany(
        places=questions,
        absent={each.start.vm_id: each.start.message for each, _ in found if each.absent},
        all_or_nothing=asked.all_or_nothing,
        dry_run=dry_run,
    )
    answer = await inv.core.bus.ask(PLACE_MANY, many, Caller(places.principal) if dry_run else places)
    placed = {placement.vm_id: placement for placement in answer.placements}
    return [
        _placed(each, placed[each.start.vm_id], dry_run=dry_run) if place is not None else each
        for each, place in found
    ]


async def _look(inv: Inventory, vm_id: str, asked: Asked, caller: Caller) -> tuple[Chosen, Place | None]:
    row = await VMS.find(inv.core.pool, vm_id)
    if row is None:
        start = VmStart(vm_id=vm_id, name=vm_id, became=Became.REFUSED, message=f"VM {vm_id} was deleted")
        return Chosen(start=start), None
    vm = row.public
    if vm.status in model.RUNNING and not vm.busy_with:
        return Chosen(
            start=VmStart(vm_id=vm.id, name=vm.name, became=Became.RUNNING, host_id=vm.host_id)
        ), None
    try:
        place = await _question(inv, row, asked, caller)
    except Refused as refused:
        start = VmStart(vm_id=vm.id, name=vm.name, became=Became.REFUSED, message=refused.message)
        return Chosen(start=start, absent=not vm.busy_with and vm.status not in model.ALIVE), None
    chosen = Chosen(start=VmStart(vm_id=vm.id, name=vm.name), revision=vm.revision, epoch=place.epoch)
    return chosen, place


async def _question(inv: Inventory, row: Row[Vm, VmPrivate], asked: Asked, caller: Caller) -> Place:
    """As its own start will ask. Raises Refused when it can't be started as it is."""
    await holders.check_action(inv, row.public, "start")
    host_id = only_host(row, asked.host_id, None)
    await restored.refuse_old_memory(inv, row)
    vm = row.public if row.private.saved_path else await leases.at_start(inv, row.public)
    _, before = await inv.store.placed(vm.id)
    return Place(
        need=await need_of(inv, vm, caller),
        epoch=await inv.store.next_epoch(before),
        target_host_id=host_id,
    )


def _first_refusal(found: Iterable[Chosen]) -> str:
    return next((each.start.message for each in found if each.start.became is Became.REFUSED), "")


def _not_alone(chosen: Chosen, why: str) -> Chosen:
    if chosen.start.became in (Became.REFUSED, Became.RUNNING):
        return chosen
    message = f"VM {chosen.start.name} isn't started, since all or none were asked for: {why}"
    return Chosen(start=replace(chosen.start, became=Became.REFUSED, message=message))


def _placed(chosen: Chosen, placement: Placement, *, dry_run: bool) -> Chosen:
    host = next((h.name for h in placement.hosts if h.host_id == placement.host_id), "")
    start = replace(
        chosen.start,
        host_id=placement.host_id,
        host_name=host,
        decision_id=placement.decision_id,
        together=placement.together,
        message=placement.message if dry_run or not placement.host_id else "",
        became=(Became.PLACED if dry_run else Became.STARTING) if placement.host_id else Became.REFUSED,
    )
    return replace(chosen, start=start, epoch=chosen.epoch if placement.host_id else 0)


# Starting each


async def _begin(inv: Inventory, run: Run, asked: Asked, chosen: Sequence[Chosen]) -> list[VmStart]:
    """Each by its own operation, under the same id after a crash. Who was changed since its place was chosen isn't started:
    it may need another."""

    async def begun(each: Chosen) -> VmStart:
        if each.start.became is not Became.STARTING:
            return each.start
        vm_id = each.start.vm_id
        question = StartVm(id=vm_id, if_revision=each.revision, host_id=asked.host_id)
        try:
            op = await inv.core.bus.ask(START_VM, question, run.caller_for(f"start-{vm_id}"))
        except Refused as refused:
            if refused.kind in (Kind.TIMEOUT, Kind.UNAVAILABLE):
                raise
            await _give_back(inv, run, each)
            return replace(
                each.start, became=Became.REFUSED, host_id="", host_name="", message=refused.message
            )
        return replace(each.start, operation_id=op.id)

    return await _each(chosen, begun)


async def _give_back(inv: Inventory, run: Run, chosen: Chosen) -> None:
    """The claim of a VM that was not started by this call after all. Its epoch is used up first, so that no start that begins
    meanwhile can find the claim before it is gone."""
    vm_id, epoch = chosen.start.vm_id, chosen.epoch
    if not epoch or not await _used_up(inv, vm_id, epoch):
        return
    await inv.core.bus.ask(
        RELEASE_CLAIM, ClaimKey(vm_id=vm_id, epoch=epoch), run.caller_for(f"release-{vm_id}")
    )


async def _used_up(inv: Inventory, vm_id: str, epoch: int) -> bool:
    """No start will place the VM under this epoch any more; False: one has, or may."""
    while (row := await VMS.find(inv.core.pool, vm_id)) is not None:
        before = await inv.store.placement(vm_id)
        if row.public.busy_with or (before.epoch == epoch and before.state != "none"):
            return False
        if before.epoch >= epoch:
            return True
        try:
            await inv.core.commit(
                inv.store.place(before, epoch=epoch, host_id=before.host_id, state=before.state),
                VMS.update(row, replace(row.public, epoch=epoch)),
            )
        except Stale:
            continue
        return True
    return True


class _Following:
    """Waits for the starts to end, and shows how far they are. When the operation is cancelled they are, too."""

    def __init__(self, inv: Inventory, run: Run, starts: Sequence[VmStart]) -> None:
        self.inv, self.run = inv, run
        self.starts = {each.vm_id: each for each in starts}
        self.waiting = {each.operation_id: each for each in starts if each.operation_id}

    async def ended(self) -> list[VmStart]:
        endings = {asyncio.create_task(self.inv.operation_ended(op_id)) for op_id in self.waiting}
        cancelling = asyncio.create_task(self.run.cancelling.wait())
        open_, shown_at = set(endings), monotonic()
        try:
            while open_:
                waited: set[asyncio.Task[Any]] = {*open_} if cancelling.done() else {*open_, cancelling}
                done, _ = await asyncio.wait(
                    waited, timeout=SHOWN_SECONDS, return_when=asyncio.FIRST_COMPLETED
                )
                if cancelling in done:
                    await self._cancel()
                for task in done & open_:
                    self._note(task.result())
                open_ -= done
                if monotonic() - shown_at >= SHOWN_SECONDS:
                    await _show(self.run, list(self.starts.values()))
                    shown_at = monotonic()
        finally:
            await end([*endings, cancelling])
        await _show(self.run, list(self.starts.values()))
        return list(self.starts.values())

    def _note(self, op: Operation) -> None:
        start = self.waiting[op.id]
        if op.state is OperationState.SUCCEEDED:
            new = replace(start, became=Became.STARTED)
        else:
            message = op.problem.message if op.problem is not None else f"its start was {op.state}"
            new = replace(start, became=Became.FAILED, message=message)
        self.starts[start.vm_id] = new

    async def _cancel(self) -> None:
        for start in list(self.starts.values()):
            if start.became is Became.STARTING:
                with contextlib.suppress(Refused):  # it has just ended, or runs already
                    await self.inv.core.operations.cancel(start.operation_id)


async def _show(run: Run, starts: Sequence[VmStart]) -> None:
    over = sum(each.became is not Became.STARTING for each in starts)
    percent = round(100.0 * over / len(starts), 1)
    await run.save(lambda op: replace(op, progress=percent, result=op.result | _result(starts)))


def _result(starts: Sequence[VmStart]) -> dict[str, Any]:
    explained = sum(bool(each.message) for each in starts)
    shown = [_shortened(each) if explained > NAMED * 10 else each for each in starts]
    return {"vms": msgspec.to_builtins(shown)}


def _shortened(start: VmStart) -> VmStart:
    if len(start.message) <= WORDS:
        return start
    more = f"… (decision {start.decision_id} has all of it)" if start.decision_id else "…"
    return replace(start, message=start.message[:WORDS] + more)


async def _each(things: Sequence[A], act: Callable[[A], Awaitable[B]]) -> list[B]:
    """In their order, a few at a time."""
    gate = asyncio.Semaphore(AT_ONCE)

    async def one(thing: A) -> B:
        async with gate:
            return await act(thing)

    tasks = [asyncio.create_task(one(thing)) for thing in things]
    try:
        return await asyncio.gather(*tasks)
    finally:
        await end(tasks)
