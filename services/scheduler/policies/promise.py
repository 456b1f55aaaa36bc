"""Whether a cluster survives the loss of hosts, found out by placing their protected VMs on what is left. Pure.

Every rule that a placement has is asked here, too: the filters are run over a copy of the cluster's hosts, on which what
was placed so far is taken. A greedy placing may find no place where an exact search would: several orders are tried. What
was found is kept as each VM's *refuge*, and restarts go there, so that whoever is brought back first takes nobody's place.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from math import comb

import numpy as np

from services.scheduler.cells import CellNeed, shared
from services.scheduler.config import SchedulerConfig
from services.scheduler.fleet import STATUSES, UP, Bools, Fleet, Floats
from services.scheduler.fleet import Seat as FleetSeat
from services.scheduler.model import ClusterPolicy
from services.scheduler.pages import NO_PAGES, Pages, too_many, total
from services.scheduler.policies import resized
from services.scheduler.policies.affinity import ClusterRules
from services.scheduler.policies.bound import FREE, Bound, Seat, resolve
from services.scheduler.policies.decision import decide, explain, mend, sentence
from services.scheduler.policies.filters import FILTERS
from services.scheduler.policies.losses import Homeless, Loss
from services.scheduler.policies.recipe import Recipe
from services.scheduler.policies.request import Request, request
from volery.contracts.host import HostStatus
from volery.contracts.scheduling import Need, Place, Purpose

DOWN = STATUSES.index(HostStatus.DOWN)
LOST_STATUSES = frozenset({HostStatus.DOWN, HostStatus.NON_RESPONSIVE})
LEAVING = STATUSES.index(HostStatus.PREPARING_FOR_MAINTENANCE)
MOST_SETS = 300
"""More sets of hosts than this aren't all tried: then those that a search holds to be the worst."""
MOST_AT_START = 20
"""The same for one VM that starts or moves, beside those of one host that it concerns."""
FRONT_TRIES = 4
"""So often those that found no place are tried first."""
SHOWN = 5
"""Hosts that a sentence about a VM without a place is made from."""
STANDING = frozenset(
    {
        "cluster",
        "target",
        "host_state",
        "pinned",
        "excluded",
        "cpu",
        "network",
        "storage",
        "cpu_model",
        "machine",
    }
    | {"affinity_hosts", "cluster_maintenance", "cpu_overload", "swap"}
)
"""Filters that don't depend on what was placed before; all others, also such as come later, are asked for each placing."""


@dataclass(frozen=True, slots=True)
class Guest:
    """A VM that holds capacity: where, how much, and what it would ask of another host."""

    need: Need
    host_id: str
    memory: int
    """Bytes with overhead, as claimed."""
    vcpus: int
    lost_host_id: str = ""
    refuge: str = ""
    """Where it goes when `lost_host_id` is lost; "" when that isn't known."""
    pages: Pages = NO_PAGES
    cells: tuple[CellNeed, ...] = ()

    @property
    def vm_id(self) -> str:
        return self.need.vm_id

    @property
    def protected(self) -> bool:
        return self.need.high_availability and not self.need.same_host

    @property
    def whole_memory(self) -> int:
        """Huge pages included."""
        return self.memory + self.pages.memory_bytes

    @property
    def haven(self) -> str:
        """Its refuge, if that is for where it is."""
        return self.refuge if self.lost_host_id == self.host_id else ""


