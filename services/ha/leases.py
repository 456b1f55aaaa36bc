"""Storage leases of silent hosts, read by other hosts through storage: their expiry is a proof where a watchdog that
the host can't outlive stands behind it (docs/architecture/leases.md)."""

from __future__ import annotations

import logging

from services.ha.policies.evidence import Lease
from services.ha.policies.leases import next_look, observe
from services.ha.state import Ha, LeaseWatch
from services.ha.watch import Watch
from volery.contracts.errors import Refused
from volery.contracts.leases import ExpiredLease
from volery.contracts.liveness import LivenessState
from volery.contracts.storage import READ_HOST_LEASES, HostLeases, ReadHostLeases
from volery.runtime.clock import monotonic
from volery.runtime.service import Part

log = logging.getLogger(__name__)

part = Part()

LOOK_SECONDS = 0.5
NOTHING_SECONDS = 10.0
"""When nothing could be read, or nothing that could prove anything, it is asked for again after this."""
SILENT = (LivenessState.CONNECTING, LivenessState.NON_RESPONSIVE)


@part.every(LOOK_SECONDS)
async def read_what_is_due(ha: Ha) -> None:
    """One reading of each silent host's leases at a time, beside everything else."""
    now = monotonic()
    for host_id, watch in ha.watches.items():
        if not watch.known or watch.state not in SILENT:
            ha.lease_watches.pop(host_id, None)
            continue
        kept = ha.lease_watches.setdefault(host_id, LeaseWatch())
        if not kept.reading and now >= kept.next_at:
            kept.reading = True
            ha.core.operations.spawn(_read(ha, host_id, watch, kept))


async def _read(ha: Ha, host_id: str, watch: Watch, kept: LeaseWatch) -> None:
    try:
        await _look(ha, host_id, watch, kept)
    except Refused as refused:
        log.info("the leases of host %s can't be read: %s", watch.facts.name, refused.message)
        kept.next_at = monotonic() + NOTHING_SECONDS
    finally:
        kept.reading = False


async def _look(ha: Ha, host_id: str, watch: Watch, kept: LeaseWatch) -> None:
    readers = {domain_id: watched.reader_id for domain_id, watched in kept.watched.items()}
    asked_at = monotonic()
    answer = await ha.core.bus.ask(READ_HOST_LEASES, ReadHostLeases(host_id=host_id, reader_ids=readers))
    _take(ha, watch, kept, answer, asked_at)
    now = monotonic()
    if answer.leases:
        kept.next_at = next_look(list(kept.watched.values()), now, ha.config.read_lease_seconds, LOOK_SECONDS)
    else:
        kept.next_at = now + NOTHING_SECONDS


def _take(ha: Ha, watch: Watch, kept: LeaseWatch, answer: HostLeases, asked_at: float) -> None:
    last_sign = watch.last_sign(float("-inf"))
    for seen in answer.leases:
        domain_id = seen.storage_domain_id
        finding = observe(kept.watched.get(domain_id), seen, asked_at, last_sign)
        if finding.watched is not None:
            kept.watched[domain_id] = finding.watched
        ended = finding.proves is ExpiredLease.HOST_RESET
        if seen.readings is not None and (ended or watch.lease is None or not watch.lease.expired):
            watch.lease = Lease(asked_at, seen.boot_id, expired=ended, watchdog_passed=ended)
        if ended:
            log.warning(
                "host %s: the lease of boot %s on %s was not renewed for so long that its watchdog has reset it",
                watch.facts.name,
                seen.boot_id,
                seen.storage_domain_name,
            )
