"""Small mistakes of the kind that tests by hand miss: one comparison, one clock, one unit, one guard left out.

A mistake takes the place of a method of the product, which types rightly forbid: hence the types that are ignored.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from host_agent import fencing as executing
from host_agent import journal
from host_agent.clock import BootClock
from host_agent.rules import BOOT_SHIFT, judge, too_old
from services.ha import executors, fencing, listening, liveness, power, state
from services.ha import store as ha_store
from services.inventory import giving_up, reconcile
from services.inventory.store import Store
from services.scheduler import reconcile as claims
from sim import plane
from sim.put import nothing, put, put_value
from volery.runtime import orders as owners_orders
from volery.runtime import quarantine
from volery.runtime.clock import utc_now


def cancels_are_forgotten() -> None:
    """An order that comes after it was taken back is a new one."""
    put(journal, "judge", lambda order, known: judge(order, replace(known, cancelled=False)))


def boots_do_not_count_in_ages() -> None:
    """A beat's number is the time since the machine started, whichever start that was."""
    BootClock.beat = lambda self: 1 << BOOT_SHIFT | self.now_ms()  # type: ignore[method-assign]


def old_asks_for_power_are_obeyed() -> None:
    put(executing, "too_old", lambda beat_seq, ttl_ms, now_beat: None)


def asks_for_power_are_good_for_hours() -> None:
    """Seconds where milliseconds are meant."""
    put(executing, "too_old", lambda beat_seq, ttl_ms, now_beat: too_old(beat_seq, ttl_ms * 1000, now_beat))


def silence_is_counted_by_wall_time() -> None:
    """By all but the part that notices when this process stood still: to that a jump looks like it."""
    for module in (executors, fencing, liveness, power, state, owners_orders):
        put(module, "monotonic", lambda: utc_now().timestamp())


def the_brake_forgets_in_seconds() -> None:
    """A window of seconds where it must be minutes."""
    book = ha_store.book_power_off

    async def booked(
        pool: Any, token: int, facts: Any, boot_id: str, limit: int, since: Any, now: Any
    ) -> bool:
        return await book(pool, token, facts, boot_id, limit, now - (now - since) / 60, now)

    put_value(ha_store, "book_power_off", booked)


def the_brake_lets_one_more() -> None:
    """`<=` where it must be `<`."""
    book = ha_store.book_power_off

    async def booked(
        pool: Any, token: int, facts: Any, boot_id: str, limit: int, since: Any, now: Any
    ) -> bool:
        return await book(pool, token, facts, boot_id, limit + 1, since, now)

    put_value(ha_store, "book_power_off", booked)


def claims_are_left_by_both() -> None:
    """Neither inventory gives them back, nor does the scheduler find out by itself."""
    reconcile.LOOKS["claims"] = nothing
    put(claims, "_apply", nothing)


def late_starts_meet_nothing() -> None:
    """Neither was the cancel kept, nor was the host that failed told to forget."""
    cancels_are_forgotten()

    async def only_claim(inv: Any, run: Any, vm_id: str, attempt: int, epoch: int, host_id: str) -> None:
        await giving_up.release_claim(inv, run, vm_id, epoch)

    put(giving_up, "give_up_host", only_claim)


def what_nobody_heard_counts_as_silence() -> None:
    """A leader that stood still believes that the others did."""
    anew = listening.anew

    def only_once(ha: Any) -> None:
        if not ha.listening_since:
            anew(ha)

    put(listening, "anew", only_once)


def everybody_is_the_majority() -> None:
    """Whoever is cut off believes that all the others are."""
    put(executors, "has_majority", lambda ha, cluster_id, now: True)


def epochs_do_not_rise_after_a_restore() -> None:
    async def next_one(self: Store, before: Any) -> int:
        return int(before.epoch) + 1

    Store.next_epoch = next_one  # type: ignore[method-assign]


def numbers_do_not_rise_after_a_restore() -> None:
    put_value(quarantine, "RAISE", 0)
    put_value(quarantine, "RAISE_PER_FACT", 0)


def lost_hosts_are_not_buried() -> None:
    reconcile.LOOKS["lost"] = nothing
    plane.SERVICES["inventory"] = replace(plane.SERVICES["inventory"], on_death=nothing)
