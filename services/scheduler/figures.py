"""What is read of hosts and networks to be put into the fleet."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class HostFigures:
    """One host as the tables have it. Memory in bytes; limits and use are of what may be promised."""

    id: str
    name: str
    cluster_id: str
    status: str
    cpus: int
    memory_bytes: int
    memory_limit_bytes: int
    memory_used_bytes: int
    vcpus_limit: int
    vcpus_used: int
    guests: int = 0
    """VMs that hold capacity there."""
    ha_guests: int = 0
    """Highly available ones among them."""
    cpu_models: frozenset[str] = frozenset()
    machines: frozenset[str] = frozenset()
    pages_2m: int = 0
    pages_2m_used: int = 0
    pages_1g: int = 0
    pages_1g_used: int = 0
    """Huge pages, and how many claims hold."""
    cores: str = ""
    """As JSON; "" for a host that hasn't said."""
    largest_shared: int = 0
    """vCPUs of the largest VM there that has no CPUs of its own; more than that for a moment after it has left."""


@dataclass(frozen=True, slots=True)
class Measured:
    """A sample of a host, as far as placing goes."""

    cpu_percent: float
    busy: bool = False
    """The load is high."""
    at: float = 0.0
    """When, in seconds of this process's monotonic clock."""
    swapped_bytes: int = 0
    """What is swapped out beyond the memory that is available."""


@dataclass(frozen=True, slots=True)
class NetworkReach:
    """On which hosts a network is ready."""

    id: str
    name: str
    host_ids: frozenset[str]
