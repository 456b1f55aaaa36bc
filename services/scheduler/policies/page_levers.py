"""Levers of the rule about huge pages; what a lever is says levers.py.

No other rule's lever helps a VM on huge pages by making its memory smaller: a host's ordinary memory gets only its overhead.
"""

from __future__ import annotations

import numpy as np

from services.scheduler.fleet import Bools, Fleet, Ints
from services.scheduler.pages import NAMES, PAGES, PAGES_USED, SIZES
from services.scheduler.policies import backing, resized
from services.scheduler.policies.levers import LEAST_MEMORY, NEVER, Lever
from services.scheduler.policies.request import Request, size
from volery.contracts.scheduling import Change, ChangeKind

RULE = "huge_pages"


def _where(possible: Bools, amount: Ints) -> Ints:
    return np.where(possible, amount, NEVER)


def _total(fleet: Fleet, request: Request) -> Ints:
    return fleet.ints(PAGES[backing.number_of(request)])


def _wanted(request: Request) -> int:
    return request.pages[backing.number_of(request)]


def _to_free(fleet: Fleet, request: Request) -> Ints:
    return _where(_total(fleet, request) >= _wanted(request), backing.short(fleet, request))


def free_pages(fleet: Fleet, request: Request, row: int, amount: int) -> Change:
    name, number = fleet.names[row], backing.number_of(request)
    used = int(fleet.ints(PAGES_USED[number])[row])
    return Change(
        rules=(), kind=ChangeKind.HOST, object_kind="host", object_id=fleet.ids[row], object_name=name,
        field=PAGES_USED[number], current=used, wanted=used - amount, amount=amount, unit="pages",
        sentence=f"move or stop VMs with {amount} huge pages of {NAMES[number]} on {name}",
    )  # fmt: skip


def _to_set_aside(fleet: Fleet, request: Request) -> Ints:
    """Only where the host hasn't enough of them altogether: it costs ordinary memory."""
    possible = (_total(fleet, request) < _wanted(request)) & backing.room_to_set_aside(fleet, request)
    return _where(possible, backing.short(fleet, request))


def set_aside(fleet: Fleet, request: Request, row: int, amount: int) -> Change:
    name, number = fleet.names[row], backing.number_of(request)
    total = int(fleet.ints(PAGES[number])[row])
    return Change(
        rules=(), kind=ChangeKind.HOST, object_kind="host", object_id=fleet.ids[row], object_name=name,
        field=PAGES[number], current=total, wanted=total + amount, amount=amount, unit="pages",
        sentence=f"set {amount} more huge pages of {NAMES[number]} ({size(amount * SIZES[number])}) aside on {name}",
    )  # fmt: skip


def _of_vm(
    request: Request, field: str, current: int, wanted: int, amount: int, unit: str, sentence: str
) -> Change:
    return Change(
        rules=(), kind=ChangeKind.VM, object_kind="vm", object_id=request.need.vm_id, object_name=request.need.name,
        field=field, current=current, wanted=wanted, amount=amount, unit=unit, sentence=sentence,
    )  # fmt: skip


def _too_much(fleet: Fleet, request: Request) -> Ints:
    """Whole pages by which the VM is too large: its memory stays a multiple of theirs."""
    left = backing.left(fleet, backing.number_of(request))
    page = SIZES[backing.number_of(request)]
    enough = left * page >= max(LEAST_MEMORY, page)
    return _where(enough & (left >= resized.nodes(fleet, request)), backing.short(fleet, request))


def shrink(fleet: Fleet, request: Request, row: int, amount: int) -> Change:
    now, number = request.need.memory_bytes, backing.number_of(request)
    wanted = (_wanted(request) - amount) * SIZES[number]
    return _of_vm(
        request, "memory_bytes", now, wanted, amount, "pages",
        f"give {request.vm} at most {size(wanted)} of memory instead of {size(now)}, {amount} fewer huge pages of "
        f"{NAMES[number]}",
    )  # fmt: skip


def _has_other_size(fleet: Fleet, request: Request) -> Bools:
    count = backing.pages_of_other_size(request)[1]
    mask: Bools = (backing.left(fleet, 1 - backing.number_of(request)) >= count) & (count > 0)
    return mask


def _otherwise(fleet: Fleet, request: Request) -> Ints:
    possible = _has_other_size(fleet, request) | backing.room_without(fleet, request)
    # Nodes that are pinned to NUMA cells would take something else of these.
    possible &= not request.cells and not resized.is_resized(request)
    return _where(possible, np.ones(len(fleet), np.int64))


def back_otherwise(fleet: Fleet, request: Request, row: int, amount: int) -> Change:
    """By pages of the other size where there are enough, else by none."""
    now, other = backing.number_of(request), backing.pages_of_other_size(request)[0]
    if bool(_has_other_size(fleet, request)[row]):
        wanted, what = other, f"huge pages of {NAMES[1 - now]}"
    else:
        wanted, what = 0, "ordinary memory"
    return _of_vm(
        request, "hugepage_kib", request.need.hugepage_kib, wanted, amount, "",
        f"back {request.vm} by {what} instead of huge pages of {NAMES[now]}",
    )  # fmt: skip


PAGE_LEVERS: tuple[Lever, ...] = (
    Lever(RULE, ChangeKind.HOST, "pages_used", _to_free, free_pages, _wanted),
    Lever(RULE, ChangeKind.HOST, "pages", _to_set_aside, set_aside, _wanted),
    Lever(RULE, ChangeKind.VM, "memory in pages", _too_much, shrink, _wanted),
    Lever(RULE, ChangeKind.VM, "hugepage_kib", _otherwise, back_otherwise),
)
