"""Huge pages as a rule: whether a host has enough of them left, and what would have to change where it has not."""

from __future__ import annotations

import numpy as np

from services.scheduler.fleet import Bools, Fleet, Ints
from services.scheduler.pages import KIB, NAMES, PAGES, PAGES_USED, SIZES, pages_taken
from services.scheduler.policies.request import Request, size


def has_pages(fleet: Fleet, request: Request) -> Bools:
    mask = np.ones(len(fleet), np.bool_)
    for number, count in enumerate(request.pages):
        if count:
            mask &= left(fleet, number) >= count
    return mask


def left(fleet: Fleet, number: int) -> Ints:
    """Pages of a size that no claim holds, by host; negative where a host has fewer than are held."""
    pages: Ints = fleet.ints(PAGES[number]) - fleet.ints(PAGES_USED[number])
    return pages


def number_of(request: Request) -> int:
    """Which size the VM asks for."""
    return SIZES.index(request.need.hugepage_kib * KIB)


def short(fleet: Fleet, request: Request) -> Ints:
    """How many pages each host lacks."""
    number = number_of(request)
    lacking: Ints = request.pages[number] - left(fleet, number)
    return lacking


def too_few_pages(fleet: Fleet, request: Request, row: int) -> tuple[str, str]:
    name, number = fleet.names[row], number_of(request)
    total, wanted = int(fleet.ints(PAGES[number])[row]), request.pages[number]
    lacking, kind = int(short(fleet, request)[row]), f"huge pages of {NAMES[number]}"
    held = total - int(left(fleet, number)[row])
    reason = f"{held} of the {total} {kind} of {name} are taken, {request.vm} needs {wanted}"
    if total >= wanted:
        return reason, f"stop VMs with {lacking} {kind} on {name}, or set {lacking} more aside there"
    return reason, f"set {lacking} more {kind} ({size(lacking * SIZES[number])}) aside on {name}"


def room_to_set_aside(fleet: Fleet, request: Request) -> Bools:
    """Hosts whose ordinary memory has room for what they lack in pages, and for the VM's overhead beside that."""
    added = np.maximum(short(fleet, request), 0) * SIZES[number_of(request)]
    memory = fleet.ints("memory_bytes") - added
    limit = memory * request.policy.memory_overcommit_percent // 100 - request.reserve
    mask: Bools = (memory >= 0) & (fleet.ints("memory_used") + request.memory <= limit)
    return mask


def room_without(fleet: Fleet, request: Request) -> Bools:
    """Hosts whose ordinary memory has room for the whole VM."""
    wanted = request.need.memory_bytes + request.overhead
    mask: Bools = fleet.ints("memory_used") + wanted <= fleet.ints("memory_limit")
    return mask


def pages_of_other_size(request: Request) -> tuple[int, int]:
    """The other size: its KiB, and how many pages of it would back the VM; 0 where its memory isn't whole pages of it."""
    other = 1 - number_of(request)
    if request.need.memory_bytes % SIZES[other]:
        return SIZES[other] // KIB, 0
    return SIZES[other] // KIB, pages_taken(request.need.memory_bytes, SIZES[other] // KIB)[other]
