"""The fleet in columns: every host's capacity, use and abilities as NumPy arrays, one row per host.

In memory only: rebuilt from the service's own tables at start and kept in step with them. Capacity in here
decides what is tried; what is granted is decided by the database.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import repeat

import numpy as np
from numpy.typing import NDArray

from services.scheduler.cells import CELL_CPUS, CELLS, CELLS_USED, CellFigures, CellNeed, Taken
from services.scheduler.figures import HostFigures, Measured, NetworkReach
from services.scheduler.fleet_cpus import CpuStates
from services.scheduler.fleet_devices import Asks, DevicesHeld, FleetDevices
from services.scheduler.model import ClusterPolicy
from services.scheduler.pages import NO_PAGES, PAGES, PAGES_USED, Pages
from services.scheduler.policies.cpus import FREE, Held, HostCpus, Wish, choose
from services.scheduler.policies.recipe import Recipe, by_balance
from volery.contracts.domain import MOST_CELLS
from volery.contracts.host import HostStatus

Bools = NDArray[np.bool_]
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Seat = tuple[Held, int, DevicesHeld]

STATUSES: tuple[str, ...] = tuple(HostStatus)
UP = STATUSES.index(HostStatus.UP)


_COLUMNS: dict[str, type] = {
    "cluster": np.int64,
    "status": np.int64,
    "cpus": np.int64,
    "memory_bytes": np.int64,
    "memory_limit": np.int64,
    "memory_used": np.int64,
    "vcpus_limit": np.int64,
    "vcpus_used": np.int64,
    "cpu_percent": np.float64,
    "fresh_vcpus": np.int64,
    "guests": np.int64,
    "ha_guests": np.int64,
    "busy_since": np.float64,
    "swapped": np.int64,
    "models": np.int64,
    "machines": np.int64,
    **dict.fromkeys((*PAGES, *PAGES_USED), np.int64),
    "cpu_state": np.int64,
    "threads": np.int64,
    "vcpus_promised": np.int64,
    "cpus_exclusive": np.int64,
    "vcpus_exclusive": np.int64,
    "largest_shared": np.int64,
}
_USED = ("memory_used", "vcpus_used", "guests", "ha_guests", *PAGES_USED)
"""What claims take, in the order in which it is told."""
_KEPT = frozenset({"cluster", "cpus", "models", "machines"})
"""Columns that change so seldom that masks over them are kept until they do. Only `put` writes them."""
MASKS_KEPT = 1000
"""A byte per host and mask."""
_CELL_COLUMNS = (CELL_CPUS, *CELLS, *CELLS_USED)
"""Wide ones: a figure for each NUMA cell."""
IDLE = 0.0
"""`busy_since` of a host that isn't busy."""


def _empty() -> dict[str, NDArray[np.int64] | NDArray[np.float64]]:
    columns: dict[str, NDArray[np.int64] | NDArray[np.float64]] = {
        name: np.zeros(16, dtype) for name, dtype in _COLUMNS.items()
    }
    return columns | {name: np.zeros((16, MOST_CELLS), np.int64) for name in _CELL_COLUMNS}


