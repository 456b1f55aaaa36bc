"""Steps of a plan in waves: those of one wave run together, the next begins when they have ended. Pure.

While a VM moves it holds capacity at both ends, and may be on either. So a wave counts every VM of it at its source and at
its destination: whatever order its migrations end in, none of them has to wait for another.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from services.scheduler.policies.board import Board, Step, enough

PER_HOST = 2
"""Migrations that one host takes part in at a time, as source or destination (oVirt's)."""


def waves(board: Board, steps: Iterable[Step], per_host: int = PER_HOST) -> list[list[Step]]:
    """The steps in their order, cut where one has to wait for those before it. Each must be legal after those before it; the
    board itself stays as it is."""
    board = board.copy()
    cut: list[list[Step]] = []
    wave: list[Step] = []
    for step in steps:
        if wave and not joins(board, wave, step, per_host):
            cut.append(wave)
            for moved in wave:
                board.move(moved)
            wave = []
        wave.append(step)
    return [*cut, wave] if wave else cut


def joins(board: Board, wave: list[Step], step: Step, per_host: int) -> bool:
    """Whether a step can begin beside those of the wave, none of which has ended. VMs that must be together aren't looked at:
    the plan takes them to one host."""
    if any(other.guest == step.guest for other in wave):
        return False
    at = Counter(host for other in (*wave, step) for host in (other.source, other.target))
    if max(at[step.source], at[step.target]) > per_host:
        return False
    same = [step.guest, *(other.guest for other in wave if other.target == step.target)]
    if board.memory[same].sum() > board.memory_left[step.target]:
        return False
    if board.vcpus[same].sum() > board.vcpus_left[step.target]:
        return False
    if board.backed and not enough(board.pages[same].sum(axis=0), board.pages_left[step.target]):
        return False
    rivals = set(board.rivals.get(step.guest, ()))
    here = {other.guest for other in wave if step.target in (other.source, other.target)}
    return not board.blocked[step.guest, step.target] and not rivals & here
