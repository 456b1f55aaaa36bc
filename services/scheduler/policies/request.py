"""What the rules are asked: one placement with everything resolved that doesn't depend on the host."""

from __future__ import annotations

from dataclasses import dataclass

from services.scheduler.config import SchedulerConfig
from services.scheduler.model import MIB, ClusterPolicy, memory_taken
from services.scheduler.policies.bound import FREE, Bound
from volery.contracts.scheduling import Need, Place, Purpose

HOSTS_OWN_MODELS = frozenset({"", "host-passthrough", "host-model", "maximum", "host", "max"})
"""CPU models that every host can give."""


@dataclass(frozen=True, slots=True)
class Request:
    place: Place
    policy: ClusterPolicy
    memory: int
    """Bytes with overhead: what will be claimed."""
    overhead: int
    reserve: int
    cpu_model: str
    machine: str
    high_utilization: float
    vcpu_load: float
    bound: Bound = FREE
    """By affinity groups."""
    overload_seconds: float = 0.0
    swap_percent: float = 0.0
    now: float = 0.0
    """By the clock that dates the fleet's samples."""

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
    place: Place, policy: ClusterPolicy, config: SchedulerConfig, bound: Bound = FREE, *, now: float = 0.0
) -> Request:
    model = place.need.cpu_model or policy.cpu_model
    return Request(
        place=place,
        policy=policy,
        memory=memory_taken(place.need.memory_bytes, config),
        overhead=config.guest_overhead_mib * MIB,
        reserve=config.host_reserve_mib * MIB,
        cpu_model="" if model in HOSTS_OWN_MODELS else model,
        machine=place.need.machine or policy.machine,
        high_utilization=config.high_utilization_percent / 100,
        vcpu_load=config.vcpu_load_percent / 100,
        bound=bound,
        overload_seconds=config.overload_seconds,
        swap_percent=config.swap_percent,
        now=now,
    )


def size(count: int) -> str:
    """Bytes for people: MiB below one GiB, else GiB."""
    if abs(count) < 1024**3:
        return f"{count / MIB:.0f} MiB"
    return f"{count / 1024**3:.1f} GiB"
