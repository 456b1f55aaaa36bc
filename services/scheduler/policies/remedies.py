"""The smallest change that makes a VM fit, when no host takes it: per kind of change, of all hosts the one that needs
the fewest changes, then the smallest amounts.

Everything is computed for all hosts at once: for a set of kinds, every rule against a host is met by the lever of these
kinds that asks least of it; only the hosts that win are put into words. What several rules ask of one field is one change; no rule is met by two changes that each go half
of the way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray

from services.scheduler.fleet import Bools, Fleet, Floats, Ints
from services.scheduler.policies.cell_levers import CELL_LEVERS
from services.scheduler.policies.device_levers import DEVICE_LEVERS
from services.scheduler.policies.levers import LEVERS, NEVER, Lever, network_levers
from services.scheduler.policies.loosening import Loosening
from services.scheduler.policies.page_levers import PAGE_LEVERS
from services.scheduler.policies.request import Request
from volery.contracts.scheduling import Change, ChangeKind, Remedy

AFFINITY = ("affinity_vms", "affinity_hosts")
ALL_LEVERS = (*LEVERS, *PAGE_LEVERS, *CELL_LEVERS, *DEVICE_LEVERS)
KINDS = (ChangeKind.HOST, ChangeKind.VM, ChangeKind.CLUSTER, ChangeKind.CONNECTIONS, ChangeKind.REQUEST)


@dataclass(frozen=True, slots=True)
class Pull:
    """What would move an obstacle, with its figures for the hosts in question, in their order."""

    kind: ChangeKind
    field: str
    amount: Ints
    share: Floats
    """The amount as a share of its scale; infinite where no amount would do."""
    tell: Callable[[int, int, tuple[str, ...]], Iterable[Change]]
    """(position of the host, amount, rules) → it in words."""
    several: bool = False
    """It comes to several changes; the amount is how many."""


@dataclass(frozen=True, slots=True)
class Obstacle:
    """One rule, or one network of the rule about networks: which hosts it excludes, and the levers against it."""

    rule: str
    against: Bools
    pulls: Sequence[Pull]


@dataclass(frozen=True, slots=True)
class Answer:
    """For a set of kinds, per host: how many changes, their shares together, and the pull for each obstacle."""

    count: Ints
    share: Floats
    chosen: Sequence[NDArray[np.int64]]
    pulls: Sequence[Sequence[Pull]]


def remedies(
    fleet: Fleet, request: Request, masks: Mapping[str, Bools], rows: NDArray[np.int64]
) -> tuple[Remedy, ...]:
    """`rows`: the hosts that could be changed, all of them refused. Empty where nothing that is known here would help."""
    if not len(rows):
        return ()
    obstacles = _obstacles(fleet, request, masks, rows)
    found = [r for kind in KINDS if (r := _best(fleet, request, obstacles, rows, [(kind,)]))]
    if found:
        return tuple(found)
    some = [kind for kind in KINDS if any(p.kind is kind for o in obstacles for p in o.pulls)]
    mixtures = [kinds for number in range(2, len(some) + 1) for kinds in combinations(some, number)]
    mixed = _best(fleet, request, obstacles, rows, mixtures)
    return (mixed,) if mixed is not None else ()


def _obstacles(
    fleet: Fleet, request: Request, masks: Mapping[str, Bools], rows: NDArray[np.int64]
) -> list[Obstacle]:
    """Those that stand against any of the hosts."""
    against = [
        (rule, ~mask[rows], [lever for lever in ALL_LEVERS if lever.rule == rule])
        for rule, mask in masks.items()
        if rule not in ("network", *AFFINITY)
    ]
    for network_id in dict.fromkeys(request.need.network_ids):
        lacking = ~fleet.with_network(network_id)[rows]
        against.append(("network", lacking, list(network_levers(network_id))))
    found = [
        Obstacle(rule, excluded, [_pull(fleet, request, lever, rows) for lever in levers])
        for rule, excluded, levers in against
        if excluded.any()
    ]
    return found + _ties(fleet, request, masks, rows)


def _ties(
    fleet: Fleet, request: Request, masks: Mapping[str, Bools], rows: NDArray[np.int64]
) -> list[Obstacle]:
    """Affinity groups, both rules as one obstacle: what one group lets go of may change what others say."""
    by_rule = {rule: ~masks[rule][rows] for rule in AFFINITY if rule in masks}
    against = np.logical_or.reduce([np.zeros(len(rows), np.bool_), *by_rule.values()])
    if not against.any():
        return []
    bound = request.bound
    loosening = Loosening(fleet, request, rows, bound.groups, bound.seats)

    def pull(kind: ChangeKind) -> Pull:
        found = loosening.smallest(kind)

        def tell(at: int, amount: int, rules: tuple[str, ...]) -> Iterable[Change]:
            excluding = frozenset(rule for rule, excluded in by_rule.items() if excluded[at])
            return loosening.changes(found[at], at, excluding)

        amount = np.full(len(rows), NEVER, np.int64)
        amount[list(found)] = [len(ties) for ties in found.values()]
        share = np.where(amount == NEVER, np.inf, amount)
        return Pull(kind, "affinity", amount, share, tell, several=True)

    return [Obstacle("affinity", against, [pull(ChangeKind.VM), pull(ChangeKind.CLUSTER)])]


def _pull(fleet: Fleet, request: Request, lever: Lever, rows: NDArray[np.int64]) -> Pull:
    amount = lever.amount(fleet, request)[rows]

    def tell(at: int, amount: int, rules: tuple[str, ...]) -> Iterable[Change]:
        yield replace(lever.tell(fleet, request, int(rows[at]), amount), rules=rules)

    share = np.where(amount == NEVER, np.inf, amount / lever.scale(request))
    return Pull(lever.kind, lever.field, amount, share, tell)


def _best(
    fleet: Fleet,
    request: Request,
    obstacles: Sequence[Obstacle],
    rows: NDArray[np.int64],
    sets: Sequence[tuple[ChangeKind, ...]],
) -> Remedy | None:
    """Of all hosts and all these sets of kinds: the fewest changes, then the fewest kinds, then the smallest."""
    best: tuple[tuple[float, ...], Answer, int] | None = None
    ranks = fleet.ranks()
    for kinds in sets:
        answer = _answer(obstacles, kinds, len(rows))
        if answer is None:
            continue
        count = np.where(np.isfinite(answer.share), answer.count, NEVER)
        fewest = count == count.min()
        share = np.where(fewest, answer.share, np.inf)
        if not np.isfinite(share.min()):
            continue
        least = np.flatnonzero(share == share.min())
        at = int(least[np.argmin(ranks[rows[least]])])
        order = (float(count[at]), float(len(kinds)), float(share[at]))
        if best is None or order < best[0]:
            best = (order, answer, at)
    return None if best is None else _told(fleet, request, obstacles, best[1], best[2], int(rows[best[2]]))


def _answer(obstacles: Sequence[Obstacle], kinds: tuple[ChangeKind, ...], hosts: int) -> Answer | None:
    """None: some obstacle stands against every host, and no lever of these kinds moves it."""
    pulls = [[p for p in o.pulls if p.kind in kinds] for o in obstacles]
    nowhere = np.zeros(hosts, np.bool_)
    hopeless = nowhere.copy()
    for obstacle, possible in zip(obstacles, pulls, strict=True):
        if not possible:
            hopeless |= obstacle.against
    if hopeless.all():
        return None
    forced = _forced(obstacles, pulls, hosts)
    chosen = []
    fields: dict[tuple[ChangeKind, str], Floats] = {}
    changes: dict[tuple[ChangeKind, str], Ints] = {}
    for obstacle, possible in zip(obstacles, pulls, strict=True):
        choice = np.zeros(hosts, np.int64)
        if len(possible) > 1:
            # A field that must change anyway costs no further change, so it is taken wherever it is enough.
            costs = [
                np.where(forced.get(_key(p), nowhere) & np.isfinite(p.share), -1.0, p.share) for p in possible
            ]
            choice = np.argmin(np.array(costs), axis=0)
        chosen.append(choice)
        for number, pull in enumerate(possible):
            share = np.where(obstacle.against & (choice == number), pull.share, 0.0)
            fields[_key(pull)] = np.maximum(fields.get(_key(pull), np.zeros(hosts)), share)
            each = np.where(share > 0, pull.amount if pull.several else 1, 0)
            changes[_key(pull)] = np.maximum(changes.get(_key(pull), np.zeros(hosts, np.int64)), each)
    count = np.sum(list(changes.values()), axis=0) if changes else np.zeros(hosts, np.int64)
    share = np.sum(list(fields.values()), axis=0) if fields else np.zeros(hosts)
    return Answer(count, np.where(hopeless, np.inf, share), chosen, pulls)


def _forced(
    obstacles: Sequence[Obstacle], pulls: Sequence[Sequence[Pull]], hosts: int
) -> dict[tuple[ChangeKind, str], Bools]:
    """Field → the hosts on which it must change, since nothing else meets some rule."""
    forced: dict[tuple[ChangeKind, str], Bools] = {}
    for obstacle, possible in zip(obstacles, pulls, strict=True):
        if len(possible) == 1:
            key = _key(possible[0])
            forced[key] = forced.get(key, np.zeros(hosts, np.bool_)) | obstacle.against
    return forced


def _key(pull: Pull) -> tuple[ChangeKind, str]:
    return pull.kind, pull.field


def _told(
    fleet: Fleet, request: Request, obstacles: Sequence[Obstacle], answer: Answer, at: int, row: int
) -> Remedy:
    """The winner in words."""
    changes = tuple(_changes(obstacles, answer, at))
    kinds = {change.kind for change in changes}
    kind = kinds.pop() if len(kinds) == 1 else ChangeKind.MIXED
    name = fleet.names[row]
    what = " and ".join(change.sentence for change in changes)
    elsewhere = kind in (ChangeKind.VM, ChangeKind.CLUSTER)
    return Remedy(
        kind=kind,
        host_id=fleet.ids[row],
        host_name=name,
        changes=changes,
        sentence=f"{what} ({name} takes it then)" if elsewhere else what,
    )


def _changes(obstacles: Sequence[Obstacle], answer: Answer, at: int) -> Iterator[Change]:
    together: dict[tuple[ChangeKind, str], tuple[Pull, int, tuple[str, ...]]] = {}
    for obstacle, choice, possible in zip(obstacles, answer.chosen, answer.pulls, strict=True):
        if obstacle.against[at]:
            pull = possible[int(choice[at])]
            first, amount, rules = together.get(_key(pull), (pull, 0, ()))
            together[_key(pull)] = (first, max(amount, int(pull.amount[at])), (*rules, obstacle.rule))
    for pull, amount, rules in together.values():
        yield from pull.tell(at, amount, rules)
