"""Granting: one round of placements, confirmations and releases, decided one after the other in memory and committed in one statement.

What is decided is booked in this replica's fleet at once, so that the next decision, also of the next round, sees it. The
guards of the statement have the last word: when one fails nothing was written, what was booked is taken back, the hosts
concerned are read again and all decide again. Who has lost three times gets a round of its own.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from msgspec import Raw
from msgspec.structs import replace

from services.scheduler import (
    affinity,
    choice,
    decision_store,
    model,
    round_store,
    store,
    together,
    wanting,
)
from services.scheduler.affinity_store import ClaimRow
from services.scheduler.policies.decision import NAMED_HOSTS
from services.scheduler.round_store import HostChange
from services.scheduler.rounds import Rounds, Waiting
from services.scheduler.state import Scheduler
from volery.contracts.base import Done, encode
from volery.contracts.cpus import PinningPolicy
from volery.contracts.errors import Kind, Refused
from volery.contracts.ids import new_id
from volery.contracts.scheduling import Claim, Need, Place, Placement, Purpose
from volery.runtime.bus import Caller
from volery.runtime.core import Repeated
from volery.runtime.tables import Change, Row, Stale, Taken

DONE = encode(Done())
TRIES = 50
"""Rounds lost in a row before a question gives up: each means that somebody else got something."""
TOGETHER = 3
"""Rounds lost with others; after that it goes alone, so that it keeps nobody back."""
DECIDED_TOGETHER = 16
"""Decisions after which others get their turn."""


class Regrouped(Exception):
    """Who must be together has changed since the question was made of its VMs."""


class OneByOne(Exception):
    """Not in a round: a placement in a cluster that promises to survive losses (promising.py), and whoever takes or gives back
    more of a host than its counters, since one row can't be written twice in a statement."""


def has_parts(claim: Claim) -> bool:
    """Parts of a host of its own: NUMA cells, physical CPUs, or devices."""
    return bool(claim.cells or claim.cpu_pinning or claim.devices)


@dataclass(slots=True, eq=False, kw_only=True)
class Asked(Waiting):
    """A placement (`place`), several that are granted all or none (`together`), the confirmation of the claim of an epoch (`confirm`), or the release of those of the VM's claims
    that have or don't have these epochs."""

    caller: Caller
    place: Place | None = None
    together: Sequence[Place] = ()
    grouped: Mapping[str, int] | None = None
    """Cluster → revision of its rules by which it is one question; None: it doesn't depend on them."""
    patient: bool = True
    """That no host fits isn't to be said yet."""
    possible: Sequence[str] = ()
    """Hosts of which something might be on its way that lets the VM in."""
    confirm: int | None = None
    epochs: frozenset[int] = frozenset()
    keep: bool = False
    """These epochs' claims are the ones that stay."""

    @property
    def places(self) -> Sequence[Place]:
        return self.together or ((self.place,) if self.place is not None else ())

    def releases(self, claim: Claim) -> bool:
        return (claim.epoch in self.epochs) is not self.keep


def goes_alone(scheduler: Scheduler, need: Need) -> bool:
    """Not in a round, as far as can be told before its claims are read."""
    parts = bool(need.numa_nodes or need.host_devices) or need.cpu_pinning.policy is not PinningPolicy.NONE
    return parts or scheduler.policy(need.cluster_id).promises


def placing(
    scheduler: Scheduler, ask: Place, caller: Caller, grouped: Mapping[str, int] | None = None
) -> Asked:
    keys = frozenset(affinity.groups_of(scheduler, ask.need))
    return Asked(vm_id=ask.need.vm_id, keys=keys, caller=caller, place=ask, grouped=grouped)


def placing_together(
    scheduler: Scheduler, asks: Sequence[Place], caller: Caller, grouped: Mapping[str, int]
) -> Asked:
    first, *mates = (ask.need.vm_id for ask in asks)
    keys = frozenset(key for ask in asks for key in affinity.groups_of(scheduler, ask.need))
    return Asked(
        vm_id=first, mates=frozenset(mates), keys=keys, caller=caller, together=asks, grouped=grouped
    )


def rounds_of(scheduler: Scheduler) -> Rounds[Asked]:
    return Rounds(partial(play, scheduler))


