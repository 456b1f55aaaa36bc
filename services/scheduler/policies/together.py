"""Several VMs that must be on one host: which hosts take all of them, by the rules that each of them has. Pure.

What they take of a host adds up, so those filters are asked once more, of one VM that takes all of it; every other filter is
asked of each. The best host is the one whose weights for all of them come to most.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from msgspec.structs import replace

from services.scheduler.fleet import Bools, Fleet
from services.scheduler.pages import KIB, SIZES, total
from services.scheduler.policies.decision import Decision, hopeless, sentence
from services.scheduler.policies.filters import FILTERS, Filter
from services.scheduler.policies.remedies import remedies
from services.scheduler.policies.request import Request
from volery.contracts.scheduling import ChangeKind, HostVerdict, Remedy, Verdict

ADDING_UP = ("cpu_overcommit", "memory", "huge_pages")
"""Filters about what VMs take of a host."""
SHARED = ("host_state", "cluster_maintenance", "cpu_overload", "swap")
"""Filters that say the same to each of them: what mends them for one mends them for all."""
NAMED_VMS = 5


@dataclass(frozen=True)
class Unit:
    """VMs of one cluster, and what every rule says of every host that would take all of them."""

    fleet: Fleet
    members: Sequence[Request]
    each: Sequence[Decision]
    """What the rules say to each of them alone."""
    whole: Request
    """One VM that takes what all of them take."""
    decision: Decision

    @property
    def fits(self) -> bool:
        return self.decision.best is not None

    @property
    def hopeless(self) -> bool:
        """What may be on its way to this replica would not help."""
        asked = ((self.whole, self.decision), *zip(self.members, self.each, strict=True))
        return any(hopeless(self.fleet, request, decision) for request, decision in asked)

    @cached_property
    def remedies(self) -> tuple[Remedy, ...]:
        """The smallest changes that would let a host take all of them, where what they add up to stands against that, or what
        says the same to each. That one of them asks for less isn't looked for."""
        if self.fits:
            return ()
        masks = self.decision.masks
        other = [mask for rule, mask in masks.items() if rule not in (*ADDING_UP, *SHARED)]
        rows = np.flatnonzero(np.logical_and.reduce([self.decision.considered, *other]))
        if len({request.need.hugepage_kib for request in self.members}) > 1:
            rows = rows[masks["huge_pages"][rows]] if "huge_pages" in masks else rows
        found = remedies(self.fleet, self.whole, masks, rows)
        return tuple(r for r in found if all(c.kind is not ChangeKind.VM for c in r.changes))

    def hosts(self, most: int) -> tuple[HostVerdict, ...]:
        """Host by host, the best first, no more than `most`."""
        return tuple(self._verdict(row) for row in self.decision.first(most).tolist())

    def sentence(self, hosts: Sequence[HostVerdict], groups: Sequence[str]) -> str:
        said = sentence(self.fleet, self.whole, self.decision, hosts, self.remedies)
        kept = f"affinity group{'s' if len(groups) > 1 else ''} {' and '.join(groups)}"
        if self.fits:
            return f"{said}; {kept} keep{'s' if len(groups) == 1 else ''} them together"
        return (
            f"{said}. They are started together or not at all: {kept} keep{'s' if len(groups) == 1 else ''} them on one host; "
            "take a VM out of it, or make its VM rule a wish, to let them run apart"
        )

    def _verdict(self, row: int) -> HostVerdict:
        fleet, decision = self.fleet, self.decision
        if decision.fits[row]:
            weights = {name: round(float(score[row]), 4) for name, score in decision.scores.items()}
            weight = round(float(decision.total[row]), 4)
            return HostVerdict(
                host_id=fleet.ids[row], name=fleet.names[row], fits=True, weight=weight, weights=weights
            )
        against = [
            rule for rule in FILTERS if rule.name in decision.masks and not decision.masks[rule.name][row]
        ]
        verdicts = []
        for rule in against:
            said = dict.fromkeys(self._said(rule, row))
            message, change = ("; ".join(dict.fromkeys(parts)) for parts in zip(*said, strict=True))
            verdicts.append(Verdict(rule=rule.name, passed=False, message=message, change=change))
        return HostVerdict(host_id=fleet.ids[row], name=fleet.names[row], verdicts=tuple(verdicts))

    def _said(self, rule: Filter, row: int) -> Iterator[tuple[str, str]]:
        """Why the rule excludes the host, and the smallest change: of all of them, or of those that it stands against."""
        if rule.name in ADDING_UP:
            for asked in (
                _by_page_size(self.whole, self.members) if rule.name == "huge_pages" else (self.whole,)
            ):
                if not rule.mask(self.fleet, asked)[row]:
                    yield rule.explain(self.fleet, asked, row)
            return
        refused = [r for r, d in zip(self.members, self.each, strict=True) if not d.masks[rule.name][row]]
        for request in refused:
            message, change = rule.explain(self.fleet, request, row)
            named = request.vm in message or len(refused) == len(self.members)
            yield (message if named else f"for {request.vm}: {message}"), change


