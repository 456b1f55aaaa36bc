"""Placing several VMs as one question: those that must be on one host are chosen together, and all are granted or none.

What is decided is drawn up first; only when every one of them has a place does the round's ledger take it over, so that one
commit has all of their claims or none.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from services.scheduler import affinity, choice, decision_store
from services.scheduler.affinity import Surroundings
from services.scheduler.policies import together
from services.scheduler.policies.affinity import POSITIVE
from services.scheduler.policies.decision import NAMED_HOSTS
from services.scheduler.policies.together import Unit
from services.scheduler.state import Scheduler
from volery.contracts.base import encode
from volery.contracts.ids import new_id
from volery.contracts.scheduling import Place, Placement, Purpose

if TYPE_CHECKING:
    from services.scheduler.granting import Ledger

DECIDED_TOGETHER = 16
"""VMs after which others get their turn."""


def units(scheduler: Scheduler, asks: Sequence[Place]) -> list[list[Place]]:
    """Those that enforcing positive groups keep on one host, each in the place of its first; all others by themselves. What
    moves is by itself, since one of them has to be the first to move."""
    found: dict[tuple[str, frozenset[str]], list[Place]] = {}
    for ask in asks:
        need, rules = ask.need, scheduler.rules.get(ask.need.cluster_id)
        alone = rules is None or ask.purpose is Purpose.MIGRATE
        union = frozenset({need.vm_id}) if rules is None or alone else rules.union(need.vm_id)
        found.setdefault((need.cluster_id, union), []).append(ask)
    return list(found.values())


def missed(scheduler: Scheduler, ask: Place, absent: Mapping[str, str]) -> str:
    """Why another VM that must be with it can't be there, as half a sentence; "" when none is missing."""
    rules = scheduler.rules.get(ask.need.cluster_id)
    if not absent or rules is None or ask.purpose is Purpose.MIGRATE:
        return ""
    vm_id = next((each for each in sorted(rules.union(ask.need.vm_id)) if each in absent), "")
    if not vm_id:
        return ""
    groups = [group.name for group, _ in rules.way(ask.need.vm_id, vm_id)]
    kept = f"affinity group{'s' if len(groups) > 1 else ''} {' and '.join(groups)}"
    return f"{kept} keep{'s' if len(groups) == 1 else ''} it on one host with a VM that can't be started: {absent[vm_id]}"


def revisions(scheduler: Scheduler, asks: Sequence[Place]) -> dict[str, int]:
    """Cluster → of its rules, by which it is known who must be together."""
    ids = {ask.need.cluster_id for ask in asks}
    return {each: scheduler.rules[each].revision if each in scheduler.rules else -1 for each in ids}


@dataclass(frozen=True, slots=True)
class Seen:
    """What the rules say of one unit, told only when somebody asks."""

    fits: bool
    hopeless: bool
    tell: Callable[[int], list[Placement]]
    """How many hosts are explained → the placements, not claimed or kept yet."""
    hosts: Callable[[int], list[str]]
    """The best so many that take all of them."""


def look(scheduler: Scheduler, near: Surroundings, asks: Sequence[Place]) -> Seen:
    """`asks` are of one unit; they are nowhere yet, whatever was heard of them."""
    ids = {ask.need.vm_id for ask in asks}
    near = replace(near, vms={vm_id: vm for vm_id, vm in near.vms.items() if vm_id not in ids})
    looks = [choice.look(scheduler, ask, affinity.bound_of(scheduler, ask.need, near)) for ask in asks]
    if len(looks) == 1:
        only = looks[0]
        return Seen(only.fits, only.hopeless, lambda most: [only.told(most)], only.best)
    unit = together.unit(scheduler.fleet, [each.asked for each in looks], [each.decision for each in looks])
    groups = _keepers(scheduler, asks)

    def best(count: int) -> list[str]:
        rows = unit.decision.first(count).tolist()
        return [scheduler.fleet.ids[row] for row in rows if unit.decision.fits[row]]

    return Seen(unit.fits, unit.hopeless, lambda most: _told(unit, groups, most), best)


def _keepers(scheduler: Scheduler, asks: Sequence[Place]) -> list[str]:
    """Names of the groups that keep them together."""
    groups = scheduler.rules[asks[0].need.cluster_id].groups_of([ask.need.vm_id for ask in asks])
    return [group.name for group in groups if group.binds_vms(POSITIVE)]