@dataclass(slots=True)
class World:
    """One cluster to try things on: a fleet of its hosts only, which is its own."""

    fleet: Fleet
    policy: ClusterPolicy
    config: SchedulerConfig
    rules: ClusterRules
    guests: dict[str, Guest]
    now: float = 0.0
    stops: frozenset[str] = frozenset()
    """Hosts that leave and whose VMs are stopped first."""
    recipe: Recipe = field(init=False)
    _on: dict[str, list[Guest]] | None = field(init=False, default=None)
    _standing: dict[str, Bools] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.recipe = self.fleet.recipe(self.policy)

    def on(self, host_id: str) -> list[Guest]:
        if self._on is None:
            self._on = {}
            for guest in self.guests.values():
                self._on.setdefault(guest.host_id, []).append(guest)
        return self._on.get(host_id, [])

    def put(self, guest: Guest) -> None:
        """A VM that is to take its capacity there."""
        self.guests[guest.vm_id] = guest
        self._use(guest, 1)
        if guest.host_id in self.fleet.rows:
            self.fleet.seat(guest.host_id, guest.vcpus, self.request(guest).wish, guest.need.host_devices)
        self._on = None

    def move(self, vm_id: str, host_id: str) -> None:
        guest = self.guests[vm_id]
        self._use(guest, -1)
        asked = self.request(guest)
        vcpus, cells = resized.taken(self.fleet, asked, host_id)
        taken = replace(guest, memory=asked.memory, vcpus=vcpus, pages=asked.pages, cells=cells)
        self.put(replace(taken, host_id=host_id))

    def remove(self, vm_id: str) -> None:
        self._use(self.guests.pop(vm_id), -1)
        self._on = None

    def _use(self, guest: Guest, times: int) -> None:
        taken = (guest.host_id, guest.memory, guest.vcpus, int(guest.protected), guest.pages, guest.cells)
        use(self.fleet, taken, times)

    def request(self, guest: Guest, bound: Bound = FREE) -> Request:
        place = Place(need=guest.need, epoch=0, purpose=Purpose.RESTART)
        return request(place, self.policy, self.config, bound, recipe=self.recipe, now=self.now)

    def standing(self, guest: Guest, asked: Request) -> Bools:
        """Hosts that the rules leave it which nothing that is placed changes."""
        mask = self._standing.get(guest.vm_id)
        if mask is None:
            masks = (
                f.mask(self.fleet, asked) for f in FILTERS if f.name in STANDING and asked.follows(f.name)
            )
            mask = self._standing[guest.vm_id] = np.logical_and.reduce(list(masks))
        return mask

    def changed(self) -> None:
        """Hosts or needs aren't what they were."""
        self._standing.clear()
        self._on = None


Held = tuple[str, int, int, int, Pages, tuple[CellNeed, ...]]
"""Host, and what is taken of it: bytes, vCPUs, highly available VMs, huge pages, NUMA cells."""


def use(fleet: Fleet, held: Held, times: int) -> None:
    """Taken, or with -1 times given back."""
    host_id, memory, vcpus, protected, pages, cells = held
    fleet.use(host_id, times * memory, times * vcpus, times, times * protected, pages.times(times))
    fleet.use_cells(host_id, cells, times)


class Placing:
    """VMs of lost hosts are placed one by one on what is left. Whatever is taken is given back at the end."""

    def __init__(self, world: World, lost: Collection[str]) -> None:
        self.world = world
        self.lost = frozenset(lost)
        self.alive: Bools = ~world.fleet.among(lost)
        self.places: dict[str, str] = {}
        self._taken: list[Held] = []
        self._seated: list[tuple[str, FleetSeat]] = []

    def bound(self, guest: Guest) -> Bound:
        around = self.world.rules.around(guest.vm_id)
        if around is None:
            return FREE
        seats = {vm_id: seat for vm_id in sorted(around.others) if (seat := self._seat(vm_id)) is not None}
        return resolve(around, self.world.rules, seats)

    def _seat(self, vm_id: str) -> Seat | None:
        guest = self.world.guests.get(vm_id)
        if guest is None:
            return None
        at = self.places.get(vm_id, "" if guest.host_id in self.lost else guest.host_id)
        return Seat(guest.need.name, frozenset({at} - {""}), guest.memory, guest.vcpus)

    def fits(self, guest: Guest, asked: Request) -> Bools:
        fleet = self.world.fleet
        mask = self.world.standing(guest, asked) & self.alive
        for rule in FILTERS:
            if rule.name not in STANDING and asked.follows(rule.name):
                mask = mask & rule.mask(fleet, asked)
        return mask

    def place(self, guest: Guest, choose: Choose) -> bool:
        asked = self.world.request(guest, self.bound(guest))
        mask = self.fits(guest, asked)
        if not mask.any():
            return False
        fleet = self.world.fleet
        kept = fleet.rows.get(guest.haven, -1)
        row = kept if kept >= 0 and mask[kept] else choose(fleet, asked, mask)
        self.take(guest, asked, fleet.ids[row])
        return True

    def take(self, guest: Guest, asked: Request, host_id: str) -> None:
        fleet = self.world.fleet
        vcpus, cells = resized.taken(fleet, asked, host_id)
        self._taken.append((host_id, asked.memory, vcpus, int(guest.protected), asked.pages, cells))
        use(fleet, self._taken[-1], 1)
        self._seated.append((host_id, fleet.seat(host_id, vcpus, asked.wish, guest.need.host_devices)))
        self.places[guest.vm_id] = host_id

    def give_back(self) -> None:
        for held in self._taken:
            use(self.world.fleet, held, -1)
        self._taken.clear()
        while self._seated:
            self.world.fleet.unseat(*self._seated.pop())

    def why(self, guest: Guest) -> Homeless:
        """Explained on the hosts as they are now, the lost ones down."""
        fleet, asked = self.world.fleet, self.world.request(guest, self.bound(guest))
        status = fleet.ints("status")
        before = status.copy()
        status[~self.alive] = DOWN
        decision = decide(fleet, asked)
        mended = mend(fleet, asked, decision)
        message = sentence(fleet, asked, decision, explain(fleet, asked, decision, SHOWN), mended)
        status[:] = before
        change = mended[0].sentence if mended else ""
        return Homeless(guest.vm_id, guest.need.name, guest.host_id, message, change)


