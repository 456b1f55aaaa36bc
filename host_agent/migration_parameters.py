"""How a live migration is asked of libvirt, and how far it says it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

LIVE = 1
PEER2PEER = 2
UNSAFE = 512
ABORT_ON_ERROR = 4096
AUTO_CONVERGE = 8192
POSTCOPY = 32768
PARALLEL = 131072
"""virDomainMigrateFlags; their numbers never change."""


@dataclass(frozen=True, slots=True)
class MigrationParameters:
    """One peer-to-peer live migration; nothing is persisted on either side."""

    destination_uri: str
    """The destination's libvirtd, as the source's libvirtd reaches it."""
    destination_address: str
    """Where QEMU's stream goes; "" lets the destination's libvirtd choose."""
    destination_xml: str
    bandwidth_mib_per_second: int = 0
    auto_converge: bool = True
    post_copy: bool = False
    parallel_connections: int = 0
    unsafe: bool = False
    """libvirt would refuse disks with a page cache on a file system it doesn't know as shared."""

    @property
    def flags(self) -> int:
        chosen = (
            (AUTO_CONVERGE, self.auto_converge),
            (POSTCOPY, self.post_copy),
            (PARALLEL, self.parallel_connections > 1),
            (UNSAFE, self.unsafe),
        )
        return sum((flag for flag, wanted in chosen if wanted), LIVE | PEER2PEER | ABORT_ON_ERROR)

    @property
    def params(self) -> dict[str, Any]:
        """libvirt's typed parameters."""
        given: dict[str, Any] = {"destination_xml": self.destination_xml}
        if self.destination_address:
            host = self.destination_address
            given["migrate_uri"] = f"tcp://[{host}]" if ":" in host else f"tcp://{host}"
        if self.bandwidth_mib_per_second:
            given["bandwidth"] = self.bandwidth_mib_per_second
        if self.parallel_connections > 1:
            given["parallel.connections"] = self.parallel_connections
        return given


@dataclass(frozen=True, slots=True)
class MigrationStats:
    """libvirt's job statistics; zeros while they aren't known."""

    elapsed_ms: int = 0
    total_bytes: int = 0
    processed_bytes: int = 0
    remaining_bytes: int = 0
    dirty_pages_per_second: int = 0
    bytes_per_second: int = 0
    iteration: int = 0
    downtime_ms: int = 0
    throttle_percent: int = 0

    @property
    def percent(self) -> float:
        """Of memory (and disks) that the destination has by now."""
        if not self.total_bytes:
            return 0.0
        return max(0.0, min(100.0, 100.0 * (1 - self.remaining_bytes / self.total_bytes)))


_FIELDS: dict[str, tuple[str, ...]] = {
    "elapsed_ms": ("time_elapsed",),
    "total_bytes": ("data_total",),
    "processed_bytes": ("data_processed",),
    "remaining_bytes": ("data_remaining",),
    "dirty_pages_per_second": ("memory_dirty_rate",),
    "bytes_per_second": ("memory_bps",),
    "iteration": ("memory_iteration",),
    "downtime_ms": ("downtime", "downtime_net"),
    "throttle_percent": ("auto_converge_throttle",),
}


def migration_stats(job: Mapping[str, Any]) -> MigrationStats:
    """What virDomainGetJobStats, or a JOB_COMPLETED event, says."""
    return MigrationStats(
        **{field: next((int(job[k]) for k in keys if k in job), 0) for field, keys in _FIELDS.items()}
    )