@dataclass(slots=True)
class Ledger:
    """What a round will write, and to whom it will answer then."""

    scheduler: Scheduler
    near: affinity.Surroundings
    booked: list[tuple[Claim, int]] = field(default_factory=list)
    """Claims made (1) and given back (-1)."""
    inserts: list[Change] = field(default_factory=list)
    released: list[ClaimRow] = field(default_factory=list)
    updates: list[Change] = field(default_factory=list)
    """Of claims that are confirmed."""
    decisions: list[Change] = field(default_factory=list)
    cluster_ids: set[str] = field(default_factory=set)
    placements: dict[str, int] = field(default_factory=dict)
    """Group → how many of its VMs are placed."""
    answers: list[tuple[Asked, bytes]] = field(default_factory=list)

    def release(self, rows: Iterable[ClaimRow]) -> None:
        """Raises OneByOne before anything is noted."""
        found = tuple(rows)
        if any(has_parts(row.public) for row in found):
            raise OneByOne
        for row in found:
            self._release(row)

    def _release(self, row: ClaimRow) -> None:
        self.released.append(row)
        self.near.rows[row.public.vm_id].remove(row)
        self._book(row.public, -1)

    def take(self, ask: Place, claim: Claim, decision_id: str) -> None:
        private = store.ClaimPrivate(decision_id=decision_id)
        self.inserts.append(store.CLAIMS.insert(claim, private))
        self.near.rows.setdefault(claim.vm_id, []).append(Row(claim, private))
        self.cluster_ids.add(ask.need.cluster_id)
        for group_id in affinity.groups_of(self.scheduler, ask.need):
            self.placements[group_id] = self.placements.get(group_id, 0) + 1
        self._book(claim, 1)

    def draft(self, vm_ids: Iterable[str]) -> Ledger:
        """To write into what may come to nothing for these VMs: then it is closed."""
        own = {vm_id: list(self.near.rows.get(vm_id, ())) for vm_id in vm_ids}
        return Ledger(self.scheduler, dataclasses.replace(self.near, rows=self.near.rows | own))

    def absorb(self, draft: Ledger) -> None:
        self.near.rows = draft.near.rows
        self.booked += draft.booked
        self.inserts += draft.inserts
        self.released += draft.released
        self.decisions += draft.decisions
        self.cluster_ids |= draft.cluster_ids
        for group_id, more in draft.placements.items():
            self.placements[group_id] = self.placements.get(group_id, 0) + more

    def _book(self, claim: Claim, times: int) -> None:
        self.booked.append((claim, times))
        self.scheduler.fleet.book(claim.host_id, *store.held(claim, times))
        if times > 0:
            self.scheduler.fleet.share(claim.host_id, claim.vcpus)

    def close(self, *, committed: bool) -> None:
        for claim, times in self.booked:
            self.scheduler.fleet.booked(claim.host_id, *store.held(claim, times), committed=committed)
        self.booked.clear()

    def changes(self) -> list[Change]:
        """Guards first, then hosts in the order of their ids: the order of locks that all placements have."""
        found = [affinity.guard(self.scheduler, each) for each in sorted(self.cluster_ids)]
        if self.placements:
            counted = {g: (self.near.counted.get(g, -1), more) for g, more in self.placements.items()}
            found.append(round_store.next_placements(counted))
        if self.booked:
            hosts: dict[str, HostChange] = {}
            for claim, times in self.booked:
                hosts.setdefault(claim.host_id, HostChange()).add(claim, times)
            found += round_store.change_capacity(hosts)
        if self.released:
            found.append(round_store.delete_claims(self.released))
        if self.updates:
            found.append(round_store.update_claims(self.updates))
        if self.inserts:
            found.append(round_store.insert_claims(self.inserts))
        if self.decisions:
            found.append(round_store.keep_decisions(self.decisions))
        return found


async def play(scheduler: Scheduler, members: Sequence[Asked]) -> list[Asked]:
    """Those who lost, for another round."""
    needs = [ask.need for member in members for ask in member.places]
    vm_ids = frozenset[str]().union(*(member.vm_ids for member in members))
    near = await affinity.surroundings(scheduler, needs, vm_ids)
    ledger = Ledger(scheduler, near)
    later: list[Asked] = []
    committed = False
    try:
        for number, member in enumerate(members, 1):
            await _enter(ledger, member, later)
            if number % DECIDED_TOGETHER == 0:
                await asyncio.sleep(0)
        await _commit(ledger)
        committed = True
    except (Stale, Taken, Repeated) as lost:
        left = [member for member in members if not member.answer.done()]
        return await _lost(ledger, left, lost)
    finally:
        ledger.close(committed=committed)
    for member, body in ledger.answers:
        member.resolve(Raw(body))
    for member in later:
        member.patient = False
        scheduler.rounds.join_after(member, scheduler.hear_more(member.possible))
    return []


async def _enter(ledger: Ledger, member: Asked, later: list[Asked]) -> None:
    try:
        if member.grouped not in (None, together.revisions(ledger.scheduler, member.places)):
            raise Regrouped
        if member.together:
            await _place_together(ledger, member, later)
        elif member.place is not None:
            await _place(ledger, member, member.place, later)
        elif member.confirm is not None:
            _confirm(ledger, member, member.confirm)
        else:
            _release(ledger, member)
    except (Refused, OneByOne, Regrouped) as refused:
        member.fail(refused)


