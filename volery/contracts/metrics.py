"""Beats and samples of hosts and VMs: plain core NATS publishes, losing one costs nothing."""

from __future__ import annotations

from datetime import datetime

from volery.contracts.base import Message

BEAT_SUBJECT = "beat.host.{host_id}"
METRICS_SUBJECT = "metrics.host.{host_id}"


class Beat(Message):
    """Every 500 ms on `beat.host.{host_id}`."""

    host_id: str
    generation: str
    boot_id: str
    beat_seq: int
    """Grows with every beat, over restarts and boots, but not by one; orders name the newest one seen."""
    clock_ms: int
    """The host's Unix time: for the skew warning only."""
    hypervisor_ok: bool = True
    stuck_threads: int = 0
    leaving: bool = False
    """Its administrator shuts the host down, or reboots it: the silence that follows is meant."""


class DiskSample(Message):
    disk_id: str
    read_bytes: int = 0
    written_bytes: int = 0
    read_requests: int = 0
    write_requests: int = 0
    allocated_bytes: int = 0


class NicSample(Message):
    nic_id: str
    received_bytes: int = 0
    sent_bytes: int = 0
    received_packets: int = 0
    sent_packets: int = 0
    dropped_packets: int = 0


class VmSample(Message):
    vm_id: str
    cpu_percent: float = 0.0
    """Of one CPU: 200 is two busy vCPUs."""
    memory_used_bytes: int = 0
    memory_bytes: int = 0
    disks: tuple[DiskSample, ...] = ()
    nics: tuple[NicSample, ...] = ()


class FreePages(Message):
    """Huge pages of one size: how many the host has, and how many nobody uses or has reserved."""

    page_kib: int
    count: int
    free: int


class HostSample(Message):
    """Every 15 s on `metrics.host.{host_id}`; counters are totals since the domain started."""

    host_id: str
    boot_id: str
    at: datetime
    cpu_percent: float = 0.0
    """Of the whole host: 100 is every CPU busy."""
    memory_used_bytes: int = 0
    memory_bytes: int = 0
    swap_used_bytes: int = 0
    load: float = 0.0
    received_bytes: int = 0
    sent_bytes: int = 0
    huge_pages: tuple[FreePages, ...] = ()
    """Only sizes of which there are some."""
    vms: tuple[VmSample, ...] = ()
