"""Physical CPUs: which ones a pinned VM gets on a host, given those that others have. Pure.

A host's CPUs are a set that is shared, and CPUs that VMs have alone. Whoever has none of its own runs on the shared ones,
so no VM gets so many alone that too few are left for the largest of the others, or for the over-commit of all of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, lru_cache
from itertools import chain

import msgspec

from volery.contracts.cpus import CpuCore, CpuPinning, GivenCpus, PinningPolicy

Cpus = frozenset[int]
NOBODY: Cpus = frozenset()


@dataclass(frozen=True, slots=True, eq=False)
class HostCpus:
    """A host's cores, and who has which of their CPUs. Kept one of a kind, so that answers are found by which it is."""

    cores: tuple[CpuCore, ...] = ()
    """Empty: the host hasn't said."""
    exclusive: Cpus = NOBODY
    """One VM's alone."""
    pinned: Cpus = NOBODY
    """VMs are pinned to them that share them with whoever is there: nobody gets these alone."""
    every: Cpus = field(init=False)
    free: Cpus = field(init=False)
    """Those that one VM could have alone."""

    def __post_init__(self) -> None:
        every = frozenset(chain.from_iterable(core.cpus for core in self.cores))
        object.__setattr__(self, "every", every)
        object.__setattr__(self, "free", every - self.exclusive - self.pinned)


@dataclass(frozen=True, slots=True)
class Held:
    """Physical CPUs of one host that claims hold."""

    revision: int = 0
    """Counts how often some were given or taken back; what is said here is as of then."""
    exclusive: Cpus = NOBODY
    pinned: Cpus = NOBODY
    vcpus: int = 0
    """Of the VMs that have CPUs alone."""

    def with_more(self, given: GivenCpus, vcpus: int) -> Held:
        """One VM more; if nobody else was given any since, as the table says now."""
        alone = bool(given.exclusive)
        return Held(
            given.revision + 1,
            self.exclusive | frozenset(given.exclusive),
            self.pinned if alone else self.pinned.union(*given.pins),
            self.vcpus + (vcpus if alone else 0),
        )


FREE = Held()


@dataclass(frozen=True, slots=True)
class Wish:
    """What a VM asks, as far as choosing goes: VMs that ask the same share an answer."""

    policy: PinningPolicy
    vcpus: int
    threads: int = 1
    """Of each of its cores."""
    pins: tuple[tuple[int, ...], ...] = ()

    @staticmethod
    def of(pinning: CpuPinning, vcpus: int, threads: int) -> Wish | None:
        """None for a VM that runs on what is shared."""
        if pinning.policy is PinningPolicy.NONE:
            return None
        return Wish(pinning.policy, vcpus, max(threads, 1), pinning.pins)

    @property
    def alone(self) -> bool:
        """Whether it gets CPUs that nobody else uses."""
        return self.policy is not PinningPolicy.MANUAL


@cache
def read_cores(text: str) -> tuple[CpuCore, ...]:
    """Cores as the table has them."""
    return msgspec.json.decode(text, type=tuple[CpuCore, ...]) if text else ()


@lru_cache(maxsize=1 << 16)
def choose(host: HostCpus, wish: Wish) -> GivenCpus | None:
    """The same for the same question; None when the host hasn't got them."""
    return _CHOOSERS[wish.policy](host, wish)


def _manual(host: HostCpus, wish: Wish) -> GivenCpus | None:
    wanted = frozenset(chain.from_iterable(wish.pins))
    if wanted - host.every or wanted & host.exclusive or len(wish.pins) < wish.vcpus:
        return None
    return GivenCpus(pins=wish.pins)


def _dedicated(host: HostCpus, wish: Wish) -> GivenCpus | None:
    """Threads of one core for each core of the VM."""
    groups = [threads for core in _in_order(host, wish) for threads in _split(core.cpus, wish.threads)]
    needed = -(-wish.vcpus // wish.threads)
    if len(groups) < needed:
        return None
    cpus = tuple(chain.from_iterable(groups[:needed]))[: wish.vcpus]
    return GivenCpus(pins=tuple((cpu,) for cpu in cpus), exclusive=tuple(sorted(cpus)))


def _isolated(host: HostCpus, wish: Wish) -> GivenCpus | None:
    whole = [core for core in host.cores if host.free.issuperset(core.cpus)]
    chosen = list(_near(whole, wish.vcpus))[: wish.vcpus]
    if len(chosen) < wish.vcpus:
        return None
    taken = chain.from_iterable(core.cpus for core in chosen)
    return GivenCpus(pins=tuple((core.cpus[0],) for core in chosen), exclusive=tuple(sorted(taken)))


_CHOOSERS = {
    PinningPolicy.MANUAL: _manual,
    PinningPolicy.DEDICATED: _dedicated,
    PinningPolicy.ISOLATE_THREADS: _isolated,
}


def _in_order(host: HostCpus, wish: Wish) -> Iterator[CpuCore]:
    """The free threads of each core. Whole cores first, as many as are filled; what is left over goes to cores that aren't
    whole any more, as far as they reach."""
    free, whole, broken = host.free, list[CpuCore](), list[CpuCore]()
    for core in host.cores:
        left = tuple(cpu for cpu in core.cpus if cpu in free)
        if len(left) == len(core.cpus):
            whole.append(core)
        elif left:
            broken.append(msgspec.structs.replace(core, cpus=left))
    per_core = max((len(core.cpus) for core in whole), default=1)
    filled = wish.vcpus // per_core
    ordered = list(_near(whole, -(-wish.vcpus // per_core)))
    return chain(ordered[:filled], sorted(broken, key=lambda core: len(core.cpus)), ordered[filled:])


def _near(cores: Sequence[CpuCore], count: int) -> Iterable[CpuCore]:
    """All of one cell where that is enough, the one that has the fewest; else from the cells that have the most."""
    cells: dict[tuple[int, int], list[CpuCore]] = {}
    for core in cores:
        cells.setdefault((core.cell, core.socket), []).append(core)
    enough = [cell for cell in cells if len(cells[cell]) >= count]
    first = min(enough, key=lambda cell: (len(cells[cell]), cell), default=None)
    order = sorted(cells, key=lambda cell: (cell != first, -len(cells[cell]), cell))
    return chain.from_iterable(cells[cell] for cell in order)


def _split(threads: tuple[int, ...], size: int) -> Iterator[tuple[int, ...]]:
    """Whole groups only."""
    for at in range(0, len(threads) - size + 1, size):
        yield threads[at : at + size]


def footprint(host: HostCpus, given: GivenCpus) -> tuple[int, int]:
    """How many of the host's cores, and of its sockets, these CPUs are of."""
    cpus = frozenset(given.exclusive).union(*given.pins)
    cores = [core for core in host.cores if cpus.intersection(core.cpus)]
    return len(cores), len({core.socket for core in cores})


@lru_cache(maxsize=1 << 16)
def most_vcpus(host: HostCpus, wish: Wish, most: int) -> int:
    """The largest number of vCPUs, not more than it has, for which the host would give up to `most` CPUs; 0 for none."""
    for vcpus in range(min(wish.vcpus, len(host.free)), 0, -1):
        given = choose(host, replace(wish, vcpus=vcpus))
        if given is not None and len(given.exclusive) <= most:
            return vcpus
    return 0