def _confirm(ledger: Ledger, member: Asked, epoch: int) -> None:
    """Raises Refused(not_found) for a claim that was given back meanwhile."""
    rows = ledger.near.rows.get(member.vm_id, ())
    row = next((row for row in rows if row.public.epoch == epoch), None)
    if row is None:
        raise Refused(
            Kind.NOT_FOUND,
            f"VM {member.vm_id} holds no claim under epoch {epoch}: it was released, or expired before it was confirmed; "
            "place the VM again",
            vm_id=member.vm_id,
            epoch=epoch,
        )
    if row.public.state != model.CONFIRMED:
        ledger.updates.append(store.CLAIMS.update(row, replace(row.public, state=model.CONFIRMED)))
    ledger.answers.append((member, DONE))


def _release(ledger: Ledger, member: Asked) -> None:
    rows = ledger.near.rows.get(member.vm_id, ())
    ledger.release(row for row in rows if member.releases(row.public))
    ledger.answers.append((member, DONE))


async def _place(ledger: Ledger, member: Asked, ask: Place, later: list[Asked]) -> None:
    scheduler = ledger.scheduler
    if goes_alone(scheduler, ask.need):
        raise OneByOne
    rows = ledger.near.rows.get(member.vm_id, ())
    if (first := await choice.first_answer(scheduler, ask, rows)) is not None:
        member.resolve(first)
        return
    if ask.purpose is not Purpose.MIGRATE:
        # Who starts a VM has made sure that it runs nowhere: what it held before is free, also for itself.
        ledger.release(rows)
    look = choice.look(scheduler, ask, affinity.bound_of(scheduler, ask.need, ledger.near))
    if not look.fits and member.patient and not look.hopeless:
        later.append(member)
        member.possible = look.possible
        return
    told = look.told(NAMED_HOSTS if look.fits else choice.shown(scheduler.config))
    placement = replace(told, decision_id=new_id(), claimed=look.fits)
    body = encode(placement)
    ledger.decisions.append(decision_store.keep_decision(body, choice.in_short(placement)))
    ledger.answers.append((member, body))
    if not placement.host_id:
        wanting.note(scheduler, ask)
    else:
        ledger.take(ask, choice.claim_of(scheduler, ask, placement), placement.decision_id)


async def _place_together(ledger: Ledger, member: Asked, later: list[Asked]) -> None:
    """All of them, or none. What would have been claimed isn't even tried to be written."""
    if any(goes_alone(ledger.scheduler, ask.need) for ask in member.together):
        raise OneByOne
    draft, drawn = ledger.draft(member.vm_ids), None
    try:
        drawn = await together.draw_up(draft, member.together)
    finally:
        if drawn is None or drawn.refused:
            draft.close(committed=False)
    if drawn.refused and drawn.hopeful and member.patient:
        later.append(member)
        return
    found = drawn.answer
    if not drawn.refused:
        ledger.absorb(draft)
    else:
        wanting.note(ledger.scheduler, *_first_without_place(ledger.scheduler, member.together, drawn.found))
        ledger.decisions += [
            decision_store.keep_decision(encode(each), choice.in_short(each))
            for each in found.values()
            if each.decision_id and not each.claimed
        ]
    ledger.answers.append((member, encode([found[ask.need.vm_id] for ask in member.together])))


def _first_without_place(
    scheduler: Scheduler, asks: Sequence[Place], found: Mapping[str, Placement]
) -> Sequence[Place]:
    """Of several units those that must be on one host and found none."""
    missing = {vm_id for vm_id, placement in found.items() if not placement.host_id}
    return next(
        unit
        for unit in together.units(scheduler, asks)
        if not missing.isdisjoint(ask.need.vm_id for ask in unit)
    )


async def _commit(ledger: Ledger) -> None:
    answers = [(member.caller, body) for member, body in ledger.answers]
    if changes := ledger.changes():
        await ledger.scheduler.core.commit(*changes, answers=answers)
    elif answers:
        await ledger.scheduler.core.commit(answers=answers)


async def _lost(ledger: Ledger, members: Sequence[Asked], lost: Exception) -> list[Asked]:
    """What this replica believed is read again: the hosts, groups and policies that the round was about."""
    if len(members) == 1 and not _decides_again(lost):
        members[0].fail(lost)
        return []
    await ledger.scheduler.read_hosts(sorted({claim.host_id for claim, _ in ledger.booked}))
    for cluster_id in sorted(ledger.cluster_ids):
        await ledger.scheduler.read_rules(cluster_id)
    again = []
    for member in members:
        member.tries += 1
        member.alone = member.tries >= TOGETHER or not isinstance(lost, Stale)
        if member.tries < TRIES:
            again.append(member)
        else:
            member.fail(_gives_up(member))
    return again


def _decides_again(lost: Exception) -> bool:
    """A VM that holds a claim by now gets that one."""
    return isinstance(lost, Stale) or (isinstance(lost, Taken) and lost.constraint == store.CLAIM_TAKEN)


def _gives_up(member: Asked) -> Refused:
    name = member.places[0].need.name if member.places else ""
    return Refused(
        Kind.EXHAUSTED, f"VM {name or member.vm_id} lost its place to others {TRIES} times; try again shortly"
    )
