"""Physical CPUs: which ones a pinned VM gets on a host, given those that others have. Pure.

A host's CPUs are a set that is shared, and CPUs that VMs have alone. Whoever has none of its own runs on the shared ones,
so no VM gets so many alone that too few are left for the largest of the others, or for the over-commit of all of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import chain

import msgspec

from services.scheduler.policies.outline import outline
from volery.contracts.cpus import CpuCore, CpuPinning, GivenCpus, PinningPolicy

Cpus = frozenset[int]
NOBODY: Cpus = frozenset()


@dataclass(frozen=True, slots=True, eq=False)
class HostCpus:
    """A host's cores, and who has which of their CPUs. Kept one of a kind: most hosts of a fleet share theirs."""

    cores: tuple[CpuCore, ...] = ()
    """Empty: the host hasn't said."""
    exclusive: Cpus = NOBODY
    """One VM's alone."""
    pinned: Cpus = NOBODY
    """VMs are pinned to them that share them with whoever is there: nobody gets these alone."""
    every: Cpus = field(init=False)
    free: Cpus = field(init=False)
    """Those that one VM could have alone."""
    threads: int = field(init=False)
    """Of each core; 0 where they differ."""

    def __post_init__(self) -> None:
        every = frozenset(chain.from_iterable(core.cpus for core in self.cores))
        object.__setattr__(self, "every", every)
        object.__setattr__(self, "free", every - self.exclusive - self.pinned)
        sizes = {len(core.cpus) for core in self.cores}
        object.__setattr__(self, "threads", sizes.pop() if len(sizes) == 1 else 0)


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
    """What a VM asks, as far as choosing goes."""

    policy: PinningPolicy
    vcpus: int
    threads: int = 1
    """Of each of its cores."""
    pins: tuple[tuple[int, ...], ...] = ()
    named: Cpus = field(init=False)
    """All CPUs of its pins."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "named", frozenset(chain.from_iterable(self.pins)))

    @staticmethod
    def of(pinning: CpuPinning, vcpus: int, threads: int) -> Wish | None:
        """None for a VM that runs on what is shared."""
        if pinning.policy is PinningPolicy.NONE:
            return None
        if pinning.policy is PinningPolicy.RESIZE_AND_PIN:
            return Wish(pinning.policy, 0)
        return Wish(pinning.policy, vcpus, max(threads, 1), pinning.pins)

    @property
    def alone(self) -> bool:
        """Whether it gets CPUs that nobody else uses."""
        return not self.resized and self.policy is not PinningPolicy.MANUAL

    @property
    def resized(self) -> bool:
        """Whether its host says how many vCPUs it has."""
        return self.policy is PinningPolicy.RESIZE_AND_PIN


@cache
def read_cores(text: str) -> tuple[CpuCore, ...]:
    """Cores as the table has them."""
    return msgspec.json.decode(text, type=tuple[CpuCore, ...]) if text else ()


def choose(host: HostCpus, wish: Wish) -> GivenCpus | None:
    """The same for the same question; None when the host hasn't got them."""
    return _CHOOSERS[wish.policy](host, wish)


def has_pins(host: HostCpus, wish: Wish) -> bool:
    wanted = wish.named
    return wanted <= host.every and wanted.isdisjoint(host.exclusive) and len(wish.pins) >= wish.vcpus


def _manual(host: HostCpus, wish: Wish) -> GivenCpus | None:
    return GivenCpus(pins=wish.pins) if has_pins(host, wish) else None


def _resized(host: HostCpus, wish: Wish) -> GivenCpus | None:
    return GivenCpus(pins=outline(host.cores).pins) if has_outline(host) else None


def has_outline(host: HostCpus) -> bool:
    """Whether a VM can be resized to it, and nobody has any of these CPUs alone."""
    found = outline(host.cores)
    return not found.why_not and host.exclusive.isdisjoint(chain.from_iterable(found.pins))


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
    PinningPolicy.RESIZE_AND_PIN: _resized,
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


def capacity(host: HostCpus, policy: PinningPolicy, threads: int) -> int:
    """For how many vCPUs of a VM whose cores have so many threads the host has CPUs that nobody else uses."""
    free = host.free
    if policy is PinningPolicy.ISOLATE_THREADS:
        return sum(free.issuperset(core.cpus) for core in host.cores)
    if threads == 1:
        return len(free)
    return threads * sum(len(free.intersection(core.cpus)) // threads for core in host.cores)


def alone(host: HostCpus, wish: Wish) -> int:
    """How many CPUs would be the VM's alone on a host with the capacity for it."""
    if wish.policy is PinningPolicy.DEDICATED:
        return wish.vcpus
    if host.threads:
        return wish.vcpus * host.threads
    given = choose(host, wish)
    return 0 if given is None else len(given.exclusive)


def most_vcpus(host: HostCpus, wish: Wish, most: int) -> int:
    """The largest number of vCPUs, not more than it has, for which the host would give up to `most` CPUs; 0 for none."""
    least = min(wish.vcpus, capacity(host, wish.policy, wish.threads))
    if wish.policy is PinningPolicy.DEDICATED:
        return max(min(least, most), 0)
    if host.threads:
        return max(min(least, most // host.threads), 0)
    fits = (vcpus for vcpus in range(least, 0, -1) if alone(host, replace(wish, vcpus=vcpus)) <= most)
    return next(fits, 0)
