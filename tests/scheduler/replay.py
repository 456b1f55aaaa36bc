"""Plans played back step by step, slow and obvious: in plain Python, by the rules as one would say them (those of
`oracle.py`), without the board that plans are made on."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from services.scheduler.policies.affinity import Group
from services.scheduler.policies.board import Guest, Place
from services.scheduler.policies.bound import Seat
from tests.scheduler.oracle import allowed, closure


@dataclass
class Replay:
    places: Sequence[Place]
    guests: Sequence[Guest]
    suits: Mapping[str, Collection[str]]
    """VM → the hosts that suit it, whatever else is there; affinity groups not included."""
    groups: tuple[Group, ...] = ()
    at: dict[str, str] = field(init=False)
    """VM → host."""

    def __post_init__(self) -> None:
        self.at = {guest.id: guest.host_id for guest in self.guests}

    def foreign(self, place: Place, what: str) -> float:
        """What is taken of a host by VMs that aren't in this plan's sight."""
        taken: float = {"memory": place.memory_used, "vcpus": place.vcpus_used, "load": place.load}[what]
        return taken - sum(getattr(g, what) for g in self.guests if g.host_id == place.id)

    def taken(self, place: Place, what: str, also: Collection[str] = ()) -> float:
        """With the VMs that are there, and those (`also`) that still or already hold capacity."""
        here = [g for g in self.guests if self.at[g.id] == place.id or g.id in also]
        return self.foreign(place, what) + sum(getattr(g, what) for g in here)

    def play(self, wave: Sequence[tuple[str, str]], per_host: int, planned: Mapping[str, str]) -> list[str]:
        """What is wrong with moving these VMs to these hosts at the same time. `planned`: VM → where the plan takes it in
        the end; VMs that must be together may be apart while they go to one host."""
        wrong = []
        moving = dict(wave)
        if len(moving) < len(wave):
            wrong.append(f"a VM moves twice at once: {wave}")
        for place in self.places:
            arriving = {vm for vm, host in wave if host == place.id}
            part = [vm for vm, host in wave if host == place.id or self.at[vm] == place.id]
            if len(part) > per_host:
                wrong.append(f"{place.id} takes part in {len(part)} migrations")
            if arriving and not place.open:
                wrong.append(f"{place.id} is closed and gets {arriving}")
            for what, limit in (("memory", place.memory_limit), ("vcpus", place.vcpus_limit)):
                if arriving and self.taken(place, what, arriving) > limit:
                    wrong.append(f"{place.id} has too little {what} for {arriving}")
            wrong += self._short_of_pages(place, arriving)
        for vm, host in wave:
            wrong += self._placed(vm, host, moving, planned)
        self.at |= moving
        return wrong

    def pages(self, place: Place, size: int, also: Collection[str] = ()) -> int:
        """Huge pages of a size that a host has left."""
        at_first = sum(g.pages[size] for g in self.guests if g.host_id == place.id)
        here = [g for g in self.guests if self.at[g.id] == place.id or g.id in also]
        return place.pages_left[size] + at_first - sum(g.pages[size] for g in here)

    def _short_of_pages(self, place: Place, arriving: Collection[str]) -> list[str]:
        wanted = [g.pages for g in self.guests if g.id in arriving]
        return [
            f"{place.id} has too few huge pages for {arriving}"
            for size in range(len(place.pages_left))
            if any(pages[size] for pages in wanted) and self.pages(place, size, arriving) < 0
        ]

    def _placed(self, vm: str, host: str, moving: Mapping[str, str], planned: Mapping[str, str]) -> list[str]:
        guest = next(g for g in self.guests if g.id == vm)
        wrong = []
        if guest.kept:
            wrong.append(f"{vm} may not be moved")
        if self.at[vm] == host:
            wrong.append(f"{vm} is on {host} already")
        if host not in self.suits[vm]:
            wrong.append(f"{host} doesn't suit {vm}")
        with_ = closure(self.groups, sorted({*self.at, *(v for g in self.groups for v in g.vms)}))
        seats = {}
        for other in self.at:
            if other == vm:
                continue
            hosts = {self.at[other]} | ({moving[other]} if other in moving else set())
            if with_[vm, other] and planned.get(other, self.at[other]) == host:
                hosts = {host}  # it comes too, or is there
            seats[other] = Seat(other, frozenset(hosts))
        suits_vms, suits_hosts = allowed(self.groups, seats, vm, host)
        if not suits_vms:
            wrong.append(f"other VMs keep {vm} off {host}")
        if not suits_hosts:
            wrong.append(f"host rules keep {vm} off {host}")
        return wrong

    def cost(self, weights: Mapping[str, float]) -> float:
        """The squared deviations from the fair share, as one would say it."""
        open_ = [place for place in self.places if place.open]
        mean = max(len(self.guests) / max(len(open_), 1), 1.0)
        total = 0.0
        for what, weight in weights.items():
            used = {p.id: self._of(p, what) for p in open_}
            limit = {
                p.id: {"load": max(p.cpus, 1), "memory": max(p.memory_limit, 1), "guests": mean}[what]
                for p in open_
            }
            fair = sum(used.values()) / max(sum(limit.values()), 1e-9)
            total += weight * sum((used[p.id] / limit[p.id] - fair) ** 2 for p in open_)
        return total

    def _of(self, place: Place, what: str) -> float:
        if what == "guests":
            return sum(1.0 for g in self.guests if self.at[g.id] == place.id)
        return self.taken(place, what)

    def survives(self, dead: Place) -> bool:
        """Whether the highly available VMs of a host find room elsewhere together, by trying everything."""
        vms = [g for g in self.guests if self.at[g.id] == dead.id and g.high_availability]
        left = {
            p.id: (
                p.memory_limit - self.taken(p, "memory"),
                p.vcpus_limit - self.taken(p, "vcpus"),
                *(self.pages(p, size) for size in range(len(p.pages_left))),
            )
            for p in self.places
            if p.open and p.id != dead.id
        }
        return self._fit(sorted(vms, key=lambda g: -g.memory), left)

    def _fit(self, vms: Sequence[Guest], left: Mapping[str, tuple[float, ...]]) -> bool:
        if not vms:
            return True
        first, rest = vms[0], vms[1:]
        for host, (memory, vcpus, *pages) in left.items():
            fits = host in self.suits[first.id] and memory >= first.memory and vcpus >= first.vcpus
            bound = allowed(self.groups, {}, first.id, host)[1]
            fits = fits and all(w == 0 or w <= n for w, n in zip(first.pages, pages, strict=True))
            if fits and bound:
                rest_of = (n - w for w, n in zip(first.pages, pages, strict=True))
                after = {**left, host: (memory - first.memory, vcpus - first.vcpus, *rest_of)}
                if self._fit(rest, after):
                    return True
        return False