Choose = Callable[[Fleet, Request, Bools], int]
Order = Callable[[World, Sequence[Guest]], list[Guest]]


def _left(fleet: Fleet, asked: Request) -> Floats:
    """The smaller share of memory or vCPUs that a host would have left."""
    memory_limit = np.maximum(fleet.ints("memory_limit"), 1)
    vcpus_limit = np.maximum(fleet.ints("vcpus_limit"), 1)
    memory = (fleet.ints("memory_limit") - fleet.ints("memory_used") - asked.memory) / memory_limit
    vcpus = (fleet.ints("vcpus_limit") - fleet.ints("vcpus_used") - resized.vcpus(fleet, asked)) / vcpus_limit
    left: Floats = np.minimum(memory, vcpus)
    return left


def tight(fleet: Fleet, asked: Request, mask: Bools) -> int:
    """The host that is filled best, one with room for all that must follow before others."""
    left = np.where(mask, _left(fleet, asked), np.inf)
    memory, vcpus = asked.bound.room
    if memory or vcpus:
        roomy = fleet.ints("memory_used") + asked.memory + memory <= fleet.ints("memory_limit")
        roomy &= fleet.ints("vcpus_used") + resized.vcpus(fleet, asked) + vcpus <= fleet.ints("vcpus_limit")
        left = left + np.where(roomy, 0.0, 10.0)
    return int(np.argmin(left))


def loose(fleet: Fleet, asked: Request, mask: Bools) -> int:
    """The host that has the most left."""
    return int(np.argmax(np.where(mask, _left(fleet, asked), -np.inf)))


def _size(guest: Guest) -> tuple[int, int, str]:
    return -guest.need.memory_bytes, -guest.need.vcpus, guest.vm_id


def by_priority(world: World, guests: Sequence[Guest]) -> list[Guest]:
    """As ha brings them back, the largest first among equals."""
    return sorted(guests, key=lambda g: (-g.need.priority, *_size(g)))


def by_choice(world: World, guests: Sequence[Guest]) -> list[Guest]:
    """Who has the fewest hosts to choose from first, then the largest."""
    hosts = {
        g.vm_id: int(world.standing(g, world.request(g, Placing(world, ()).bound(g))).sum()) for g in guests
    }
    return sorted(guests, key=lambda g: (hosts[g.vm_id], *_size(g)))


def by_vcpus(world: World, guests: Sequence[Guest]) -> list[Guest]:
    return sorted(guests, key=lambda g: (-g.need.vcpus, *_size(g)))


ATTEMPTS: tuple[tuple[Order, Choose], ...] = (
    (by_priority, tight),
    (by_priority, loose),
    (by_choice, tight),
    (by_vcpus, tight),
    (by_choice, loose),
)


