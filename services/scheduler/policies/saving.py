"""Which host of a cluster is emptied and switched off to save power, and which sleeping one is woken. Pure.

One host at a time. Its VMs move to hosts that have some already, since filling an empty one gains nothing, and only as far
as those stay below the high utilisation. `reserve` empty hosts stay up. Where room for dead hosts is reserved, every host
whose highly available VMs would find room elsewhere stays such a host through every step, without the one that sleeps.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from services.scheduler.fleet import Bools
from services.scheduler.policies.board import Board, Step
from services.scheduler.policies.evacuating import evacuate
from services.scheduler.policies.recipe import Recipe
from services.scheduler.policies.survival import Survival
from services.scheduler.policies.units import IN_RESERVE, POWER_MANAGED

PROVEN_DAYS = 7.0
"""A host that sleeps counts as capacity for so long after it was last seen to wake."""
MOST_TRIED = 20
"""Hosts that are tried before it is said that none can sleep."""


def automatic(recipe: Recipe) -> bool:
    """Whether a policy has its clusters' hosts switched off and on without being asked."""
    return recipe.balance == "power_saving" and bool(recipe.parameters.get(POWER_MANAGED, 0))


def reserve(recipe: Recipe) -> int:
    return int(recipe.parameters.get(IN_RESERVE, 0))


@dataclass(frozen=True, slots=True)
class Saved:
    """What is to be done: a host's row and the moves that empty it; or why nothing is."""

    host: int | None = None
    steps: tuple[Step, ...] = ()
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Limits:
    reserve: int = 0
    """Empty hosts that stay up."""
    high: float = 0.8
    """Of its CPUs, how busy a host may become by the moves."""
    reserved: bool = False


def empty(board: Board) -> Bools:
    """Hosts that could take VMs and on which nothing is, nor is on its way."""
    nothing: Bools = board.open & (board.counts == 0) & (board.memory_used == 0) & (board.vcpus_used == 0)
    return nothing


def settled(board: Board, host: int) -> bool:
    """Whether all that is promised there is to VMs of the board."""
    here = board.at == host
    return bool(
        board.memory[here].sum() == board.memory_used[host]
        and board.vcpus[here].sum() == board.vcpus_used[host]
    )


def save(board: Board, candidates: Collection[int], limits: Limits) -> Saved:
    """The host with the fewest VMs that can sleep, or why the first of them can't. The board itself stays as it is."""
    spare = empty(board)
    order = sorted(
        (host for host in candidates if board.open[host]),
        key=lambda host: (int(board.counts[host]), float(board.work[host]), board.places[host].id),
    )
    reason = ""
    for host in order[:MOST_TRIED]:
        found = _emptied(board, host, spare, limits)
        if found.host is not None:
            return found
        reason = reason or found.reason
    return Saved(reason=reason or "none of its hosts that are up could be woken again")


def _emptied(board: Board, host: int, spare: Bools, limits: Limits) -> Saved:
    name = board.places[host].name
    left = int(spare.sum()) - int(spare[host])
    if left < limits.reserve:
        return Saved(
            reason=f"without {name} {left} empty hosts would be left, and {limits.reserve} stay in reserve"
        )
    others = board.open.copy()
    others[host] = False
    if not others.any():
        return Saved(reason=f"{name} is the last host of its cluster that is up")
    if not settled(board, host):
        return Saved(reason=f"VMs are on their way to or from {name}")
    trying = board.copy()
    trying.open[spare] = False
    trying.open[host] = False
    moved = evacuate(trying, [host], make_way=False)
    if moved.stuck:
        stuck = moved.stuck[0]
        return Saved(reason=f"VM {board.guests[stuck.guest].name} can't leave {name}: {stuck.reason}")
    if busy := _too_busy(board, moved.steps, limits.high):
        return Saved(reason=f"{busy} would be too busy without {name}")
    if limits.reserved and not _survives(board, host, moved.steps):
        return Saved(reason=f"without {name} VMs of a host that dies would have too little room")
    return Saved(host, moved.steps)


def _too_busy(board: Board, steps: Sequence[Step], high: float) -> str:
    after = board.copy()
    for step in steps:
        after.move(step)
    for target in sorted({step.target for step in steps}):
        if after.work[target] > high * after.cpus[target]:
            return board.places[target].name
    return ""


def _survives(board: Board, host: int, steps: Sequence[Step]) -> bool:
    """Whether every other host that would be survived still is: with this one closed, and after each step."""
    had = Survival(board.copy()).kept
    after = board.copy()
    after.open[host] = False
    survival = Survival(after)
    had[host] = False  # of it nothing will be left
    if (had & ~survival.kept).any():
        return False
    return all(survival.move(step) for step in steps)


# Back again


@dataclass(frozen=True, slots=True)
class Sleeper:
    """A host that sleeps. Memory in bytes, as may be promised."""

    id: str
    name: str
    memory_bytes: int
    proven: bool = False
    """That it can be woken was shown lately."""
    wanted_by: str = ""
    """The VM that found no place and would have one there."""


@dataclass(frozen=True, slots=True)
class Woken:
    host_id: str = ""
    reason: str = ""


def wake(asleep: Sequence[Sleeper], *, spare: int, kept: int, over: str) -> Woken:
    """Which one, and why: for a VM that found no place, for the reserve, or for a host with too much (`over`: its name) where no
    other has room. Of several the one that was proven to wake, then the largest."""
    if not asleep:
        return Woken()
    wanted = [each for each in asleep if each.wanted_by]
    best = min(wanted or asleep, key=lambda each: (not each.proven, -each.memory_bytes, each.id))
    if wanted:
        return Woken(best.id, f"VM {best.wanted_by} found no place")
    if spare < kept:
        return Woken(best.id, f"{spare} empty hosts are up, and {kept} are to be in reserve")
    if over:
        return Woken(best.id, f"{over} has too much, and no other host has room")
    return Woken()
