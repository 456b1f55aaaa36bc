"""Mending broken affinity groups with few moves. Pure.

What is broken is counted per kind of rule, in oVirt's order: enforcing rules to hosts, enforcing rules between VMs, wishes
about hosts, wishes between VMs; wishes count by their priority. A mend is one VM, with all that must be where it is, on
another host; it is made only if it lowers these counts, compared like words, so that nothing is broken for something that
matters less. Of the mends of the first kind that can be mended the one that mends most is made, then the one with fewest
moves, until none helps.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from services.scheduler.policies.affinity import NEGATIVE, POSITIVE, Group
from services.scheduler.policies.board import Board, Step
from services.scheduler.policies.survival import Survival

Broken = tuple[float, float, float, float]
"""How much is broken of each kind, what matters most first."""
KINDS = 4


@dataclass(frozen=True, slots=True)
class Enforced:
    steps: tuple[Step, ...]
    before: Broken
    after: Broken
    left: tuple[str, ...]
    """Names of groups that stay broken."""


def enforce(board: Board, *, reserved: bool = False) -> Enforced:
    """The board itself stays as it is. `reserved` as in `balance`."""
    board = board.copy()
    survival = Survival(board) if reserved else None
    groups = board.rules.groups
    before = broken(board, groups)
    steps: list[Step] = []
    refused: set[tuple[tuple[int, ...], int]] = set()
    while (found := _best(board, groups, refused)) is not None:
        block, target = found
        made = _make(board, survival, block, target)
        if made is None:
            refused.add(found)
            continue
        steps += made
        refused.clear()
    left = tuple(sorted(group.name for group in groups if any(broken(board, (group,)))))
    return Enforced(tuple(steps), before, broken(board, groups), left)


def broken(board: Board, groups: Iterable[Group]) -> Broken:
    counts = [0.0] * KINDS
    for group in groups:
        members = board.numbers(group.vms)
        at = [int(board.at[guest]) for guest in members]
        if not at:
            continue
        hosts = {board.row[host] for host in group.hosts if host in board.row}
        worth = 1.0 if group.host_enforcing else max(group.priority, 1e-6)
        outside, inside = sum(h not in hosts for h in at), sum(h in hosts for h in at)
        by_rule = {POSITIVE: outside, NEGATIVE: inside}
        counts[0 if group.host_enforcing else 2] += worth * by_rule.get(group.host_rule, 0)
        worth = 1.0 if group.vm_enforcing else max(group.priority, 1e-6)
        most = max(Counter(at).values())
        by_rule = {POSITIVE: len(at) - most, NEGATIVE: len(at) - len(set(at))}
        counts[1 if group.vm_enforcing else 3] += worth * by_rule.get(group.vm_rule, 0)
    return counts[0], counts[1], counts[2], counts[3]


def _best(
    board: Board, groups: Sequence[Group], refused: set[tuple[tuple[int, ...], int]]
) -> tuple[tuple[int, ...], int] | None:
    """VMs that move together, and where to: the mend of the first kind of broken rule that any move mends."""
    for kind in range(KINDS):
        names = [group for group in groups if broken(board, (group,))[kind]]
        found: list[tuple[Broken, int, float, tuple[int, ...], int]] = []
        for block, target in _mends(board, names):
            if (block, target) not in refused:
                change = _change(board, groups, block, target)
                if change < (0.0,) * KINDS and change[kind] < 0:
                    found.append((change, len(block), _full(board, block, target), block, target))
        if found:
            return min(found)[3:]
    return None


def _mends(board: Board, groups: Sequence[Group]) -> Iterator[tuple[tuple[int, ...], int]]:
    """Each VM of these groups, with those of its union that aren't there yet, to each host that could take them. What is on
    a closed host leaves it by other means, or not at all."""
    stays = np.array([bool(g.kept) for g in board.guests], np.bool_) | ~board.open[board.at]
    seen: set[tuple[tuple[int, ...], int]] = set()
    for guest in board.numbers({vm_id for group in groups for vm_id in group.vms}):
        whole = board.block(guest)
        for target in range(len(board.places)):
            block = tuple(g for g in whole if board.at[g] != target)
            if block and (block, target) not in seen and not stays[list(block)].any():
                seen.add((block, target))
                if board.fits_all(block)[target]:
                    yield block, target


def _change(board: Board, groups: Sequence[Group], block: tuple[int, ...], target: int) -> Broken:
    """By how much each kind would be more broken."""
    names = {board.guests[guest].id for guest in block}
    concerned = [group for group in groups if group.vms & names]
    before = broken(board, concerned)
    steps = [board.step(guest, target) for guest in block]
    for step in steps:
        board.move(step)
    after = broken(board, concerned)
    for step in steps:
        board.move(Step(step.guest, step.target, step.source))
    first, second, third, fourth = (round(a - b, 9) for a, b in zip(after, before, strict=True))
    return first, second, third, fourth


def _full(board: Board, block: tuple[int, ...], target: int) -> float:
    """How full the host would be."""
    rows = list(block)
    memory = (board.memory_used[target] + board.memory[rows].sum()) / max(int(board.memory_limit[target]), 1)
    return float(np.maximum(memory, (board.work[target] + board.load[rows].sum()) / board.cpus[target]))


def _make(board: Board, survival: Survival | None, block: tuple[int, ...], target: int) -> list[Step] | None:
    """None: it would take the room that highly available VMs need, and was not made."""
    made: list[Step] = []
    for guest in block:
        step = board.step(guest, target)
        if survival is None:
            board.move(step)
        elif not survival.move(step):
            for done in reversed(made):
                board.move(Step(done.guest, done.target, done.source))
            survival.search()
            return None
        made.append(step)
    return made
