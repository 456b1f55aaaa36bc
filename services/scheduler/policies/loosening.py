"""Loosening: what affinity groups could let go of, so that they no longer exclude a host, as changes of groups.

For one VM, and the groups of the Bound that its placement was asked with. The VM can leave groups (a change of the VM), or
groups can change: a rule between VMs becomes a wish, a host is added to a group's hosts or taken out of them (a change of
the cluster). Each set of changes is tried by asking the groups again, since they reach further than their own VMs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from services.scheduler.policies.affinity import NEGATIVE, POSITIVE, ClusterRules, Group
from services.scheduler.policies.bound import FREE, Bound, Seat, meets, resolve
from volery.contracts.affinity_group import AffinityRule
from volery.contracts.scheduling import Change, ChangeKind

if TYPE_CHECKING:
    from services.scheduler.fleet import Bools, Fleet
    from services.scheduler.policies.request import Request

TRIED_TOGETHER = 8
"""Of so many things to let go of, all pairs are tried; of more, each alone."""
REDUCED = 8
"""How often all that could be let go of is reduced to what one host needs, the best first, when no pair is enough."""


@dataclass(frozen=True, slots=True)
class Tie:
    """One thing that a group could let go of: the VM itself, its rule between VMs, or its rule about the host."""

    group: Group
    field: str
    """vm_ids, vm_enforcing, host_ids"""

    @property
    def kind(self) -> ChangeKind:
        return ChangeKind.VM if self.field == "vm_ids" else ChangeKind.CLUSTER


Ties = tuple[Tie, ...]


def loosened(groups: Sequence[Group], ties: Sequence[Tie], vm_id: str) -> list[Group]:
    """The groups afterwards. A host that is let in is let in by a rule that is no longer there: it is asked of one host."""
    found = {group.id: group for group in groups}
    for tie in ties:
        group = found[tie.group.id]
        match tie.field:
            case "vm_ids":
                group = replace(group, vms=group.vms - {vm_id})
            case "vm_enforcing":
                group = replace(group, vm_enforcing=False)
            case _:
                group = replace(group, host_rule=AffinityRule.DISABLED)
        found[group.id] = group
    return list(found.values())


def _possible(groups: Sequence[Group], vm_id: str, kind: ChangeKind) -> Ties:
    found = []
    for group in groups:
        by_vms = group.binds_vms(POSITIVE) or group.binds_vms(NEGATIVE)
        by_hosts = group.binds_hosts(POSITIVE) or group.binds_hosts(NEGATIVE)
        if vm_id in group.vms and (by_vms or by_hosts):
            found.append(Tie(group, "vm_ids"))
        if by_vms:
            found.append(Tie(group, "vm_enforcing"))
        if by_hosts:
            found.append(Tie(group, "host_ids"))
    return tuple(tie for tie in found if tie.kind is kind)


@dataclass(slots=True)
class Loosening:
    """Tries sets of ties for one request; what a set leaves of the groups is asked once."""

    fleet: Fleet
    request: Request
    rows: NDArray[np.int64]
    groups: Sequence[Group]
    seats: Mapping[str, Seat]

    def bound(self, ties: Ties) -> Bound:
        vm_id = self.request.need.vm_id
        rules = ClusterRules(0, tuple(loosened(self.groups, ties, vm_id)))
        around = rules.around(vm_id)
        return FREE if around is None else resolve(around, rules, self.seats)

    def let_in(self, ties: Ties) -> Bools:
        """Which of the rows no group excludes any more."""
        bound = self.bound(ties)
        mask: Bools = meets(self.fleet, (*bound.vms, *bound.hosts))[self.rows]
        return mask

    def smallest(self, kind: ChangeKind) -> dict[int, Ties]:
        """Position among the rows → the fewest ties of this kind that have to go there; missing where none would do."""
        possible = _possible(self.groups, self.request.need.vm_id, kind)
        if not possible or not self.let_in(possible).any():
            return {}
        found: dict[int, Ties] = {}
        for ties in self._sets(possible):
            for at in np.flatnonzero(self.let_in(ties)).tolist():
                found.setdefault(at, ties)
            if len(found) == len(self.rows):
                return found
        left = np.flatnonzero(self.let_in(possible)).tolist()
        for _ in range(REDUCED):
            first = next((at for at in left if at not in found), None)
            if first is None:
                break
            ties = self._reduced(possible, first)
            for other in np.flatnonzero(self.let_in(ties)).tolist():
                found.setdefault(other, ties)
        return found

    def _sets(self, possible: Ties) -> Iterator[Ties]:
        most = 2 if len(possible) <= TRIED_TOGETHER else 1
        for number in range(1, most + 1):
            yield from combinations(possible, number)

    def _reduced(self, ties: Ties, at: int) -> Ties:
        """Left out one after the other as long as the rest is enough."""
        for tie in ties:
            rest = tuple(each for each in ties if each is not tie)
            if self.let_in(rest)[at]:
                ties = rest
        return ties

    def changes(self, ties: Ties, at: int, excluding: frozenset[str]) -> Iterator[Change]:
        """In words and figures. A change satisfies the rules that would still exclude the host without it."""
        row = int(self.rows[at])
        owed = excluding.difference(*(self._without(ties, tie, row) for tie in ties))
        for number, tie in enumerate(ties):
            rules = (self._without(ties, tie, row) & excluding) | (owed if number == 0 else frozenset())
            yield _told(self.fleet, self.request, tie, row, tuple(sorted(rules, reverse=True)))

    def _without(self, ties: Ties, tie: Tie, row: int) -> frozenset[str]:
        bound = self.bound(tuple(each for each in ties if each is not tie))
        host_id = self.fleet.ids[row]
        rules = {"affinity_vms": bound.vms, "affinity_hosts": bound.hosts}
        return frozenset(
            rule for rule, demands in rules.items() if not all(d.allows(host_id) for d in demands)
        )


def _told(fleet: Fleet, request: Request, tie: Tie, row: int, rules: tuple[str, ...]) -> Change:
    group, host = tie.group, fleet.names[row]
    current = wanted = ""
    match tie.field:
        case "vm_ids":
            current, unit = request.need.vm_id, "VMs"
            sentence = f"take {request.vm} out of affinity group {group.name}"
        case "vm_enforcing":
            current, wanted, unit = "true", "false", ""
            sentence = f"make the VM rule of affinity group {group.name} a wish"
        case _ if group.binds_hosts(POSITIVE):
            wanted, unit = fleet.ids[row], "hosts"
            sentence = f"add {host} to the hosts of affinity group {group.name}"
        case _:
            current, unit = fleet.ids[row], "hosts"
            sentence = f"take {host} out of the hosts of affinity group {group.name}"
    return Change(
        rules=rules, kind=tie.kind, object_kind="affinity_group", object_id=group.id, object_name=group.name,
        field=tie.field, current=current, wanted=wanted, unit=unit, sentence=sentence,
    )  # fmt: skip
