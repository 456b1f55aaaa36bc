"""Whose turn it is among VMs that ended: start groups, more important ones that have no host yet, and after a blackout the
VMs of hosts that aren't back yet.

That a VM runs is what inventory last said. It is believed of a host that has been heard for a while under the boot that it
has now; all others may have taken their VMs with them, and nobody has said so yet.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from services.ha import start_groups, waits, watched_vms
from services.ha.policies.restart_order import WITH_HOST, WatchedVm, waits_for_more_important, waits_for_place
from services.ha.state import Ha
from services.ha.watch import Watch
from volery.contracts.liveness import LivenessState
from volery.runtime.clock import monotonic

BACK_SECONDS = 3.0
"""A host is back so long after its boot was first heard: until then inventory has written what ended with the one before."""


@dataclass(frozen=True, slots=True)
class Order:
    """What turns depend on, as it is at one look."""

    groups: start_groups.Groups
    silent: frozenset[str]
    """Hosts of which nobody knows whether what ran there still does."""
    foremost: Mapping[str, WatchedVm]
    """Cluster → its most important VM on a host that has not been heard since ha began."""
    unplaced: Mapping[str, WatchedVm]
    """Cluster → its most important VM whose restart was asked for and that has no host yet."""
    refused: Mapping[str, Sequence[WatchedVm]]
    """Cluster → its VMs whose start failed for what passes, and that go before less important ones, in that order."""


async def now(ha: Ha, waiting: Sequence[WatchedVm]) -> Order:
    """`waiting` are those that ended, the most important first."""
    at = monotonic()
    silent = frozenset(host_id for host_id, watch in ha.watches.items() if not _is_back(watch, at))
    return Order(
        groups=await start_groups.known(ha),
        silent=silent,
        foremost=await _foremost(ha, silent),
        unplaced=_first_of_cluster(await watched_vms.unplaced(ha.core.pool)),
        refused=_by_cluster(waits.in_order(ha, waiting)),
    )


def _is_back(watch: Watch, at: float) -> bool:
    heard = watch.boot_heard_at
    return (
        watch.state is LivenessState.UP
        and watch.beat is not None
        and watch.beat.boot_id == watch.boot_id
        and heard is not None
        and at - heard >= BACK_SECONDS
    )


def is_starting(ha: Ha) -> bool:
    """Whether a blackout may just have ended."""
    return monotonic() - ha.opened_at < ha.config.blackout_seconds


async def _foremost(ha: Ha, silent: frozenset[str]) -> dict[str, WatchedVm]:
    if not is_starting(ha):
        return {}
    to_come = sorted(host_id for host_id in silent if _to_come(ha, host_id))
    return _first_of_cluster(await watched_vms.wanted_on(ha.core.pool, to_come))


def _first_of_cluster(vms: Sequence[WatchedVm]) -> dict[str, WatchedVm]:
    found: dict[str, WatchedVm] = {}
    for vm in vms:
        found.setdefault(vm.cluster_id, vm)
    return found


def _by_cluster(vms: Sequence[WatchedVm]) -> dict[str, list[WatchedVm]]:
    found: dict[str, list[WatchedVm]] = {}
    for vm in vms:
        found.setdefault(vm.cluster_id, []).append(vm)
    return found


def _to_come(ha: Ha, host_id: str) -> bool:
    """It has not been heard since ha began, or has just come."""
    watch = ha.watches[host_id]
    heard = watch.boot_heard_at
    return watch.known and (heard is None or monotonic() - heard < BACK_SECONDS)


async def others_first(ha: Ha, vm: WatchedVm, order: Order, waited: float) -> str:
    """For whom it waits, as a sentence; "" when it is its turn. `waited` seconds have passed since it could have been."""
    if sentence := await _those_before(ha, vm, order, waited):
        ha.turns.pop(vm.id, None)
        return sentence
    waits.turn_of(ha, vm.id)
    unplaced, at_most = order.unplaced.get(vm.cluster_id), ha.config.priority_wait_seconds
    if unplaced is not None and (sentence := waits_for_place(vm, unplaced, waited, at_most)):
        return sentence
    return waits.others_first(ha, vm, order.refused.get(vm.cluster_id, ()), waited)


async def _those_before(ha: Ha, vm: WatchedVm, order: Order, waited: float) -> str:
    """Start groups before its own, and more important VMs of hosts that aren't back."""
    if sentence := await start_groups.waits_for(ha, vm, order.groups, order.silent, waited):
        return sentence
    foremost = order.foremost.get(vm.cluster_id)
    if foremost is None or vm.reason not in WITH_HOST:
        return ""
    where = ha.watches[foremost.host_id].facts.name
    return waits_for_more_important(vm, foremost, where, waited, ha.config.blackout_wait_seconds)
