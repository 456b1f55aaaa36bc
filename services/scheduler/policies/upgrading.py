"""Upgrading a cluster's hosts one after the other: who is emptied when, and where its VMs go. Pure.

The host with the least on it is first. VMs go to hosts whose turn has been, as far as these have room: they are done, so
that most VMs move once, and only those of the first hosts twice.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

import numpy as np

from services.scheduler.policies.board import Board
from services.scheduler.policies.evacuating import Evacuated, evacuate


@dataclass(frozen=True, slots=True)
class Turn:
    """One host is emptied, upgraded, and takes VMs again."""

    host: int
    board: Board
    """As it is when the turn begins."""
    emptied: Evacuated


def upgrade(board: Board, hosts: Collection[int]) -> Iterator[Turn]:
    """The board itself stays as it is. A VM that has no place in one turn stays where it is in the next ones, too."""
    board = board.copy()
    waiting = sorted(hosts, key=lambda host: (_fullness(board, host), host))
    while waiting:
        host = waiting.pop(0)
        emptied = evacuate(board, [host], avoided=waiting)
        yield Turn(host, board.copy(), emptied)
        for step in emptied.steps:
            board.move(step)


def _fullness(board: Board, host: int) -> float:
    """Share of its memory that VMs have; that of a host that only others' claims fill is nothing to be moved."""
    return float(board.memory[np.flatnonzero(board.at == host)].sum() / max(int(board.memory_limit[host]), 1))
