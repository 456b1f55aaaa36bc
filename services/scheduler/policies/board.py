"""The board that plans are made on: hosts and the VMs on them in columns, and what a move does to them. Pure.

A board has the hosts of one cluster and every VM that holds capacity there. It is moved on as a plan is made, and says of
every VM and host at once whether the VM could go there now: by what the filters say of host and VM (`allowed`, which no
move changes), by memory and vCPUs, and by enforcing affinity groups.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from services.scheduler.fleet import Bools, Floats, Ints
from services.scheduler.pages import NO_PAGES, Pages
from services.scheduler.policies.affinity import ClusterRules

Matrix = NDArray[np.bool_]
"""VMs × hosts."""


@dataclass(frozen=True, slots=True)
class Place:
    """A host of the board. Memory in bytes; limits and use are of what may be promised, claims of VMs that aren't on the
    board included. `load` is CPUs' worth of work, its VMs' included."""

    id: str
    name: str
    memory_limit: int
    memory_used: int
    vcpus_limit: int
    vcpus_used: int
    cpus: int
    load: float = 0.0
    open: bool = True
    """Whether it may get VMs: it is up, and nobody empties it."""
    pages_left: Pages = NO_PAGES


@dataclass(frozen=True, slots=True)
class Guest:
    """A VM of the board. Memory in bytes with overhead, `load` in CPUs' worth of work."""

    id: str
    name: str
    host_id: str
    memory: int
    vcpus: int
    load: float = 0.0
    high_availability: bool = False
    priority: int = 0
    kept: str = ""
    """Why no plan moves it; "" when one may."""
    pages: Pages = NO_PAGES


@dataclass(frozen=True, slots=True)
class Step:
    """One VM moves, in the row numbers of its board."""

    guest: int
    source: int
    target: int