def lose(world: World, hosts: Collection[str]) -> Loss:
    """Place every protected VM of these hosts. Of a loss that isn't survived, what is said is what would happen in ha's
    own order."""
    return settle(world, hosts, [g for host_id in hosts for g in world.on(host_id) if g.protected])


def settle(world: World, lost: Collection[str], guests: Sequence[Guest]) -> Loss:
    """Places for these VMs, none of them on hosts that are lost."""
    hosts = tuple(sorted(lost))
    found, failed = _try(world, hosts, by_priority(world, guests), tight)
    if not failed:
        return found
    if all(_alone(world, hosts, guest) for guest in failed):
        free = [replace(guest, refuge="") for guest in guests]  # what was kept may be in the way
        for ordered, choose in _ways(world, free):
            found, failed = _try(world, hosts, ordered, choose)
            if not failed:
                return found
        for _ in range(FRONT_TRIES):
            free = failed + [guest for guest in ordered if guest not in failed]
            found, failed = _try(world, hosts, free, tight)
            if not failed:
                return found
            ordered = free
    return _try(world, hosts, by_priority(world, guests), tight, explains=True)[0]


def _ways(world: World, guests: Sequence[Guest]) -> Iterator[tuple[list[Guest], Choose]]:
    for order, choose in ATTEMPTS:
        yield order(world, guests), choose


def _alone(world: World, lost: tuple[str, ...], guest: Guest) -> bool:
    """Whether it would have a place if it were the only one: otherwise no order helps."""
    return not _try(world, lost, [guest], tight)[1]


def _try(
    world: World, lost: tuple[str, ...], ordered: Sequence[Guest], choose: Choose, *, explains: bool = False
) -> tuple[Loss, list[Guest]]:
    """One way to place them, and those that found no place."""
    placing = Placing(world, lost)
    failed = [guest for guest in ordered if not placing.place(guest, choose)]
    homeless = tuple(
        placing.why(guest) if explains else Homeless(guest.vm_id, guest.need.name, guest.host_id, "", "")
        for guest in failed
    )
    placing.give_back()
    return Loss(lost, placing.places, homeless), failed


# Which losses are tried


def sets(world: World, failures: int, most: int = MOST_SETS) -> tuple[list[tuple[str, ...]], bool]:
    """Sets of hosts to lose, those of one host first, and whether these are all that matter. Where there are more than
    `most` of `failures` hosts: half of them are made of the hosts whose loss costs most (room, and VMs to bring back), the
    others are a host with its VMs and the costliest besides it."""
    fleet = world.fleet
    up = [host_id for row, host_id in enumerate(fleet.ids) if fleet.ints("status")[row] == UP]
    brings = {h: sum(g.whole_memory for g in world.on(h) if g.protected) for h in fleet.ids}
    room = np.maximum(fleet.ints("memory_limit") - fleet.ints("memory_used"), 0)
    cost = {h: brings[h] + (int(room[fleet.rows[h]]) if h in up else 0) for h in fleet.ids}
    alone = sorted((h for h in fleet.ids if brings[h]), key=lambda h: (-cost[h], h))
    found: list[tuple[str, ...]] = [(h,) for h in alone]
    if failures <= 1:
        return found, True
    hosts = sorted({*up, *alone}, key=lambda h: (-cost[h], h))
    count = min(failures, len(hosts))
    if comb(len(hosts), count) <= most:
        return found + [s for s in combinations(hosts, count) if any(brings[h] for h in s)], True
    reach = count
    while comb(reach + 1, count) <= most // 2:
        reach += 1
    worst: list[tuple[str, ...]] = [
        s for s in combinations(hosts[:reach], count) if any(brings[h] for h in s)
    ]
    partners = [(h, *[o for o in hosts if o != h][: count - 1]) for h in alone[: most - len(worst)]]
    return found + list(dict.fromkeys(tuple(sorted(s)) for s in (*worst, *partners))), False


