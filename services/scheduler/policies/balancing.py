"""Balancing a board: which VMs move where so that its hosts become alike, in an order that makes it better with each move.

The cost is the sum, over hosts and over what the aims count, of squared deviations from the fair share: what all hosts
together have of it, in proportion to what each can take. The best single move is made until none gains enough; then what
cancels is dropped, chains are merged, moves that gained little are given up, and the rest is put in an order in which each
move is legal and lowers the cost. Pure.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from services.scheduler.fleet import Floats
from services.scheduler.policies.board import Board, Step, enough
from services.scheduler.policies.survival import Survival


@dataclass(frozen=True, slots=True)
class Aims:
    """What is made alike, and how much each counts."""

    cpu: float = 0.0
    memory: float = 0.0
    guests: float = 0.0


AIMS: Mapping[str, Aims] = {
    "even_distribution": Aims(cpu=1.0, memory=1.0),
    "power_saving": Aims(cpu=1.0, memory=1.0),
    "even_guest_distribution": Aims(guests=1.0),
    "even_overall_distribution": Aims(cpu=2.0, memory=1.0, guests=10.0),
}
"""By the unit of the policy's balance; units without a row balance nothing."""

LEAST_GAIN = 1e-4
"""What a move must gain, as a share of the cost at the beginning: a migration costs something, too."""
MOST_MOVES = 10_000


@dataclass(frozen=True, slots=True)
class Balanced:
    steps: tuple[Step, ...]
    before: float
    after: float
    """Costs."""


class _Scale:
    """Costs of a board, and what each move would change: `add` of a VM on a host and `take` of a VM where it is."""

    def __init__(self, board: Board, aims: Aims) -> None:
        self.board = board
        hosts, count = len(board.places), max(len(board.guests), 1)
        mean = np.full(hosts, max(count / max(int(board.open.sum()), 1), 1.0))
        self.weights = np.array([aims.cpu, aims.memory, aims.guests])
        self.limits = np.array([board.cpus, np.maximum(board.memory_limit, 1), mean], np.float64)
        self.sizes = np.array([board.load, board.memory, np.ones(len(board.guests))], np.float64)
        self.among = board.open
        used, limits = self.used[:, self.among], self.limits[:, self.among]
        self.fair = used.sum(axis=1) / np.maximum(limits.sum(axis=1), 1e-9)

    @property
    def used(self) -> Floats:
        board = self.board
        return np.array([board.work, board.memory_used, board.counts], np.float64)

    def _off(self) -> Floats:
        off: Floats = self.used / self.limits - self.fair[:, None]
        return off

    def cost(self) -> float:
        return float((self.weights[:, None] * self._off()[:, self.among] ** 2).sum())

    def add(self, hosts: np.ndarray) -> Floats:
        """VMs × these hosts: what the cost would rise by with the VM there as well."""
        off = self._off()[:, hosts]
        shares = self.sizes[:, :, None] / self.limits[:, None, hosts]
        rise: Floats = (self.weights[:, None, None] * shares * (2 * off[:, None, :] + shares)).sum(axis=0)
        return rise

    def take(self, guests: np.ndarray) -> Floats:
        """What the cost would rise by without each of these VMs."""
        at = self.board.at[guests]
        off = self._off()[:, at]
        shares = self.sizes[:, guests] / self.limits[:, at]
        rise: Floats = (self.weights[:, None] * shares * (shares - 2 * off)).sum(axis=0)
        return rise


def cost(board: Board, aims: Aims) -> float:
    return _Scale(board, aims).cost()


