"""Physical CPUs: how a host's are built, and which of them a VM runs on."""

from __future__ import annotations

from enum import StrEnum

from volery.contracts.base import Message


class CpuCore(Message):
    """One core of a host. A CPU is what Linux numbers: a thread of a core."""

    cell: int = 0
    """NUMA cell."""
    socket: int = 0
    cpus: tuple[int, ...] = ()
    """Its threads."""


class PinningPolicy(StrEnum):
    """Which physical CPUs a VM runs on (oVirt's CPU pinning policies)."""

    NONE = "none"
    """Any that aren't given to one VM alone."""
    MANUAL = "manual"
    """Those of its map, with others."""
    DEDICATED = "dedicated"
    """One for each vCPU, chosen when it starts and its alone while it runs."""
    ISOLATE_THREADS = "isolate_threads"
    """A core for each vCPU, chosen when it starts; nobody uses the core's other threads."""
    RESIZE_AND_PIN = "resize_and_pin"
    """All of its host's but the first core of each socket, with others: it starts with a vCPU for each of them, whatever it
    has itself."""


class CpuPinning(Message):
    """What a VM asks for."""

    policy: PinningPolicy = PinningPolicy.NONE
    pins: tuple[tuple[int, ...], ...] = ()
    """Only of a manual one: the physical CPUs of each vCPU, vCPU 0 first."""


class GivenCpus(Message):
    """What a VM gets on one host."""

    pins: tuple[tuple[int, ...], ...]
    """The physical CPUs of each vCPU, vCPU 0 first. QEMU's own threads run on all of these."""
    exclusive: tuple[int, ...] = ()
    """Physical CPUs that nobody else may use while it runs: its own, and those that are left idle for its sake."""
    revision: int = 0
    """Counts how often physical CPUs of the host were given or taken back; it was chosen under this."""