@dataclass(slots=True)
class Fleet:
    """Columns by name (`column("memory_used")`), rows by host id."""

    ids: list[str] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    rows: dict[str, int] = field(default_factory=dict)
    clusters: dict[str, ClusterPolicy] = field(default_factory=dict)
    recipes: dict[str, Recipe] = field(default_factory=dict)
    """Scheduling policies by id."""
    networks: dict[str, NetworkReach] = field(default_factory=dict)
    devices: FleetDevices = field(default_factory=FleetDevices)
    _columns: dict[str, NDArray[np.int64] | NDArray[np.float64]] = field(default_factory=_empty)
    _booked: dict[str, Ints] = field(default_factory=dict)
    """Host → what was given away of it here and isn't committed yet: what is read meanwhile doesn't contain it."""
    guessed: set[str] = field(default_factory=set)
    """Hosts whose use was counted here, and not read, since this was emptied."""
    _cluster_numbers: dict[str, int] = field(default_factory=dict)
    _sets: dict[frozenset[str], int] = field(default_factory=dict)
    """What hosts can do, numbered: a fleet has few kinds of hosts."""
    _lists: list[frozenset[str]] = field(default_factory=list)
    """The same by number."""
    _held: dict[str, Held] = field(default_factory=dict)
    """Host → physical CPUs that claims hold."""
    _cores: dict[str, str] = field(default_factory=dict)
    cpu_states: CpuStates = field(default_factory=CpuStates)
    _masks: dict[tuple[str, str], Bools] = field(default_factory=dict)
    _ranks: Ints | None = None
    _everyone: Bools | None = None
    _nothing: Floats | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def ints(self, name: str) -> Ints:
        column = self._columns[name][: len(self.ids)]
        if name in _KEPT:
            column.flags.writeable = False
        return column  # type: ignore[return-value]

    def floats(self, name: str) -> Floats:
        return self._columns[name][: len(self.ids)]  # type: ignore[return-value]

    def put(self, host: HostFigures) -> None:
        """Add a host or take over its figures; its newest CPU sample is kept."""
        row = self.rows.get(host.id)
        if row is None:
            row = self._append(host)
        self.names[row] = host.name
        figures = {
            "cluster": self._cluster_number(host.cluster_id),
            "status": STATUSES.index(host.status) if host.status in STATUSES else -1,
            "cpus": host.cpus,
            "memory_bytes": host.memory_bytes,
            "memory_limit": host.memory_limit_bytes,
            "memory_used": host.memory_used_bytes,
            "vcpus_promised": host.vcpus_limit,
            "largest_shared": host.largest_shared,
            "vcpus_used": host.vcpus_used,
            "guests": host.guests,
            "ha_guests": host.ha_guests,
            "models": self._set_number(host.cpu_models),
            "machines": self._set_number(host.machines),
        } | {name: getattr(host, name) for name in (*PAGES, *PAGES_USED)}
        for name, value in figures.items():
            if name in _KEPT and self._columns[name][row] != value:
                self._forget_masks(name)
            self._columns[name][row] = value
        self._add_booked(host.id)
        self._cores[host.id] = host.cores
        self.hold(host.id, self.held(host.id))

    def held(self, host_id: str) -> Held:
        return self._held.get(host_id, FREE)

    def hold(self, host_id: str, held: Held) -> None:
        """Which physical CPUs claims hold there. What is shared may be promised as often as the over-commit says."""
        row = self.rows.get(host_id)
        if row is None:
            return
        self._held[host_id] = held
        cpus, promised = int(self._columns["cpus"][row]), int(self._columns["vcpus_promised"][row])
        alone = len(held.exclusive)
        limit = promised * max(cpus - alone, 0) // cpus + held.vcpus if alone and cpus else promised
        number = self.cpu_states.number(self._cores.get(host_id, ""), held)
        figures = {
            "cpu_state": number,
            "threads": self.cpu_states.states[number].threads,
            "cpus_exclusive": alone,
            "vcpus_exclusive": held.vcpus,
            "vcpus_limit": limit,
        }
        for name, value in figures.items():
            self._columns[name][row] = value

    def cpus_of(self, row: int) -> HostCpus:
        return self.cpu_states.states[int(self.ints("cpu_state")[row])]

    def of_cpus(self, key: tuple[str, int], count: Callable[[HostCpus], int]) -> Ints:
        """A figure of each host's CPUs, kept under this key."""
        by_host: Ints = self.cpu_states.figures(key, count)[self.ints("cpu_state")]
        return by_host

    def forget_cpu_states(self) -> None:
        """Those that no host has any more."""
        self.cpu_states.clear()
        for host_id in self.ids:
            self.hold(host_id, self.held(host_id))

    def _append(self, host: HostFigures) -> int:
        row = len(self.ids)
        if row == len(self._columns["status"]):
            self._columns = {n: np.concatenate([c, np.zeros_like(c)]) for n, c in self._columns.items()}
        for column in self._columns.values():
            column[row] = 0
        self.ids.append(host.id)
        self.names.append(host.name)
        self.rows[host.id] = row
        self._forget_order()
        return row

    def remove(self, host_id: str) -> None:
        """Forget a host; the last row takes its place."""
        row = self.rows.pop(host_id, None)
        if row is None:
            return
        self._held.pop(host_id, None)
        self._cores.pop(host_id, None)
        self.devices.drop(host_id)
        last = len(self.ids) - 1
        for column in self._columns.values():
            column[row] = column[last]
        for texts in (self.ids, self.names):
            texts[row] = texts[last]
            texts.pop()
        if row != last:
            self.rows[self.ids[row]] = row
        self._forget_order()

    def _forget_order(self) -> None:
        self._masks.clear()
        self._ranks = self._everyone = self._nothing = None

    def keep_only(self, host_ids: Iterable[str]) -> None:
        kept = set(host_ids)
        for gone in [host_id for host_id in self.ids if host_id not in kept]:
            self.remove(gone)

    def book(self, host_id: str, *amounts: int) -> None:
        """Given away (or, negative, back) by what is about to be committed: as `use`, until `booked` is told."""
        self._note(host_id, np.array(amounts))
        self._add(host_id, amounts)

    def booked(self, host_id: str, *amounts: int, committed: bool) -> None:
        """What was booked is in the database now, or will never be."""
        given = np.array(amounts)
        self._note(host_id, -given)
        if not committed:
            self._add(host_id, (-given).tolist())

    def _note(self, host_id: str, amounts: Ints) -> None:
        left = self._booked.pop(host_id, 0) + amounts
        if left.any():
            self._booked[host_id] = left

    def _add_booked(self, host_id: str) -> None:
        row, amounts = self.rows.get(host_id), self._booked.get(host_id)
        if row is not None and amounts is not None:
            self._count(row, amounts.tolist())

    def _count(self, row: int, amounts: Sequence[int]) -> None:
        """In the order of `_USED`."""
        self.guessed.add(self.ids[row])
        for name, amount in zip(_USED, amounts, strict=True):
            self._columns[name][row] += amount

    def _add(self, host_id: str, amounts: Sequence[int]) -> None:
        row = self.rows.get(host_id)
        if row is None:
            return
        self._count(row, amounts)
        fresh = self._columns["fresh_vcpus"]
        fresh[row] = max(fresh[row] + amounts[1], 0)

    def share(self, host_id: str, vcpus: int) -> None:
        """A VM more that has no CPUs of its own."""
        row = self.rows.get(host_id)
        if row is not None:
            largest = self._columns["largest_shared"]
            largest[row] = max(largest[row], vcpus)

    def seat(self, host_id: str, vcpus: int, wish: Wish | None, asks: Asks = ()) -> Seat:
        """A VM takes its place among the host's CPUs and devices, to see what is left. Returns what `unseat` needs."""
        row, held = self.rows[host_id], self.held(host_id)
        before = held, int(self._columns["largest_shared"][row]), self.devices.seat(host_id, asks)
        if wish is None:
            self.share(host_id, vcpus)
        elif (given := choose(self.cpus_of(row), wish)) is not None:
            self.hold(host_id, held.with_more(given, vcpus))
        return before

    def unseat(self, host_id: str, before: Seat) -> None:
        """Who was seated last goes first."""
        held, largest, devices = before
        self.devices.hold(host_id, devices)
        if held is not self.held(host_id):
            self.hold(host_id, held)
        self._columns["largest_shared"][self.rows[host_id]] = largest

    def use(
        self,
        host_id: str,
        memory_bytes: int,
        vcpus: int,
        guests: int = 0,
        ha_guests: int = 0,
        pages: Pages = NO_PAGES,
    ) -> None:
        """Capacity taken (or, negative, given back) since the row was read."""
        self._add(host_id, (memory_bytes, vcpus, guests, ha_guests, *pages))

    def used(self, held: Sequence[tuple[str, *tuple[int, ...]]]) -> None:
        """What the database says is used: host, bytes, vCPUs, guests, highly available guests, huge pages of each size, vCPUs of
        the largest VM that shares CPUs."""
        if not held:
            return
        ids, *columns = zip(*held, strict=True)
        rows = np.fromiter(map(self.rows.get, ids, repeat(-1)), np.int64, len(ids))
        known = rows >= 0
        for name, column in zip((*_USED, "largest_shared"), columns, strict=True):
            self._columns[name][rows[known]] = np.array(column)[known]
        for host_id in self._booked.keys() & set(ids):
            self._add_booked(host_id)

    def sample(self, host_id: str, measured: Measured) -> None:
        """A measured load contains the VMs that were started before it."""
        row = self.rows.get(host_id)
        if row is None:
            return
        since = self._columns["busy_since"][row]
        self._columns["busy_since"][row] = (since or measured.at) if measured.busy else IDLE
        self._columns["cpu_percent"][row] = measured.cpu_percent
        self._columns["swapped"][row] = measured.swapped_bytes
        self._columns["fresh_vcpus"][row] = 0

    def set_network(self, network: NetworkReach) -> None:
        self.networks[network.id] = network
        self._masks.pop(("network", network.id), None)

    def drop_network(self, network_id: str) -> None:
        self.networks.pop(network_id, None)
        self._masks.pop(("network", network_id), None)

    def put_cells(self, host_id: str, cells: Iterable[CellFigures]) -> None:
        """All that a host has."""
        row = self.rows[host_id]
        for name in _CELL_COLUMNS:
            self._columns[name][row] = 0
        for each in cells:
            self._columns[CELL_CPUS][row, each.cell] = each.cpus
            for names, figures in ((CELLS, each.limit), (CELLS_USED, each.used)):
                for name, figure in zip(names, figures, strict=True):
                    self._columns[name][row, each.cell] = figure

    def use_cells(self, host_id: str, needs: Iterable[CellNeed], times: int = 1) -> None:
        """Taken, or with -1 times given back, since the row was read."""
        row = self.rows.get(host_id)
        for need in needs if row is not None else ():
            for name, figure in zip(CELLS_USED, need.taken, strict=True):
                self._columns[name][row, need.cell] += times * figure

    def used_cells(self, uses: Iterable[tuple[str, int, Taken]]) -> None:
        """What the database says is used of cells; of all others nothing is."""
        for name in CELLS_USED:
            self._columns[name][:] = 0
        for host_id, cell, used in uses:
            if (row := self.rows.get(host_id)) is not None:
                for name, figure in zip(CELLS_USED, used, strict=True):
                    self._columns[name][row, cell] = figure

    def pages_left(self, row: int) -> Pages:
        """Huge pages of a host that no claim holds; negative where it has fewer than they hold."""
        pairs = zip(PAGES, PAGES_USED, strict=True)
        return Pages(*(int(self._columns[name][row] - self._columns[used][row]) for name, used in pairs))

    def status_of(self, row: int) -> str:
        code = int(self.ints("status")[row])
        return STATUSES[code] if code >= 0 else "unknown"

    def ranks(self) -> Ints:
        """Each host's place in the order of ids: what decides between equals, the same in every replica."""
        if self._ranks is None:
            self._ranks = np.empty(len(self.ids), np.int64)
            self._ranks[sorted(range(len(self.ids)), key=self.ids.__getitem__)] = np.arange(len(self.ids))
        return self._ranks

    @property
    def everyone(self) -> Bools:
        """The mask of a rule that excludes no host. Nobody writes to it, and it is known by its identity."""
        if self._everyone is None:
            self._everyone = np.ones(len(self.ids), np.bool_)
            self._everyone.flags.writeable = False
        return self._everyone

    @property
    def nothing(self) -> Floats:
        """The score of a rule that says nothing; the same."""
        if self._nothing is None:
            self._nothing = np.zeros(len(self.ids))
            self._nothing.flags.writeable = False
        return self._nothing

    def in_cluster(self, cluster_id: str) -> Bools:
        number = self._cluster_numbers.get(cluster_id, -1)
        return self._kept(("cluster", cluster_id), lambda: self.ints("cluster") == number)

    def with_threads(self, count: int) -> Bools:
        """As many CPU threads or more."""
        return self._kept(("cpus", str(count)), lambda: self.ints("cpus") >= count)

    def part(self, cluster_id: str) -> Fleet:
        """A copy of one cluster's hosts, to try things on."""
        rows = np.flatnonzero(self.in_cluster(cluster_id)).tolist()
        ids = [self.ids[row] for row in rows]
        return Fleet(
            ids=ids,
            names=[self.names[row] for row in rows],
            rows={host_id: row for row, host_id in enumerate(ids)},
            clusters=dict(self.clusters),
            recipes=dict(self.recipes),
            networks=dict(self.networks),
            devices=self.devices.part(ids),
            _columns={name: column[rows] for name, column in self._columns.items()},
            _cluster_numbers=dict(self._cluster_numbers),
            _sets=dict(self._sets),
            _lists=list(self._lists),
            _held={host_id: self._held[host_id] for host_id in ids if host_id in self._held},
            _cores={host_id: self._cores[host_id] for host_id in ids if host_id in self._cores},
            cpu_states=self.cpu_states.copy(),
        )

    def among(self, host_ids: Iterable[str]) -> Bools:
        """Whether each host is one of these."""
        unknown = len(self.ids)  # one cell more, for those that aren't hosts of this fleet
        mask = np.zeros(unknown + 1, np.bool_)
        mask[np.fromiter(map(self.rows.get, host_ids, repeat(unknown)), np.int64)] = True
        return mask[:unknown]

    def with_network(self, network_id: str) -> Bools:
        reach = self.networks.get(network_id)
        hosts = reach.host_ids if reach is not None else ()
        return self._kept(("network", network_id), lambda: self.among(hosts))

    def with_model(self, model: str) -> Bools:
        return self._having("models", model)

    def with_machine(self, machine: str) -> Bools:
        return self._having("machines", machine)

    def models_of(self, row: int) -> frozenset[str]:
        return self._lists[int(self.ints("models")[row])]

    def machines_of(self, row: int) -> frozenset[str]:
        return self._lists[int(self.ints("machines")[row])]

    def _having(self, column: str, name: str) -> Bools:
        def make() -> Bools:
            # A host that reports no list is not excluded by it: libvirt has the last word there.
            having = np.fromiter((not s or name in s for s in self._lists), np.bool_, len(self._lists))
            mask: Bools = having[self.ints(column)]
            return mask

        return self._kept((column, name), make)

    def _set_number(self, names: frozenset[str]) -> int:
        number = self._sets.setdefault(names, len(self._lists))
        if number == len(self._lists):
            self._lists.append(names)
        return number

    def _kept(self, key: tuple[str, str], make: Callable[[], Bools]) -> Bools:
        """Nobody writes to it."""
        mask = self._masks.get(key)
        if mask is None:
            if len(self._masks) >= MASKS_KEPT:
                self._masks.clear()
            mask = self._masks[key] = make()
            mask.flags.writeable = False
        return mask

    def _forget_masks(self, column: str) -> None:
        self._masks = {key: mask for key, mask in self._masks.items() if key[0] != column}

    def recipe(self, cluster: ClusterPolicy) -> Recipe:
        """The policy that a cluster was given, or the built-in one of its balance."""
        built_in = by_balance(cluster.balance)
        return self.recipes.get(cluster.policy_id) or self.recipes.get(built_in.id, built_in)

    def recipe_of(self, host_id: str) -> Recipe:
        """The policy of a host's cluster."""
        number = int(self.ints("cluster")[self.rows[host_id]]) if host_id in self.rows else -1
        cluster_id = next((each for each, n in self._cluster_numbers.items() if n == number), "")
        return self.recipe(self.clusters.get(cluster_id) or ClusterPolicy(cluster_id))

    def _cluster_number(self, cluster_id: str) -> int:
        return self._cluster_numbers.setdefault(cluster_id, len(self._cluster_numbers))