class _Search:
    """The gain of every single move, kept up to date."""

    def __init__(
        self, board: Board, scale: _Scale, wanted: Mapping[int, int] | None = None, seed: int = 0
    ) -> None:
        """With `wanted` only these VMs move, each to its host. What is on a closed host is nobody's to balance. With a seed
        some VMs are preferred, by chance."""
        chance = np.random.default_rng(seed).uniform(0.7, 1.0, len(board.guests))
        self.preferred: Floats = chance[:, None] if seed else np.ones((len(board.guests), 1))
        self.board, self.scale = board, scale
        self.movable = np.array([not g.kept for g in board.guests], np.bool_) & board.open[board.at]
        for guest in board.blocks:
            self.movable[guest] = False
        self.suits = board.allowed & board.open[None, :] & self.movable[:, None]
        if wanted is not None:
            only = np.zeros_like(self.suits)
            only[list(wanted), list(wanted.values())] = True
            self.suits &= only
        every = np.arange(len(board.places))
        self.add = scale.add(every)
        self.take = scale.take(np.arange(len(board.guests)))
        self.open = np.zeros_like(self.suits)
        self._look(every)

    def _look(self, hosts: np.ndarray) -> None:
        board = self.board
        mask = self.suits[:, hosts] & (board.memory[:, None] <= board.memory_left[None, hosts])
        mask &= board.vcpus[:, None] <= board.vcpus_left[None, hosts]
        if board.backed:
            mask &= enough(board.pages[:, None, :], board.pages_left[None, hosts, :])
        mask &= board.at[:, None] != hosts[None, :]
        if board.rivals:
            mask &= board.blocked[:, hosts] == 0
        self.open[:, hosts] = mask

    def best(self) -> tuple[Step, float] | None:
        """The move that lowers the cost most, and by how much."""
        if not self.open.size:
            return None
        rise = self.add + self.take[:, None]
        found = int(np.where(self.open, rise * self.preferred, np.inf).argmin())
        guest, target = divmod(found, rise.shape[1])
        return (
            (self.board.step(guest, target), -float(rise[guest, target]))
            if self.open[guest, target]
            else None
        )

    def moved(self, step: Step) -> None:
        hosts = np.array([step.source, step.target])
        self.add[:, hosts] = self.scale.add(hosts)
        near = np.flatnonzero(np.isin(self.board.at, hosts))
        self.take[near] = self.scale.take(near)
        self._look(hosts)

    def never(self, step: Step) -> None:
        self.suits[step.guest, step.target] = False
        self.open[step.guest, step.target] = False


def balance(
    board: Board,
    aims: Aims,
    *,
    reserved: bool = False,
    least_gain: float = LEAST_GAIN,
    most: int = MOST_MOVES,
    tries: Iterable[int] = (0,),
) -> Balanced:
    """The board itself stays as it is. `reserved`: hosts whose highly available VMs would find room elsewhere if they died
    stay such hosts. Each further try takes the moves in another order, drawn with its number; the cheapest plan counts,
    with the least gain as the price of each move."""
    floor = max(least_gain * cost(board, aims), 1e-12)
    found = (_tried(board, aims, floor, reserved, most, seed) for seed in tries)
    return min(found, key=lambda plan: plan.after + floor * len(plan.steps))


def _tried(board: Board, aims: Aims, floor: float, reserved: bool, most: int, seed: int) -> Balanced:
    before = cost(board, aims)
    reached = board.copy()
    found = _descend(reached, aims, floor, reserved, most, seed=seed)
    wanted = {n: int(reached.at[n]) for n in np.flatnonzero(reached.at != board.at).tolist()}
    wanted = _worth_it(board, aims, wanted, floor)
    ordered = board.copy()
    steps = _descend(ordered, aims, 0.0, reserved, most, wanted)
    after, best = cost(ordered, aims), cost(reached, aims)
    if after > best + len(found) * floor:
        # The way led over moves that cancelled or were given up: without them it is closed.
        return Balanced(tuple(found), before, best)
    return Balanced(tuple(steps), before, after)


def _descend(
    board: Board,
    aims: Aims,
    floor: float,
    reserved: bool,
    most: int,
    wanted: Mapping[int, int] | None = None,
    *,
    seed: int = 0,
) -> list[Step]:
    """Moves the board on, the best move first, as long as one gains more than the floor."""
    search = _Search(board, _Scale(board, aims), wanted, seed)
    survival = Survival(board) if reserved else None
    steps: list[Step] = []
    while len(steps) < most and (found := search.best()) is not None:
        step, gain = found
        if gain <= floor:
            break
        if survival is None:
            board.move(step)
        elif not survival.move(step):
            search.never(step)
            continue
        search.moved(step)
        steps.append(step)
    return steps


def _worth_it(board: Board, aims: Aims, wanted: dict[int, int], floor: float) -> dict[int, int]:
    """Without those moves that, with all the others made, gain no more than the floor."""
    end = board.copy()
    for guest, target in wanted.items():
        end.move(end.step(guest, target))
    scale = _Scale(end, aims)
    kept = dict(wanted)
    while kept:
        guests = np.array(sorted(kept))
        rise = scale.take(guests) + scale.add(np.arange(len(end.places)))[guests, board.at[guests]]
        least = int(rise.argmin())
        if rise[least] > floor:
            break
        guest = int(guests[least])
        end.move(end.step(guest, int(board.at[guest])))
        kept.pop(guest)
    return kept
