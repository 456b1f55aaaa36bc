"""What affinity groups ask of one placement: which hosts are left and why, and which are wished for.

`resolve` turns the rules around a VM and the places of the VMs they name into demands and wishes; the filters
`affinity_vms` and `affinity_hosts` and the weights `affinity_vms_wish`, `affinity_hosts_wish` and `affinity_room` read
them (filters.py and weights.py have their rows).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from services.scheduler.fleet import Bools, Fleet, Floats, Ints
from services.scheduler.policies import resized
from services.scheduler.policies.affinity import NEGATIVE, POSITIVE, Around, ClusterRules, Group

if TYPE_CHECKING:
    from services.scheduler.policies.request import Request

FEW = 6
"""Wishes that are looked at without sorting hosts: of so many, a table of all combinations is small."""
NAMED = 3
"""Hosts that a sentence names."""


@dataclass(frozen=True, slots=True)
class Seat:
    """Where a VM is, or will be: hosts of its claims and where it runs; none when it is nowhere. Figures are what it
    takes of a host: bytes with overhead, and vCPUs."""

    name: str
    host_ids: frozenset[str] = frozenset()
    memory: int = 0
    vcpus: int = 0


@dataclass(frozen=True, slots=True)
class Demand:
    """Only these hosts, or (not `inside`) none of them."""

    host_ids: frozenset[str]
    inside: bool
    groups: tuple[str, ...]
    """Names of the groups that say so."""
    vm: str = ""
    """The VM whose place decides it, or the one that the group names."""
    moving: bool = False
    """That VM may be on either of several hosts."""

    def allows(self, host_id: str) -> bool:
        return (host_id in self.host_ids) is self.inside


@dataclass(frozen=True, slots=True)
class Wish:
    """One group's rule that isn't enforcing: broken on hosts outside of these, or (not `inside`) on them."""

    priority: float
    host_ids: frozenset[str]
    inside: bool


@dataclass(frozen=True, slots=True)
class Bound:
    """All that affinity groups ask of one placement."""

    vms: tuple[Demand, ...] = ()
    hosts: tuple[Demand, ...] = ()
    vm_wishes: tuple[Wish, ...] = ()
    host_wishes: tuple[Wish, ...] = ()
    room: tuple[int, int] = (0, 0)
    """Memory and vCPUs of the VMs that must follow it to its host."""
    groups: tuple[Group, ...] = ()
    """All that had a say, and `seats`: where their VMs are. From these it can be asked what would be if one let go."""
    seats: Mapping[str, Seat] = field(default_factory=dict)


FREE = Bound()


def resolve(around: Around, rules: ClusterRules, seats: Mapping[str, Seat]) -> Bound:
    """`seats` has the VMs of `around.others` that exist."""
    return Bound(
        vms=(*_with(around, rules, seats), *_without(around, seats)),
        hosts=tuple(
            Demand(
                group.hosts,
                group.binds_hosts(POSITIVE),
                _names(rules, around, mate, group),
                _name(seats, mate),
            )
            for group, mate in around.hosts
        ),
        vm_wishes=tuple(_vm_wishes(around, seats)),
        host_wishes=tuple(
            Wish(group.priority, group.hosts, group.binds_hosts(POSITIVE, enforcing=False))
            for group in around.wishes
            if group.binds_hosts(POSITIVE, enforcing=False) or group.binds_hosts(NEGATIVE, enforcing=False)
        ),
        room=_followers(around, seats),
        groups=around.groups,
        seats=seats,
    )


def _name(seats: Mapping[str, Seat], vm_id: str) -> str:
    return seats[vm_id].name if vm_id in seats else ""


def _names(rules: ClusterRules, around: Around, mate: str, *groups: Group) -> tuple[str, ...]:
    """The groups of the way from the VM to the one that decides, and these."""
    steps = [step for step, _ in rules.way(around.vm_id, mate)]
    return tuple(dict.fromkeys(group.name for group in (*steps, *groups)))


def _with(around: Around, rules: ClusterRules, seats: Mapping[str, Seat]) -> Iterator[Demand]:
    """Where its union is. One that is apart already, since it ran before the rule, may be joined at each of its places;
    while one of it moves nobody can say where it will be."""
    placed = {v: seats[v] for v in sorted(around.union - {around.vm_id}) if v in seats and seats[v].host_ids}
    moving = [(v, seat) for v, seat in placed.items() if len(seat.host_ids) > 1]
    for vm_id, seat in moving:
        yield Demand(frozenset(), True, _names(rules, around, vm_id), seat.name, moving=True)
    if placed and not moving:
        vm_id, seat = next(iter(placed.items()))
        everywhere = frozenset(host_id for each in placed.values() for host_id in each.host_ids)
        yield Demand(everywhere, True, _names(rules, around, vm_id), seat.name)


def _without(around: Around, seats: Mapping[str, Seat]) -> Iterator[Demand]:
    for rival, groups in sorted(around.rivals.items()):
        if rival != around.vm_id and rival in seats and seats[rival].host_ids:
            yield Demand(seats[rival].host_ids, False, tuple(g.name for g in groups), seats[rival].name)


def _vm_wishes(around: Around, seats: Mapping[str, Seat]) -> Iterator[Wish]:
    for group in around.wishes:
        inside = group.binds_vms(POSITIVE, enforcing=False)
        if not inside and not group.binds_vms(NEGATIVE, enforcing=False):
            continue
        mates = (seats[v].host_ids for v in group.vms - {around.vm_id} if v in seats)
        hosts = frozenset[str]().union(*mates)
        if hosts:
            yield Wish(group.priority, hosts, inside)


def _followers(around: Around, seats: Mapping[str, Seat]) -> tuple[int, int]:
    """What the rest of its union would take; nothing once one of it is placed, which decides the host."""
    mates = [seats[v] for v in around.union - {around.vm_id} if v in seats]
    if any(seat.host_ids for seat in mates):
        return 0, 0
    return sum(seat.memory for seat in mates), sum(seat.vcpus for seat in mates)


# Filters


def meets(fleet: Fleet, demands: Sequence[Demand]) -> Bools:
    """Hosts that meet all of these. Hosts that are to be left out are gathered first, since those may be many demands."""
    if not demands:
        return fleet.everyone
    mask = fleet.everyone.copy()
    left_out: set[str] = set()
    for demand in demands:
        if demand.inside:
            mask &= fleet.among(demand.host_ids)
        else:
            left_out |= demand.host_ids
    if left_out:
        mask &= ~fleet.among(left_out)
    return mask


def suits_vms(fleet: Fleet, request: Request) -> Bools:
    return meets(fleet, request.bound.vms)


def suits_hosts(fleet: Fleet, request: Request) -> Bools:
    return meets(fleet, request.bound.hosts)


def _said(sentences: Sequence[tuple[str, str]]) -> tuple[str, str]:
    """Several reasons and their changes; the same change is said once."""
    changes = dict.fromkeys(change for _, change in sentences)
    return "; ".join(reason for reason, _ in sentences), ", and ".join(changes)


def unsuited_vms(fleet: Fleet, request: Request, row: int) -> tuple[str, str]:
    against = [demand for demand in request.bound.vms if not demand.allows(fleet.ids[row])]
    return _said([_of_vms(fleet, request, demand, row) for demand in against])


def _of_vms(fleet: Fleet, request: Request, demand: Demand, row: int) -> tuple[str, str]:
    vm, other, host = request.vm, f"VM {demand.vm}", fleet.names[row]
    groups, keep = _groups(demand), "keeps" if len(demand.groups) == 1 else "keep"
    if demand.moving:
        return (
            f"{groups} {keep} {vm} on one host with {other}, which is moving",
            f"try again when {other} has arrived",
        )
    if demand.inside:
        where = _hosts(fleet, demand)
        return (
            f"{groups} {keep} {vm} on one host with {other}, which is on {where}",
            f"move {other} to {host}, or take {vm} out of {groups}",
        )
    return (
        f"{groups} {keep} {vm} off the host of {other}, which is on {host}",
        f"move {other} away from {host}, or take {vm} out of {groups}",
    )


def unsuited_hosts(fleet: Fleet, request: Request, row: int) -> tuple[str, str]:
    against = [demand for demand in request.bound.hosts if not demand.allows(fleet.ids[row])]
    return _said([_of_hosts(fleet, request, demand, row) for demand in against])


def _of_hosts(fleet: Fleet, request: Request, demand: Demand, row: int) -> tuple[str, str]:
    vm, host, last = request.vm, fleet.names[row], f"affinity group {demand.groups[-1]}"
    through = f", which must be with VM {demand.vm}," if len(demand.groups) > 1 else ""
    if demand.inside:
        return (
            f"{_groups(demand)} let{'s' if len(demand.groups) == 1 else ''} {vm}{through} run on "
            f"{_hosts(fleet, demand)} only",
            f"add {host} to the hosts of {last}",
        )
    return (
        f"{_groups(demand)} keep{'s' if len(demand.groups) == 1 else ''} {vm}{through} off {host}",
        f"take {host} out of the hosts of {last}",
    )


def _groups(demand: Demand) -> str:
    names = demand.groups
    return f"affinity group{'s' if len(names) > 1 else ''} {' and '.join(names)}"


def _hosts(fleet: Fleet, demand: Demand) -> str:
    names = sorted(fleet.names[fleet.rows[h]] if h in fleet.rows else h for h in demand.host_ids)
    if not names:
        return "its hosts, of which none is left,"
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


# Weights


def _fulfilled(fleet: Fleet, wishes: Sequence[Wish]) -> Floats:
    """Hosts ranked by the priorities of the wishes that they break, the highest first, compared like words (oVirt's
    order); the best has 1, the worst 0."""
    if not wishes:
        return fleet.nothing
    ordered = sorted(wishes, key=lambda wish: -wish.priority)
    breaks = np.array([fleet.among(wish.host_ids) ^ wish.inside for wish in ordered])
    patterns, of_host = _patterns(breaks)
    words = [
        tuple(wish.priority for wish, is_broken in zip(ordered, pattern, strict=True) if is_broken)
        for pattern in patterns
    ]
    ranks = {word: rank for rank, word in enumerate(sorted(set(words)))}
    worst = max(len(ranks) - 1, 1)
    scores: Floats = np.array([1 - ranks[word] / worst for word in words])
    return scores[of_host]


def _patterns(breaks: NDArray[np.bool_]) -> tuple[NDArray[np.bool_], Ints]:
    """The different columns, and the number of each host's. A few wishes are a number of few bits: nothing is sorted."""
    if len(breaks) > FEW:
        patterns, of_host = np.unique(breaks.T, axis=0, return_inverse=True)
        return patterns, of_host.reshape(-1)
    bits = 1 << np.arange(len(breaks))
    codes = bits @ breaks
    there = np.bincount(codes, minlength=1 << len(breaks)) > 0
    patterns = (np.flatnonzero(there)[:, None] & bits) > 0
    return patterns, (np.cumsum(there) - 1)[codes]


def vm_wishes(fleet: Fleet, request: Request) -> Floats:
    return _fulfilled(fleet, request.bound.vm_wishes)


def host_wishes(fleet: Fleet, request: Request) -> Floats:
    return _fulfilled(fleet, request.bound.host_wishes)


def room_for_all(fleet: Fleet, request: Request) -> Floats:
    """Hosts that also have room for the VMs that must follow it."""
    memory, vcpus = request.bound.room
    if not vcpus:
        return fleet.nothing
    fits = fleet.ints("memory_used") + request.memory + memory <= fleet.ints("memory_limit")
    fits &= fleet.ints("vcpus_used") + resized.vcpus(fleet, request) + vcpus <= fleet.ints("vcpus_limit")
    return fits.astype(np.float64)