def begin(world: World) -> Loss:
    """Before anything else is lost: the VMs of hosts that are lost already find places, and all VMs of hosts that are being
    emptied move. What is said of the rest is said of the world after that."""
    status = world.fleet.ints("status")
    gone = [h for row, h in enumerate(world.fleet.ids) if world.fleet.status_of(row) in LOST_STATUSES]
    leaving = [h for row, h in enumerate(world.fleet.ids) if int(status[row]) == LEAVING]
    for guest in [g for h in leaving if h in world.stops for g in world.on(h)]:
        world.remove(guest.vm_id)
    back = [g for h in gone for g in world.on(h) if g.protected]
    moved = [g for h in leaving for g in world.on(h)]
    found = settle(world, [*gone, *leaving], [*back, *moved])
    for vm_id, host_id in found.places.items():
        world.move(vm_id, host_id)
    return found


# One more VM


def touched(world: World, guest: Guest) -> list[str]:
    """Hosts whose loss may no longer be survived once this VM is where the world has it now."""
    fleet, row = world.fleet, world.fleet.rows[guest.host_id]
    up = fleet.ints("status") == UP
    around = world.rules.around(guest.vm_id)
    others = around.others if around is not None else frozenset[str]()
    memory: dict[str, int] = {}
    vcpus: dict[str, int] = {}
    pages: dict[str, list[Pages]] = {}
    found = {guest.host_id} if guest.protected else set[str]()
    for each in world.guests.values():
        if not each.protected or each.vm_id == guest.vm_id:
            continue
        haven = fleet.rows.get(each.haven)
        if haven is None or not up[haven] or each.vm_id in others:
            found.add(each.host_id)
        elif haven == row:
            asked = world.request(each)
            memory[each.host_id] = memory.get(each.host_id, 0) + asked.memory
            pages.setdefault(each.host_id, []).append(asked.pages)
            wanted, cells = resized.taken(fleet, asked, fleet.ids[row])
            if shared(cells, guest.cells):
                found.add(each.host_id)
            vcpus[each.host_id] = vcpus.get(each.host_id, 0) + wanted
    spare_memory = int(fleet.ints("memory_limit")[row] - fleet.ints("memory_used")[row])
    spare_vcpus = int(fleet.ints("vcpus_limit")[row] - fleet.ints("vcpus_used")[row])
    found |= {h for h in memory if memory[h] > spare_memory or vcpus[h] > spare_vcpus}
    return sorted(found | {h for h in memory if too_many(total(pages[h]), fleet.pages_left(row))})


@dataclass(frozen=True, slots=True)
class Admission:
    broken: tuple[Loss, ...]
    """Losses that leave VMs without a place which had one before; only these VMs are in them."""
    refuges: Mapping[str, str]
    """VM → where it goes when its host is lost, where that was found anew."""


def admit(world: World, guest: Guest, failures: int, most: int = MOST_AT_START) -> Admission:
    """What if this VM ran there? The world has it not, or at its place before, and has it so again afterwards."""
    before = world.guests.get(guest.vm_id)
    _swap(world, before, guest)
    wanted: list[tuple[str, ...]] = [(host_id,) for host_id in touched(world, guest)]
    if failures > 1:
        wanted += [s for s in sets(world, failures, most)[0] if len(s) > 1]
    broken: list[Loss] = []
    refuges: dict[str, str] = {}
    for hosts in wanted:
        after = lose(world, hosts)
        if len(hosts) == 1:
            refuges |= after.places
        if after.homeless and (new := _without_before(world, guest, before, after)):
            broken.append(replace(after, homeless=new))
    _swap(world, guest, before)
    return Admission(tuple(broken), refuges)


def _swap(world: World, old: Guest | None, new: Guest | None) -> None:
    if old is not None:
        world.remove(old.vm_id)
    if new is not None:
        world.put(new)
    world.changed()


def _without_before(world: World, guest: Guest, before: Guest | None, after: Loss) -> tuple[Homeless, ...]:
    """Those that had a place before this VM ran there."""
    _swap(world, guest, before)
    had_none = {each.vm_id for each in lose(world, after.hosts).homeless}
    _swap(world, before, guest)
    return tuple(each for each in after.homeless if each.vm_id not in had_none)
