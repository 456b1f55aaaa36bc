"""What the rules are asked: one placement with everything resolved that doesn't depend on the host."""

from __future__ import annotations

from dataclasses import dataclass

from services.scheduler.cells import CellNeed, needs_of
from services.scheduler.config import SchedulerConfig
from services.scheduler.model import MIB, ClusterPolicy, memory_taken
from services.scheduler.pages import NO_PAGES, Pages, pages_taken
from services.scheduler.policies import units
from services.scheduler.policies.bound import FREE, Bound
from services.scheduler.policies.cpus import Wish
from services.scheduler.policies.recipe import Recipe, by_balance
from volery.contracts.scheduling import Need, Place, Purpose

HOSTS_OWN_MODELS = frozenset({"", "host-passthrough", "host-model", "maximum", "host", "max"})
"""CPU models that every host can give."""


@dataclass(frozen=True, slots=True)
class Request:
    place: Place
    policy: ClusterPolicy
    memory: int
    """Bytes with overhead and without huge pages: what will be claimed."""
    overhead: int
    reserve: int
    cpu_model: str
    machine: str
    high_utilization: float
    vcpu_load: float
    recipe: Recipe
    """The scheduling policy that it is decided by."""
    bound: Bound = FREE
    """By affinity groups."""
    pages: Pages = NO_PAGES
    cells: tuple[CellNeed, ...] = ()
    """Of every host; what one that is resized asks of each says `resized.cells_at`."""
    overload_seconds: float = 0.0
    swap_percent: float = 0.0
    vcpu_ratio: float = 0.0
    """vCPUs per thread from which a host is the worst choice; 0: none is."""
    scale_down: float = 1.0
    """By what the weight of highly available VMs is divided."""
    now: float = 0.0
    """By the clock that dates the fleet's samples."""
    wish: Wish | None = None
    """Which physical CPUs it wants; None: those that are shared."""

    def follows(self, unit: str) -> bool:
        """Whether a filter is one of its policy's."""
        return unit in self.recipe.filters

    @property
    def need(self) -> Need:
        return self.place.need

    @property
    def vm(self) -> str:
        return f"VM {self.need.name or self.need.vm_id}"

    @property
    def cluster(self) -> str:
        return f"cluster {self.policy.name or self.need.cluster_id}"

    @property
    def excluded_because(self) -> str:
        if self.place.purpose is Purpose.MIGRATE:
            return "it is the source of this migration or was tried before"
        return "it was tried before"


def request(
    place: Place,
    policy: ClusterPolicy,
    config: SchedulerConfig,
    bound: Bound = FREE,
    *,
    recipe: Recipe | None = None,
    now: float = 0.0,
) -> Request:
    """Without a recipe by the built-in policy of the cluster's balance. What a policy doesn't say is a setting."""
    recipe = recipe or by_balance(policy.balance)
    figures = recipe.parameters
    need, model = place.need, place.need.cpu_model or policy.cpu_model
    wish = Wish.of(need.cpu_pinning, need.vcpus, need.threads)
    return Request(
        place=place,
        policy=policy,
        memory=memory_taken(need.memory_bytes, config, need.hugepage_kib),
        overhead=config.guest_overhead_mib * MIB,
        reserve=config.host_reserve_mib * MIB,
        cpu_model="" if model in HOSTS_OWN_MODELS else model,
        machine=need.machine or policy.machine,
        high_utilization=figures.get(units.HIGH_UTILIZATION, config.high_utilization_percent) / 100,
        vcpu_load=config.vcpu_load_percent / 100,
        recipe=recipe,
        bound=bound,
        pages=pages_taken(need.memory_bytes, need.hugepage_kib),
        cells=needs_of(need.numa_nodes, need.hugepage_kib),
        overload_seconds=figures.get(units.OVERLOAD_MINUTES, config.overload_seconds / 60) * 60,
        swap_percent=figures.get(units.SWAP_USAGE, config.swap_percent),
        vcpu_ratio=figures.get(units.VCPU_RATIO, 0.0),
        scale_down=figures.get(units.SCALE_DOWN, 1.0),
        now=now,
        wish=wish,
    )


def size(count: int) -> str:
    """Bytes for people: MiB below one GiB, else GiB."""
    if abs(count) < 1024**3:
        return f"{count / MIB:.0f} MiB"
    return f"{count / 1024**3:.1f} GiB"
