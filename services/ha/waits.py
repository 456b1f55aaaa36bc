"""VMs whose last start failed for what passes: until when each waits, and who lets it be tried again first.

One that waits for room, or for hosts that are coming back, goes before less important ones of its cluster: when it is the turn
of one of these and something has changed since the other was tried, the other is tried once more. What it is refused then holds
nobody up. So room that came goes by importance, whichever of them looked first; and each waits for one trial of another, not for
its success.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from services.ha.policies.restart_order import WatchedVm, waits_for_trial
from services.ha.state import Ha, Wait, WaitsFor
from volery.runtime.clock import monotonic

KEY = "restarts"


def begin(ha: Ha, vm_id: str, what: WaitsFor, seconds: float) -> None:
    """Its start failed: it is tried again after so long in any case."""
    now = monotonic()
    ha.waits[vm_id] = Wait(what, now, now + seconds)


def end(ha: Ha, vm_id: str) -> None:
    ha.waits.pop(vm_id, None)
    ha.called.discard(vm_id)


def goes_on(ha: Ha, vm_id: str) -> bool:
    """Whether what its last start failed for has not had the time to pass."""
    wait = ha.waits.get(vm_id)
    if wait is None:
        return False
    if monotonic() < wait.until:
        return True
    end(ha, vm_id)
    return False


def for_room(ha: Ha, vm_ids: Sequence[str]) -> list[str]:
    """Those of them that no host could take."""
    return [each for each in vm_ids if (wait := ha.waits.get(each)) and wait.what is WaitsFor.ROOM]


def called(ha: Ha, vm_ids: Sequence[str]) -> list[str]:
    """Those of them for whose next trial others wait."""
    return [each for each in vm_ids if each in ha.called and each in ha.waits]


def refused_again(ha: Ha, vm_id: str) -> None:
    """It was asked about, and would still not fit."""
    ha.called.discard(vm_id)
    if (wait := ha.waits.get(vm_id)) is not None:
        wait.refused_at = monotonic()


def keep_only(ha: Ha, vm_ids: Collection[str]) -> None:
    """Turns of those that have ended; others, when they end again, have a turn anew."""
    ha.turns = {vm_id: at for vm_id, at in ha.turns.items() if vm_id in vm_ids}


def in_order(ha: Ha, vms: Sequence[WatchedVm]) -> list[WatchedVm]:
    """Those that go before less important ones, in the order in which they were given."""
    return [vm for vm in vms if (wait := ha.waits.get(vm.id)) and wait.what is not WaitsFor.LOCK]


def turn_of(ha: Ha, vm_id: str) -> float:
    """Since when it is kept from being asked for by more important ones only."""
    return ha.turns.setdefault(vm_id, monotonic())


def others_first(ha: Ha, vm: WatchedVm, waiting: Sequence[WatchedVm], waited: float) -> str:
    """For whose trial it waits, as a sentence; "" for nobody's. They are called for. `waiting` are those `in_order` of its
    cluster, the most important first."""
    came, at_most, sentence = turn_of(ha, vm.id), ha.config.priority_wait_seconds, ""
    for other in waiting:
        if not (said := waits_for_trial(vm, other, waited, at_most)):
            break
        wait = ha.waits.get(other.id)
        if wait is not None and wait.refused_at < min(came, ha.capacity_at):
            ha.called.add(other.id)
            sentence = sentence or said
    if sentence:
        ha.core.wake(KEY)
    return sentence