def unit(fleet: Fleet, members: Sequence[Request], each: Sequence[Decision]) -> Unit:
    """What was decided about each, put together. Raises ValueError for VMs of several clusters."""
    whole = _whole(members)
    masks = {rule: _all([decision.masks[rule] for decision in each]) for rule in each[0].masks}
    for rule in FILTERS:
        if rule.name in ADDING_UP and rule.name in masks:
            masks[rule.name] = masks[rule.name] & rule.mask(fleet, whole)
    decision = Decision(
        considered=_all([one.considered for one in each]),
        target=_all([one.target for one in each]),
        fits=_all([fleet.everyone, *masks.values()]),
        masks=masks,
        everyone=fleet.everyone,
        total=np.sum([one.total for one in each], axis=0).round(9),
        scores={name: np.sum([one.scores[name] for one in each], axis=0) for name in each[0].scores},
        ranks=fleet.ranks(),
    )
    return Unit(fleet, members, each, whole, decision)


def _all(masks: Sequence[Bools]) -> Bools:
    found: Bools = np.logical_and.reduce(masks)
    return found


def _whole(members: Sequence[Request]) -> Request:
    first = members[0]
    if len({request.need.cluster_id for request in members}) > 1:
        raise ValueError("VMs that must be on one host are of one cluster")
    shared = [request for request in members if request.wish is None or not request.wish.alone]
    need = replace(
        first.need,
        name=names([request.need.name or request.need.vm_id for request in members]),
        memory_bytes=sum(request.need.memory_bytes for request in members),
        vcpus=sum(request.need.vcpus for request in shared),
        hugepage_kib=max(request.need.hugepage_kib for request in members),
    )
    return dataclasses.replace(
        first,
        place=replace(first.place, need=need),
        memory=sum(request.memory for request in members),
        overhead=sum(request.overhead for request in members),
        pages=total(request.pages for request in members),
        wish=None,
    )


def _by_page_size(whole: Request, members: Sequence[Request]) -> Iterator[Request]:
    """What they add up to of each size of huge pages."""
    for number, size in enumerate(SIZES):
        if count := whole.pages[number]:
            need = replace(whole.need, hugepage_kib=size // KIB)
            pages = type(whole.pages)(*(count if n == number else 0 for n in range(len(SIZES))))
            yield dataclasses.replace(whole, place=replace(whole.place, need=need), pages=pages)


def names(found: Sequence[str]) -> str:
    """After the word VM."""
    first, *rest = found
    if not rest:
        return first
    shown = rest[: NAMED_VMS - 1]
    more = [f"{len(rest) - len(shown)} more"] if len(rest) > len(shown) else []
    *some, last = [*shown, *more]
    return f"{first} together with {', '.join(some)}{' and ' if some else ''}{last}"
