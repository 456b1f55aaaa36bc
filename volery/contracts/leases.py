"""Leases on shared storage: who may run a VM or write a volume, kept by each host's sanlock, never by Volery.

A storage domain that can hold leases has one *lockspace*, in which every host has a number and renews its own host
lease; each VM or volume has one *lease* (sanlock: resource), which a process of a host holds while it lives.

Times are sanlock's own, by the io_timeout of the host whose lease it is (src/timeouts.c and timeouts.h, 3.8):
renewal every 2 io_timeouts; without one for 8 the daemon has ended, or failed to end, every holder; and the
watchdog, last petted before that, fires within its 60 s.
"""

from __future__ import annotations

from enum import StrEnum

from volery.contracts.base import Done, Message, Order
from volery.contracts.together import HELD

MAX_HOST_NUMBER = 2000
"""Of a lockspace with 512-byte sectors and 1 MiB alignment, as every file has."""
LEASE_BYTES = 1 << 20
"""What a lockspace, and each lease, takes on the storage."""
DEFAULT_IO_TIMEOUT_SECONDS = 10
WATCHDOG_FIRE_SECONDS = 60
"""Built into sanlock and wdmd: a device that can't be set to it is not used."""
MARGIN_SECONDS = 3
"""sanlock and wdmd count whole seconds, each rounding down; clocks of two machines differ by far less."""


LEASE_HELD = "lease_held"
"""The `rule` of a refusal to run a VM whose lease another host holds, or a dead one has not lost yet: no host would run
it now, and each may in a while."""


IMAGE_HELD = "image_held"
"""The `rule` of a refusal to run a VM whose disk another QEMU program has locked, or one of a dead host had: then its file
server forgets that lock in its own time. No host would run it now, and each may in a while."""


FREE_LATER = frozenset({LEASE_HELD, IMAGE_HELD, HELD})
"""Rules of refusals that no other host would answer otherwise, and that time ends."""


LEASE_TAKEN = "lease_taken"
"""The `rule` of a refusal to free a host's lease: it isn't that boot's any more, so there is nothing to free."""


class Watchdog(Message):
    """What will reset this host when it stops renewing its leases, as found in this boot."""

    armed: bool = False
    """wdmd holds the device, pets it, and sanlock reports to wdmd."""
    inescapable: bool = False
    """Armed, and a device apart from the kernel that it resets: the host can't outlive it."""
    identity: str = ""
    """The device's own name."""
    fire_seconds: int = 0
    """How long after the last pet it fires."""
    problem: str = ""
    """Why it isn't inescapable, and what to do; "" when it is."""


class LeaseAbility(Message):
    """Whether this host can hold leases."""

    version: str = ""
    """sanlock's; "" when its daemon doesn't answer."""
    domains: bool = False
    """Whether libvirt makes each domain hold its lease; without it such a domain is refused here."""
    problem: str = ""
    """What is missing, and what to do."""
    watchdog: Watchdog = Watchdog()


class LockspaceReport(Message):
    """One lockspace that the host has joined."""

    domain_id: str
    host_number: int
    generation: int = 0
    """Counts how often this number was taken: a new one ends what the former held."""
    io_timeout_seconds: int = DEFAULT_IO_TIMEOUT_SECONDS
    reset_host: bool = False
    """The watchdog resets the host when the host lease is lost, even if every holder could be ended."""
    failing: bool = False
    """It could not be renewed lately."""


class HeldLease(Message):
    """A lease that a process of the host holds."""

    lockspace: str
    key: str
    pid: int = 0
    """0: it is just being let go."""


class LeasesReport(Message):
    ability: LeaseAbility
    lockspaces: tuple[LockspaceReport, ...] = ()
    held: tuple[HeldLease, ...] = ()


class JoinLockspace(Message):
    """Take this number in the domain's lockspace and keep it renewed. Done when leases can be held.

    It takes 3 io_timeouts, and as long as the former holder might live if another machine had this number.
    """

    domain_id: str
    path: str
    """{domain}/leases/lockspace"""
    host_number: int
    """1 to 2000, this host's alone in the lockspace."""
    io_timeout_seconds: int = DEFAULT_IO_TIMEOUT_SECONDS
    reset_host: bool = False
    """See LockspaceReport. It costs the host, with all its VMs, when this domain's storage is gone for long."""
    initialise: bool = False
    """Make the lockspace if there is none. One that exists is never made anew."""


