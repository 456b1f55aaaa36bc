"""Emptying hosts: where each of their VMs goes, in an order in which every move is legal, and who has no place and why. Pure.

Highly available VMs leave first, then the largest; VMs that must be together go to one host. A VM for which nothing is free
gets room by one other VM that moves away from there, if that is enough.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

import numpy as np

from services.scheduler.fleet import Bools
from services.scheduler.pages import NAMES
from services.scheduler.policies.board import Board, Step, enough
from services.scheduler.policies.request import size


@dataclass(frozen=True, slots=True)
class Stuck:
    """A VM that a plan has no place for."""

    guest: int
    reason: str


@dataclass(frozen=True, slots=True)
class Evacuated:
    steps: tuple[Step, ...]
    stuck: tuple[Stuck, ...]


def evacuate(
    board: Board, hosts: Collection[int], *, avoided: Collection[int] = (), make_way: bool = True
) -> Evacuated:
    """The board itself stays as it is. To `avoided` hosts a VM goes only if no other takes it."""
    board = board.copy()
    board.open[list(hosts)] = False
    wanted = np.ones(len(board.places), np.bool_)
    wanted[list(avoided)] = False
    steps: list[Step] = []
    waiting = list(_blocks(board, hosts))
    stuck = [Stuck(g, board.guests[g].kept) for g in _on(board, hosts) if board.guests[g].kept]
    progress = True
    while progress:
        # Who left may have been what kept another where it is.
        left = [block for block in waiting if not _go(board, block, wanted, steps)]
        progress, waiting = len(left) < len(waiting), left
        if waiting and not progress and make_way:
            found = next(
                (n for n, block in enumerate(waiting) if _make_way(board, block, wanted, steps)), None
            )
            if found is not None:
                waiting.pop(found)
                progress = True
    stuck += [Stuck(g, _reason(board, block)) for block in waiting for g in block if not board.guests[g].kept]
    return Evacuated(tuple(steps), tuple(sorted(stuck, key=lambda s: s.guest)))


def _on(board: Board, hosts: Collection[int]) -> list[int]:
    return [int(guest) for guest in np.flatnonzero(np.isin(board.at, list(hosts)))]


def _blocks(board: Board, hosts: Collection[int]) -> Iterator[tuple[int, ...]]:
    """The VMs there that go together, in the order in which they leave. A union with a VM that stays stays."""
    on, seen = set(_on(board, hosts)), set[int]()
    whole_memory, whole_vcpus = max(int(board.memory_limit.max()), 1), max(int(board.vcpus_limit.max()), 1)

    def order(block: tuple[int, ...]) -> tuple[int, float, int]:
        first = max(board.guests[g].priority if board.guests[g].high_availability else -1 for g in block)
        rows = list(block)
        share = max(board.memory[rows].sum() / whole_memory, board.vcpus[rows].sum() / whole_vcpus)
        return -first, -float(share), block[0]

    found = []
    for guest in sorted(on):
        if guest not in seen and not board.guests[guest].kept:
            block = tuple(g for g in board.block(guest) if g in on)
            seen |= set(block)
            found.append(block)
    yield from sorted(found, key=order)


def _targets(board: Board, block: tuple[int, ...]) -> Bools:
    """Hosts that could take them all. Of a union that is apart the others are where they may be joined."""
    mask = board.fits_all(block)
    if any(board.guests[guest].kept for guest in block):
        mask[:] = False
    others = [g for g in board.block(block[0]) if g not in block]
    if others:
        there = np.zeros_like(mask)
        there[board.at[others]] = True
        mask &= there
    return mask


def _go(board: Board, block: tuple[int, ...], wanted: Bools, steps: list[Step]) -> bool:
    mask = _targets(board, block)
    if not mask.any():
        return False
    if (mask & wanted).any():
        mask = mask & wanted
    rows = list(block)
    # The host that is least full afterwards, in whatever it is fullest of.
    memory = (board.memory_used + board.memory[rows].sum()) / np.maximum(board.memory_limit, 1)
    work = (board.work + board.load[rows].sum()) / board.cpus
    target = int(np.where(mask, np.maximum(memory, work), np.inf).argmin())
    for guest in block:
        _make(board, board.step(guest, target), steps)
    return True


def _make(board: Board, step: Step, steps: list[Step]) -> None:
    board.move(step)
    steps.append(step)


def _make_way(board: Board, block: tuple[int, ...], wanted: Bools, steps: list[Step]) -> bool:
    """One VM moves away from a host, so that this one fits there: the smallest that is enough."""
    if len(block) > 1 or len(board.block(block[0])) > 1 or board.guests[block[0]].kept:
        return False
    guest = block[0]
    suits = board.open & board.allowed[guest] & (board.blocked[guest] == 0)
    short_memory = board.memory[guest] - board.memory_left
    short_vcpus = board.vcpus[guest] - board.vcpus_left
    for other in np.argsort(board.memory, kind="stable").tolist():
        host = int(board.at[other])
        if not suits[host] or board.guests[other].kept or other in board.blocks:
            continue
        if board.memory[other] < short_memory[host] or board.vcpus[other] < short_vcpus[host]:
            continue
        if board.backed and not enough(board.pages[guest], board.pages_left[host] + board.pages[other]):
            continue
        if _go(board, (other,), wanted, steps):
            _make(board, board.step(guest, host), steps)
            return True
    return False


def _reason(board: Board, block: tuple[int, ...]) -> str:
    """Why none of the hosts that stay takes it."""
    rows, guest = list(block), board.guests[block[0]]
    kept = [board.guests[g].name for g in block if board.guests[g].kept]
    if kept:
        return f"it must be with VM {kept[0]}, which no plan moves"
    suits = board.open & board.allowed[rows].all(axis=0)
    apart = (board.blocked[rows] == 0).all(axis=0)
    memory, vcpus = int(board.memory[rows].sum()), int(board.vcpus[rows].sum())
    together = f" and the {len(block) - 1} VMs that must be with it" if len(block) > 1 else ""
    if not suits.any():
        return (
            f"none of the {int(board.open.sum())} other hosts suits VM {guest.name}{together} by its filters"
        )
    if not (suits & apart).any():
        return f"affinity groups keep VM {guest.name}{together} off each of the {int(suits.sum())} hosts that suit it"
    usable = suits & apart
    if len(board.block(block[0])) > len(block):
        return f"VM {guest.name} must be on one host with VMs that are on hosts without room for it"
    pages = board.pages[rows].sum(axis=0)
    if not (usable & enough(pages, board.pages_left)).any():
        wanted = " and ".join(f"{count} of {name}" for count, name in zip(pages, NAMES, strict=True) if count)
        return f"none of the {int(usable.sum())} hosts that suit VM {guest.name}{together} has its huge pages left: {wanted}"
    best = int(np.where(usable, board.memory_left, np.iinfo(np.int64).min).argmax())
    left, vcpus_left = int(board.memory_left[best]), int(board.vcpus_left[best])
    return (
        f"none of the {int(usable.sum())} hosts that suit VM {guest.name}{together} has room: {board.places[best].name} has "
        f"most memory left, {size(max(left, 0))} and {max(vcpus_left, 0)} vCPUs, and {size(memory)} and {vcpus} vCPUs are needed"
    )
