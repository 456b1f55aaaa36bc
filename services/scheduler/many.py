"""Placing many VMs in one call: those that must be on one host together or not at all, all others as if they came one after
the other."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Iterable, Mapping, Sequence

import msgspec
from msgspec.structs import replace

from services.scheduler import affinity, choice, granting, model, placing, store, together
from services.scheduler.affinity import Surroundings
from services.scheduler.policies.decision import NAMED_HOSTS
from services.scheduler.state import Scheduler
from volery.contracts.errors import Kind, Refused, invalid
from volery.contracts.scheduling import PLACE_MANY, Place, PlaceMany, Placement, Placements, Purpose
from volery.runtime.bus import Caller
from volery.runtime.service import Part
from volery.runtime.tables import Row, Stale

part = Part()

MOST = 500
TRIES = 10
"""Times that affinity groups may change while VMs are placed by them."""
HOSTS_TRIED = 5
"""The best hosts that are tried for VMs which are placed one after the other."""
TOGETHER = 20
"""VMs that are looked at before others get their turn."""

_MANY = msgspec.json.Decoder(list[Placement])


@part.answers(PLACE_MANY)
async def place_many(scheduler: Scheduler, ask: PlaceMany, caller: Caller) -> Placements:
    """Raises Refused(invalid) for impossible questions; that VMs find no place is an answer, not a refusal."""
    _check(scheduler, ask)
    if ask.dry_run:
        return _answer(ask, await _tried(scheduler, ask))
    answer = _answer(ask, await _granted(scheduler, ask, caller))
    await scheduler.core.commit(caller=caller, answer=answer)
    return answer


def _check(scheduler: Scheduler, ask: PlaceMany) -> None:
    if len(ask.places) > MOST:
        raise invalid(
            f"at most {MOST} VMs are placed in one call, not {len(ask.places)}; ask for them in several calls",
            field="places",
        )
    seen: set[str] = set()
    for each in ask.places:
        model.check(each)
        name = each.need.name or each.need.vm_id
        if each.need.vm_id in seen:
            raise invalid(f"VM {name} is named twice; name each VM once", field="places")
        seen.add(each.need.vm_id)
        if ask.all_or_nothing and granting.goes_alone(scheduler, each.need):
            raise invalid(
                f"VM {name} has CPUs, NUMA cells or devices of its host for itself, or is in a cluster that promises to survive the loss of "
                "hosts: such VMs are placed one after the other, so all or none can't be promised for them; ask without "
                "all_or_nothing",
                field="all_or_nothing",
            )


def _answer(ask: PlaceMany, found: Mapping[str, Placement]) -> Placements:
    """Hundreds of explanations are no message for a bus: each is found by its decision."""
    placements = [found[each.need.vm_id] for each in ask.places]
    return Placements(
        placements=tuple(
            replace(each, hosts=tuple(h for h in each.hosts if h.host_id == each.host_id))
            for each in placements
        )
    )


async def _granted(scheduler: Scheduler, ask: PlaceMany, caller: Caller) -> dict[str, Placement]:
    found: dict[str, Placement] = {}
    for _ in range(TRIES):
        left = [each for each in ask.places if each.need.vm_id not in found]
        if not left:
            return found
        grouped = together.revisions(scheduler, left)
        missed, there = _missed(scheduler, ask, together.units(scheduler, left))
        found |= missed
        questions = [[each for asks in there for each in asks]] if ask.all_or_nothing and there else there
        answers = await asyncio.gather(*(_placed(scheduler, each, grouped, caller) for each in questions))
        found |= {placement.vm_id: placement for answer in answers for placement in answer}
    raise Refused(
        Kind.EXHAUSTED,
        f"the affinity groups of these VMs changed {TRIES} times while they were placed; try again shortly",
    )


def _missed(
    scheduler: Scheduler, ask: PlaceMany, units: Sequence[Sequence[Place]]
) -> tuple[dict[str, Placement], list[Sequence[Place]]]:
    """Those that aren't placed since one that must be with them can't be started, and the other units."""
    missed: dict[str, Placement] = {}
    there: list[Sequence[Place]] = []
    for asks in units:
        reasons = [_why_missed(scheduler, ask, each) for each in asks]
        if not any(reasons):
            there.append(asks)
            continue
        for each, why in zip(asks, reasons, strict=True):
            name = each.need.name or each.need.vm_id
            missed[each.need.vm_id] = _refused(each, f"VM {name} isn't placed: {why}")
    return missed, there


def _why_missed(scheduler: Scheduler, ask: PlaceMany, place: Place) -> str:
    if why := together.missed(scheduler, place, ask.absent):
        return why
    if ask.all_or_nothing and ask.absent:
        return f"all or none were asked for: {next(iter(ask.absent.values()))}"
    return ""


async def _placed(
    scheduler: Scheduler, asks: Sequence[Place], grouped: Mapping[str, int], caller: Caller
) -> list[Placement]:
    """Of one question; nothing when it isn't one any more. Each is answered by what it came to, not by the request's id: that
    is of the whole call."""
    who = Caller(caller.principal)
    grouped = {each.need.cluster_id: grouped[each.need.cluster_id] for each in asks}
    try:
        try:
            if len(asks) == 1:
                if granting.goes_alone(scheduler, asks[0].need):
                    raise granting.OneByOne
                asked = granting.placing(scheduler, asks[0], who, grouped)
                answer = await scheduler.rounds.ask(asked)
                return [
                    answer if isinstance(answer, Placement) else msgspec.json.decode(answer, type=Placement)
                ]
            asked = granting.placing_together(scheduler, asks, who, grouped)
            return _MANY.decode(await scheduler.rounds.ask(asked))
        except granting.OneByOne:
            if len(asks) == 1:
                return [await placing.by_itself(scheduler, asks[0], who)]
            return await _one_after_other(scheduler, asks, who)
    except granting.Regrouped:
        return []
    except Refused as refused:
        return [_refused(ask, refused.message) for ask in asks]


def _refused(ask: Place, message: str) -> Placement:
    return Placement(
        vm_id=ask.need.vm_id, vm_name=ask.need.name, epoch=ask.epoch, purpose=ask.purpose, message=message
    )


async def _one_after_other(scheduler: Scheduler, asks: Sequence[Place], caller: Caller) -> list[Placement]:
    """For VMs of one host that can't be claimed in one statement: each on the same host, and what some got is given back when
    another doesn't fit there. Who crashes in between leaves claims that nobody confirms, which expire."""
    near = await _near(scheduler, asks)
    first, left = {}, list[Place]()
    for ask in asks:
        rows = near.rows.get(ask.need.vm_id, ())
        if (placed := await choice.first_answer(scheduler, ask, rows)) is not None:
            first[ask.need.vm_id] = placed
        else:
            left.append(ask)
            near.rows.pop(ask.need.vm_id, None)
    if not left:
        return list(first.values())
    seen = together.look(scheduler, near, left)
    refused = seen.tell(NAMED_HOSTS)
    for host_id in seen.hosts(HOSTS_TRIED):
        found = await _all_on(scheduler, left, host_id, caller)
        if all(each.host_id for each in found):
            return [*first.values(), *found]
        missing = next(each for each in found if not each.host_id)
        refused = [
            _refused(
                ask,
                f"{_and_mates(left, ask)} must be on one host, and there isn't room for all of them: {missing.message}",
            )
            for ask in left
        ]
    return [*first.values(), *refused]