class LeaveLockspace(Message):
    """Give the number back. Refused while a lease is held, since sanlock would kill its holder."""

    domain_id: str
    path: str


class CreateLease(Message):
    """Make the lease of a VM or volume, free. One that exists is left as it is."""

    domain_id: str
    key: str
    """The VM's or disk's id."""
    path: str
    """{domain}/leases/{key}"""


class DeleteLease(Message):
    """Remove it. Refused while it is held anywhere; this host must have joined the lockspace."""

    domain_id: str
    key: str
    path: str


class ReportLeases(Message):
    """Ask what this host holds, now."""


class ReadHostLease(Message):
    """Look at a host's lease twice, on the storage itself. A read that fails is refused, and proves nothing."""

    domain_id: str
    path: str
    host_number: int
    wait_seconds: float = 0.0
    """Between the two."""


class FreeHostLease(Message):
    """Write the lease of a boot free that has ended by proof, as that host does when it leaves: what it held can be taken
    at once. Refused by the rule `lease_taken` unless that boot's generation is still there."""

    domain_id: str
    path: str
    """{domain}/leases/lockspace"""
    host_number: int
    generation: int
    """Which the dead boot reported: each join has its own."""


class HostLeaseReading(Message):
    """A host's lease as it was on the storage, and when, by the reader's monotonic clock."""

    asked_seconds: float
    """Just before it was read."""
    answered_seconds: float
    """Just after."""
    holder: str
    """The name that its sanlock took; "" if the number was never taken."""
    generation: int
    timestamp: int
    """The holder's own clock, in whole seconds: compared with itself only. 0: given back."""
    io_timeout_seconds: int


class HostLeaseReadings(Message):
    reader_boot_id: str
    """Readings can be compared with others of the same host's same boot only."""
    first: HostLeaseReading
    second: HostLeaseReading


class ExpiredLease(StrEnum):
    """What the time without a renewal proves (docs/architecture/leases.md)."""

    NOTHING = "nothing"
    """The holder may live and write."""
    NO_HOLDERS = "no_holders"
    """Nothing runs that held a lease in this lockspace. The host itself may well live."""
    HOST_RESET = "host_reset"
    """The boot that held it has ended."""


def fail_seconds(io_timeout_seconds: int) -> int:
    """From a renewal until the host's own sanlock takes its lease for lost."""
    return 8 * io_timeout_seconds


def dead_seconds(io_timeout_seconds: int) -> int:
    """From a renewal until sanlock lets others take what the host held."""
    return fail_seconds(io_timeout_seconds) + WATCHDOG_FIRE_SECONDS


def unchanged_seconds(first: HostLeaseReading, second: HostLeaseReading) -> float:
    """How long the lease was surely not renewed: from the end of the first reading to the start of the second.

    0 if it was renewed or taken anew between them. Both must be the same reader's, in one boot.
    """
    if (first.holder, first.generation, first.timestamp) != (
        second.holder,
        second.generation,
        second.timestamp,
    ):
        return 0.0
    return max(0.0, second.asked_seconds - first.answered_seconds)


def proven(
    reading: HostLeaseReading, unchanged: float, joined: LockspaceReport | None, watchdog: Watchdog
) -> ExpiredLease:
    """What an unchanged lease proves about its holder.

    `joined` and `watchdog`: what the host itself last reported of the boot that holds this lease.
    """
    if not reading.timestamp or joined is None or joined.generation != reading.generation:
        return ExpiredLease.NOTHING
    if unchanged < dead_seconds(reading.io_timeout_seconds) + MARGIN_SECONDS or not watchdog.inescapable:
        return ExpiredLease.NOTHING
    return ExpiredLease.HOST_RESET if joined.reset_host else ExpiredLease.NO_HOLDERS


JOIN_LOCKSPACE = Order("lease.join", JoinLockspace, LockspaceReport, deadline_seconds=900)
LEAVE_LOCKSPACE = Order("lease.leave", LeaveLockspace, Done)
CREATE_LEASE = Order("lease.create", CreateLease, Done)
DELETE_LEASE = Order("lease.delete", DeleteLease, Done)
REPORT_LEASES = Order("lease.report", ReportLeases, LeasesReport)
READ_HOST_LEASE = Order("lease.read_host", ReadHostLease, HostLeaseReadings)
FREE_HOST_LEASE = Order("lease.free_host", FreeHostLease, Done)
