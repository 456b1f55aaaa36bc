"""One plan, computed whole: what its kind asks, its steps in waves, and whether a wave is still right later. Pure."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import numpy as np
from msgspec.structs import replace

from services.scheduler.policies.balancing import MOST_MOVES, Aims, balance, cost
from services.scheduler.policies.board import Board, Step
from services.scheduler.policies.enforcing import enforce
from services.scheduler.policies.evacuating import Stuck, evacuate
from services.scheduler.policies.saving import Limits, save
from services.scheduler.policies.upgrading import upgrade
from services.scheduler.policies.waves import PER_HOST, joins, waves
from volery.contracts.plan import PlanKind, PlanStep, Unplaced

TRIES, SMALL = 2, 50_000
"""Orders of moves that are tried on a small board (VMs times hosts), where a second one costs a fraction of a second and often
finds a better end."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a plan is made for."""

    kind: PlanKind
    aims: Aims
    reserved: bool = False
    host_ids: tuple[str, ...] = ()
    avoided: tuple[str, ...] = ()
    most: int = 0
    limits: Limits = field(default_factory=Limits)
    """Of a saving."""


@dataclass(frozen=True, slots=True)
class Draft:
    """A plan's contents."""

    steps: tuple[PlanStep, ...] = ()
    unplaced: tuple[Unplaced, ...] = ()
    broken_groups: tuple[str, ...] = ()
    before: float = 0.0
    after: float = 0.0
    host_ids: tuple[str, ...] = ()
    """Of an upgrade: in the order in which hosts are emptied. Of a saving: the host that is switched off once it is empty."""
    wake_host_ids: tuple[str, ...] = ()
    said: str = ""
    """Of a saving: what it does, or why nothing."""

    @property
    def message(self) -> str:
        if self.said:
            return self.said
        vms = len({step.vm_id for step in self.steps})
        hosts = len({step.source_host_id for step in self.steps})
        moves = (
            f"moves {vms} VM{'s' if vms != 1 else ''} away from {hosts} host{'s' if hosts != 1 else ''}"
            if self.steps
            else "there is nothing to move"
        )
        left = [
            f"{len(self.unplaced)} VMs have no place" if self.unplaced else "",
            f"affinity groups {', '.join(self.broken_groups)} stay broken" if self.broken_groups else "",
        ]
        return "; ".join([moves, *(each for each in left if each)])


def draft(board: Board, wanted: Wanted) -> Draft:
    match wanted.kind:
        case PlanKind.BALANCE:
            most = wanted.most or MOST_MOVES
            tries = range(TRIES if len(board.guests) * len(board.places) <= SMALL else 1)
            balanced = balance(board, wanted.aims, reserved=wanted.reserved, most=most, tries=tries)
            return Draft(_steps(board, balanced.steps), before=balanced.before, after=balanced.after)
        case PlanKind.AFFINITY:
            mended = enforce(board, reserved=wanted.reserved)
            return Draft(
                _steps(board, mended.steps),
                broken_groups=mended.left,
                before=sum(mended.before),
                after=sum(mended.after),
            )
        case PlanKind.EVACUATION:
            rows, avoided = _rows(board, wanted.host_ids), _rows(board, wanted.avoided)
            emptied = evacuate(board, rows, avoided=avoided)
            unplaced = _unplaced(board, emptied.stuck)
            on = int(np.isin(board.at, rows).sum())
            return Draft(_steps(board, emptied.steps), unplaced, before=float(on), after=float(len(unplaced)))
        case PlanKind.UPGRADE:
            return _upgrade(board, _rows(board, wanted.host_ids))
        case PlanKind.SAVING:
            return _saving(board, wanted)


def _upgrade(board: Board, rows: Sequence[int]) -> Draft:
    """Waves are numbered through all turns."""
    steps: list[PlanStep] = []
    stuck: list[Stuck] = []
    host_ids: list[str] = []
    for number, turn in enumerate(upgrade(board, rows)):
        first = steps[-1].wave + 1 if steps else 0
        made = _steps(turn.board, turn.emptied.steps)
        steps += [replace(step, wave=step.wave + first, turn=number) for step in made]
        stuck += turn.emptied.stuck
        host_ids.append(board.places[turn.host].id)
    on = int(np.isin(board.at, rows).sum())
    unplaced = _unplaced(board, stuck)
    return Draft(
        tuple(steps), unplaced, before=float(on), after=float(len(unplaced)), host_ids=tuple(host_ids)
    )


def _rows(board: Board, host_ids: Collection[str]) -> list[int]:
    return [board.row[host] for host in host_ids if host in board.row]


def _unplaced(board: Board, stuck: Collection[Stuck]) -> tuple[Unplaced, ...]:
    return tuple(
        Unplaced(vm_id=board.guests[s.guest].id, vm_name=board.guests[s.guest].name, reason=s.reason)
        for s in stuck
    )


def _saving(board: Board, wanted: Wanted) -> Draft:
    """Without a host when none can sleep."""
    saved = save(board, _rows(board, wanted.host_ids), wanted.limits)
    if saved.host is None:
        return Draft(said=f"switches nothing off: {saved.reason}")
    host, vms = board.places[saved.host], len({step.guest for step in saved.steps})
    moves = f"moves {vms} VM{'s' if vms != 1 else ''} away from {host.name} and " if vms else ""
    said = f"{moves}switches {'it' if moves else host.name} off to save power"
    return Draft(_steps(board, saved.steps), before=float(vms), host_ids=(host.id,), said=said)


def _steps(board: Board, steps: Sequence[Step]) -> tuple[PlanStep, ...]:
    return tuple(
        PlanStep(
            vm_id=board.guests[step.guest].id,
            vm_name=board.guests[step.guest].name,
            source_host_id=board.places[step.source].id,
            source_host_name=board.places[step.source].name,
            target_host_id=board.places[step.target].id,
            target_host_name=board.places[step.target].name,
            wave=number,
        )
        for number, wave in enumerate(waves(board, steps))
        for step in wave
    )


def wrong_now(board: Board, steps: Collection[PlanStep]) -> str:
    """Why these steps of one wave aren't to be begun any more, as things are now; "" when they are."""
    wave: list[Step] = []
    for step in steps:
        name = f"VM {step.vm_name}"
        if step.vm_id not in board.number:
            return f"{name} no longer runs settled on {step.source_host_name}"
        guest = board.number[step.vm_id]
        if board.places[int(board.at[guest])].id != step.source_host_id:
            return f"{name} is on {board.places[int(board.at[guest])].name}, not on {step.source_host_name} any more"
        if board.guests[guest].kept:
            return f"{name} can't be moved now: {board.guests[guest].kept}"
        target = board.row.get(step.target_host_id)
        if target is None or not board.open[target]:
            return f"host {step.target_host_name} takes no VMs any more"
        if not board.allowed[guest, target]:
            return f"host {step.target_host_name} doesn't suit {name} any more"
        found = board.step(guest, target)
        if not joins(board, wave, found, PER_HOST):
            return f"host {step.target_host_name} has no room for {name} any more, or affinity groups keep it off"
        wave.append(found)
    return ""


def useless_now(board: Board, wanted: Wanted, steps: Collection[PlanStep]) -> bool:
    """Whether the rest of a balance would no longer make its cluster more even."""
    if wanted.kind is not PlanKind.BALANCE:
        return False
    end = board.copy()
    for step in steps:
        if step.vm_id in end.number and step.target_host_id in end.row:
            end.move(end.step(end.number[step.vm_id], end.row[step.target_host_id]))
    return cost(end, wanted.aims) >= cost(board, wanted.aims)