@dataclass(slots=True)
class Board:
    places: Sequence[Place]
    guests: Sequence[Guest]
    allowed: Matrix
    """Whether a host suits a VM, whatever else is there; enforcing host rules of affinity groups included."""
    rules: ClusterRules = field(default_factory=ClusterRules)
    row: Mapping[str, int] = field(init=False)
    """Host → its row."""
    number: Mapping[str, int] = field(init=False)
    """VM → its row."""
    at: Ints = field(init=False)
    memory: Ints = field(init=False)
    vcpus: Ints = field(init=False)
    load: Floats = field(init=False)
    available: Bools = field(init=False)
    """Whether each VM is highly available."""
    memory_limit: Ints = field(init=False)
    memory_used: Ints = field(init=False)
    vcpus_limit: Ints = field(init=False)
    vcpus_used: Ints = field(init=False)
    pages: Ints = field(init=False)
    """VMs × sizes of huge pages, and `pages_left` hosts × sizes."""
    pages_left: Ints = field(init=False)
    backed: bool = field(init=False)
    """Whether any VM is backed by huge pages."""
    cpus: Floats = field(init=False)
    work: Floats = field(init=False)
    counts: Ints = field(init=False)
    open: Bools = field(init=False)
    blocks: Mapping[int, tuple[int, ...]] = field(init=False)
    """VM → all VMs of its union on the board, itself included, where there is more than one."""
    rivals: Mapping[int, Ints] = field(init=False)
    """VM → the VMs that must not be where it is."""
    blocked: NDArray[np.int16] = field(init=False)
    """How many rivals of each VM are on each host."""

    def __post_init__(self) -> None:
        places, guests = self.places, self.guests
        self.row = {place.id: n for n, place in enumerate(places)}
        self.number = {guest.id: n for n, guest in enumerate(guests)}
        self.at = np.array([self.row[guest.host_id] for guest in guests], np.int64)
        self.memory = np.array([guest.memory for guest in guests], np.int64)
        self.vcpus = np.array([guest.vcpus for guest in guests], np.int64)
        self.load = np.array([guest.load for guest in guests], np.float64)
        self.available = np.array([guest.high_availability for guest in guests], np.bool_)
        self.memory_limit = np.array([place.memory_limit for place in places], np.int64)
        self.memory_used = np.array([place.memory_used for place in places], np.int64)
        self.vcpus_limit = np.array([place.vcpus_limit for place in places], np.int64)
        self.vcpus_used = np.array([place.vcpus_used for place in places], np.int64)
        self.pages = np.array([guest.pages for guest in guests], np.int64).reshape(-1, len(NO_PAGES))
        self.pages_left = np.array([place.pages_left for place in places], np.int64)
        self.backed = bool(self.pages.any())
        self.cpus = np.array([max(place.cpus, 1) for place in places], np.float64)
        self.work = np.array([place.load for place in places], np.float64)
        self.counts = np.bincount(self.at, minlength=len(places)).astype(np.int64)
        self.open = np.array([place.open for place in places], np.bool_)
        self._bind()

    def _bind(self) -> None:
        blocks: dict[int, tuple[int, ...]] = {}
        rivals: dict[int, Ints] = {}
        self.blocked = np.zeros((len(self.guests), len(self.places)), np.int16)
        for number, guest in enumerate(self.guests):
            around = self.rules.around(guest.id)
            if around is None:
                continue
            block = self.numbers(around.union)
            if len(block) > 1:
                blocks[number] = tuple(block)
            others = self.numbers(around.rivals.keys() - {guest.id})
            if others:
                rivals[number] = np.array(others, np.int64)
                for host in self.at[others]:
                    self.blocked[number, host] += 1
        self.blocks, self.rivals = blocks, rivals

    def numbers(self, vm_ids: Iterable[str]) -> list[int]:
        """Rows of those VMs that are on the board, in order."""
        return sorted(self.number[vm_id] for vm_id in vm_ids if vm_id in self.number)

    def block(self, guest: int) -> tuple[int, ...]:
        """The VMs that must be where it is, itself included."""
        return self.blocks.get(guest, (guest,))

    def copy(self) -> Board:
        """As it is now, to be moved on by itself."""
        made = object.__new__(Board)
        for name in Board.__slots__:
            value = getattr(self, name)
            setattr(made, name, value.copy() if name in _MOVED else value)
        return made

    @property
    def memory_left(self) -> Ints:
        left: Ints = self.memory_limit - self.memory_used
        return left

    @property
    def vcpus_left(self) -> Ints:
        left: Ints = self.vcpus_limit - self.vcpus_used
        return left

    def fits(self, guest: int) -> Bools:
        """Hosts that could take this VM now, where it is left out."""
        return self.fits_all((guest,))

    def fits_all(self, guests: Collection[int]) -> Bools:
        """Hosts that could take all of these now, which are on none of them. What keeps VMs of one union together is not
        looked at: whoever moves one moves the rest."""
        rows = list(guests)
        mask: Bools = self.open & (self.memory_left >= self.memory[rows].sum())
        mask &= self.vcpus_left >= self.vcpus[rows].sum()
        if self.backed:
            mask &= enough(self.pages[rows].sum(axis=0), self.pages_left)
        mask &= self.allowed[rows].all(axis=0) & (self.blocked[rows] == 0).all(axis=0)
        mask[self.at[rows]] = False
        return mask

    def move(self, step: Step) -> None:
        guest, source, target = step.guest, step.source, step.target
        for column, amount in (
            (self.memory_used, self.memory[guest]),
            (self.vcpus_used, self.vcpus[guest]),
            (self.work, self.load[guest]),
            (self.counts, 1),
        ):
            column[source] -= amount
            column[target] += amount
        self.pages_left[source] += self.pages[guest]
        self.pages_left[target] -= self.pages[guest]
        self.at[guest] = target
        if guest in self.rivals:
            others = self.rivals[guest]
            self.blocked[others, source] -= 1
            self.blocked[others, target] += 1

    def step(self, guest: int, target: int) -> Step:
        return Step(guest, int(self.at[guest]), target)


def enough(wanted: Ints, left: Ints) -> Bools:
    """Whether huge pages that are left suffice, the last axis being their sizes; what isn't asked for isn't lacking."""
    mask: Bools = ((wanted == 0) | (wanted <= left)).all(axis=-1)
    return mask


_MOVED = frozenset({"at", "memory_used", "vcpus_used", "pages_left", "work", "counts", "blocked", "open"})
"""What moves change; `open` may be changed by who makes a plan."""