def _told(unit: Unit, groups: Sequence[str], most: int) -> list[Placement]:
    fleet, decision, recipe = unit.fleet, unit.decision, unit.whole.recipe
    hosts = unit.hosts(most)
    whole = Placement(
        vm_id="",
        epoch=0,
        host_id=fleet.ids[decision.best] if decision.best is not None else "",
        hosts=hosts,
        message=unit.sentence(hosts, groups),
        considered=int(np.count_nonzero(decision.considered)),
        fitting=decision.fitting,
        excluded_by=decision.excluded_by(),
        remedies=unit.remedies,
        policy_id=recipe.id,
        policy_name=recipe.name,
        policy_revision=recipe.revision,
        selector=recipe.selector,
    )
    ids = [request.need.vm_id for request in unit.members]
    return [
        msgspec.structs.replace(
            whole,
            vm_id=request.need.vm_id,
            vm_name=request.need.name,
            epoch=request.place.epoch,
            purpose=request.place.purpose,
            together=tuple(vm_id for vm_id in ids if vm_id != request.need.vm_id),
        )
        for request in unit.members
    ]


@dataclass(slots=True)
class Draft:
    """Of all that one question asks for: placements by VM, and whether it would be worth while to wait for news."""

    first: dict[str, Placement] = field(default_factory=dict)
    """Those that were placed under this epoch before."""
    found: dict[str, Placement] = field(default_factory=dict)
    refused: bool = False
    hopeful: bool = False

    @property
    def answer(self) -> dict[str, Placement]:
        return self.first | (without(self.found) if self.refused else self.found)


async def draw_up(ledger: Ledger, asks: Sequence[Place]) -> Draft:
    """Writes into the ledger what would be claimed. Raises Refused(conflict) for a question from the past."""
    scheduler, draft, decided = ledger.scheduler, Draft(), 0
    for unit in units(scheduler, asks):
        left = []
        for ask in unit:
            rows = ledger.near.rows.get(ask.need.vm_id, ())
            if (first := await choice.first_answer(scheduler, ask, rows)) is not None:
                draft.first[ask.need.vm_id] = first
            else:
                left.append(ask)
        if left:
            _place(ledger, left, draft)
        decided += len(left)
        if decided >= DECIDED_TOGETHER:
            decided = 0
            await asyncio.sleep(0)
    return draft


def _place(ledger: Ledger, asks: Sequence[Place], draft: Draft) -> None:
    scheduler = ledger.scheduler
    for ask in asks:
        if ask.purpose is not Purpose.MIGRATE:
            ledger.release(tuple(ledger.near.rows.get(ask.need.vm_id, ())))
    seen = look(scheduler, ledger.near, asks)
    placements = seen.tell(NAMED_HOSTS if seen.fits else choice.shown(scheduler.config))
    if not seen.fits:
        draft.refused, draft.hopeful = True, draft.hopeful or not seen.hopeless
    for ask, told in zip(asks, placements, strict=True):
        placement = msgspec.structs.replace(told, decision_id=new_id(), claimed=seen.fits)
        draft.found[ask.need.vm_id] = placement
        ledger.decisions.append(decision_store.keep_decision(encode(placement), choice.in_short(placement)))
        if seen.fits:
            ledger.take(ask, choice.claim_of(scheduler, ask, placement), placement.decision_id)


def without(found: Mapping[str, Placement]) -> dict[str, Placement]:
    """Some found no place, so none has one."""
    missing = next(placement for placement in found.values() if not placement.host_id)
    why = f"VM {missing.vm_name or missing.vm_id} finds no place, and all or none were asked for: {missing.message}"

    def told(placement: Placement) -> Placement:
        if not placement.host_id:
            return placement
        name = placement.vm_name or placement.vm_id
        return Placement(
            vm_id=placement.vm_id,
            epoch=placement.epoch,
            vm_name=placement.vm_name,
            purpose=placement.purpose,
            considered=placement.considered,
            fitting=placement.fitting,
            message=f"VM {name} isn't placed, though a host would take it. {why}",
        )

    return {vm_id: told(placement) for vm_id, placement in found.items()}