def _and_mates(asks: Sequence[Place], ask: Place) -> str:
    mates = [each.need.name or each.need.vm_id for each in asks if each is not ask]
    return f"VM {ask.need.name or ask.need.vm_id} and {', '.join(mates)}"


async def _all_on(
    scheduler: Scheduler, asks: Sequence[Place], host_id: str, caller: Caller
) -> list[Placement]:
    """Up to the first that doesn't fit there; then nothing is held."""
    found: list[Placement] = []
    try:
        for ask in asks:
            there = replace(ask, target_host_id=host_id)
            found.append(await placing.by_itself(scheduler, there, caller))
            if not found[-1].host_id:
                break
    except Refused:
        await _give_back(scheduler, asks[: len(found)])
        raise
    if not found[-1].host_id:
        await _give_back(scheduler, asks[: len(found) - 1])
    return found


async def _give_back(scheduler: Scheduler, asks: Iterable[Place]) -> None:
    for ask in asks:
        while rows := [
            r
            for r in await store.claims_of(scheduler.core.pool, ask.need.vm_id)
            if r.public.epoch == ask.epoch
        ]:
            try:
                await scheduler.core.commit(*store.release(rows[0]))
            except Stale:
                continue
            scheduler.gave_back(rows[0].public)


async def _near(scheduler: Scheduler, asks: Sequence[Place]) -> Surroundings:
    return await affinity.surroundings(
        scheduler, [ask.need for ask in asks], {ask.need.vm_id for ask in asks}
    )


async def _tried(scheduler: Scheduler, ask: PlaceMany) -> dict[str, Placement]:
    """On copies of the clusters' hosts, one VM after the other. Promises to survive losses aren't asked."""
    near = await _near(scheduler, ask.places)
    tries: dict[str, Scheduler] = {}
    found, there = _missed(scheduler, ask, together.units(scheduler, ask.places))
    for number, asks in enumerate(there, 1):
        cluster_id = asks[0].need.cluster_id
        if cluster_id not in tries:
            tries[cluster_id] = dataclasses.replace(scheduler, fleet=scheduler.fleet.part(cluster_id))
        found |= _try(tries[cluster_id], near, asks)
        if number % TOGETHER == 0:
            await asyncio.sleep(0)
    if ask.all_or_nothing and not all(each.host_id for each in found.values()):
        return together.without(found)
    return found


def _try(scheduler: Scheduler, near: Surroundings, asks: Sequence[Place]) -> dict[str, Placement]:
    for each in asks:
        if each.purpose is not Purpose.MIGRATE:
            for row in near.rows.pop(each.need.vm_id, ()):
                scheduler.gave_back(row.public)
    seen = together.look(scheduler, near, asks)
    found = {}
    for each, placement in zip(asks, seen.tell(NAMED_HOSTS), strict=True):
        found[each.need.vm_id] = placement
        if placement.host_id:
            claim = choice.claim_of(scheduler, each, placement)
            scheduler.took(claim)
            near.rows.setdefault(each.need.vm_id, []).append(Row(claim, store.ClaimPrivate()))
    return found
