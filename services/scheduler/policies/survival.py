"""Whether the highly available VMs of each host would find room elsewhere if that host died, kept up to date as a plan is
made. Pure.

For each host a *refuge* is kept: where its VMs would go. It proves that there is room, and most moves leave most of them
valid, so that few are searched anew. The search is greedy (the largest VM first, to the host with most memory left): what
it doesn't find counts as missing, so a plan may leave out a move that would have been harmless, and never takes one that
isn't. One host's death at a time is looked at, and of affinity groups only enforcing host rules.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from services.scheduler.fleet import Bools, Ints
from services.scheduler.pages import NO_PAGES
from services.scheduler.policies.board import Board, Step, enough

Refuge = dict[int, int]
"""VM → host."""


@dataclass(slots=True)
class Survival:
    board: Board
    refuges: list[Refuge | None] = field(init=False)
    """By host; None: there is no room for all."""
    memory: Ints = field(init=False)
    """Dead host × refuge: bytes that would be taken there, and likewise `vcpus`."""
    vcpus: Ints = field(init=False)
    pages: Ints = field(init=False)
    """Dead host × refuge × size."""

    def __post_init__(self) -> None:
        count = len(self.board.places)
        self.memory = np.zeros((count, count), np.int64)
        self.vcpus = np.zeros((count, count), np.int64)
        self.pages = np.zeros((count, count, len(NO_PAGES)), np.int64)
        self.refuges = [None] * count
        self.search()

    def search(self) -> None:
        """All of them anew."""
        for dead in range(len(self.refuges)):
            self._search(dead)

    @property
    def kept(self) -> Bools:
        return np.array([refuge is not None for refuge in self.refuges], np.bool_)

    def move(self, step: Step) -> bool:
        """Make the move, unless a host's VMs would lose their room by it; whether it was made."""
        board, before = self.board, list(self.refuges)
        memory, vcpus, pages = self.memory.copy(), self.vcpus.copy(), self.pages.copy()
        board.move(step)
        for dead in self._doubtful(step):
            self._search(dead)
            if self.refuges[dead] is None and before[dead] is not None:
                board.move(Step(step.guest, step.target, step.source))
                self.refuges, self.memory, self.vcpus, self.pages = before, memory, vcpus, pages
                return False
        return True

    def _doubtful(self, step: Step) -> list[int]:
        """Hosts whose refuge may hold no more."""
        board, target = self.board, step.target
        short = self.memory[:, target] > board.memory_left[target]
        short |= self.vcpus[:, target] > board.vcpus_left[target]
        if board.backed:
            short |= ~enough(self.pages[:, target], board.pages_left[target])
        short |= ~self.kept
        if board.available[step.guest]:
            short[[step.source, target]] = True
        return [int(dead) for dead in np.flatnonzero(short)]

    def _search(self, dead: int) -> None:
        board = self.board
        self._forget(dead)
        memory, vcpus, pages = board.memory_left.copy(), board.vcpus_left.copy(), board.pages_left.copy()
        usable = board.open.copy()
        usable[dead] = False
        found: Refuge = {}
        guests = np.flatnonzero((board.at == dead) & board.available)
        for guest in sorted(guests.tolist(), key=lambda g: (-int(board.memory[g]), g)):
            taken, needed = board.memory[guest], board.vcpus[guest]
            fits = usable & board.allowed[guest] & (memory >= taken) & (vcpus >= needed)
            if board.backed:
                fits &= enough(board.pages[guest], pages)
            if not fits.any():
                self.refuges[dead] = None
                self._forget(dead)
                return
            host = int(np.where(fits, memory, -1).argmax())
            memory[host] -= taken
            vcpus[host] -= needed
            pages[host] -= board.pages[guest]
            self.memory[dead, host] += taken
            self.vcpus[dead, host] += needed
            self.pages[dead, host] += board.pages[guest]
            found[guest] = host
        self.refuges[dead] = found

    def _forget(self, dead: int) -> None:
        self.memory[dead], self.vcpus[dead], self.pages[dead] = 0, 0, 0
