"""Mistakes that the product could have, put into it by name: `make sim MUTANTS=1` must catch each.

They live in the process of one seed and nowhere else; each names a seed that catches it. Putting one in means to replace
a method of the product, which is what `type: ignore[method-assign]` is for, here and nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from msgspec.structs import replace as replaced

from host_agent import journal, orders
from host_agent.rules import judge
from host_agent.spool import Spool
from services.ha import fencing, restarts
from services.ha import store as ha_store
from services.ha.policies import evidence, restart_order
from services.ha.policies.evidence import Held
from services.ha.policies.fencing import Decision, Silent, decide
from services.ha.store import RESTARTS
from services.ha.watch import Watch
from services.inventory import giving_up, migration, reconcile, stopping
from services.inventory.store import Store
from sim import alone, idle, slips
from sim.alone import Play
from sim.put import no, nothing, put, put_value
from volery.contracts.fencing import PowerState
from volery.contracts.liveness import LivenessState, ProofKind
from volery.runtime import service
from volery.runtime.core import Core
from volery.runtime.deaths import Deaths
from volery.runtime.hear import HostHearing
from volery.runtime.operations import ANSWER_FIRST_SECONDS, Operations
from volery.runtime.orders import Orders as OwnersOrders
from volery.runtime.quarantine import Quarantine
from volery.runtime.relay import Relay


@dataclass(frozen=True)
class Mutant:
    """What is wrong, and a seed that catches it (0: none is known yet)."""

    apply: Callable[[], None]
    seed: int
    focus: str = ""
    quick: bool = False
    """Tried by the test suite, too."""
    guarded: str = ""
    """Why it does no harm alone."""

    def play(self, name: str) -> Play:
        return Play(self.seed, self.focus, name)


async def _no_changes(*_: Any, **__: Any) -> list[Any]:
    return []


def _operations_are_not_resumed() -> None:
    Operations.resume = nothing  # type: ignore[method-assign]


def _strays_are_left() -> None:
    reconcile.LOOKS["stray"] = nothing


def _claims_are_left() -> None:
    reconcile.LOOKS["claims"] = nothing


def _stops_are_not_asked_again() -> None:
    reconcile.LOOKS["vm"] = nothing


def _lower_epochs_are_obeyed() -> None:
    put(journal, "judge", lambda order, known: None)


def _old_orders_are_obeyed() -> None:
    put(orders, "stale", lambda order, now_beat: None)


def _boot_id_is_forgotten() -> None:
    """An agent goes on after a reboot with what it was doing before."""
    resumable = orders.Orders._resumable

    def forgetful(self: orders.Orders, found: journal.JournaledOrder) -> Any:
        return resumable(self, replace(found, boot_id=self._clock.boot_id))

    orders.Orders._resumable = forgetful  # type: ignore[method-assign]


def _failed_hosts_are_not_told_to_forget() -> None:
    async def only_claim(inv: Any, run: Any, vm_id: str, attempt: int, epoch: int, host_id: str) -> None:
        await giving_up.release_claim(inv, run, vm_id, epoch)

    giving_up.give_up_host = only_claim


def _failed_migrations_are_believed() -> None:
    migration._is_there = no


def _facts_are_said_once() -> None:
    Spool._send_again = nothing  # type: ignore[method-assign]


def _lost_streams_are_not_noticed() -> None:
    async def wait(self: Relay) -> None:
        await self.wake.wait()
        self.wake.clear()

    Relay._wait = wait  # type: ignore[method-assign]


def _gaps_are_not_noticed() -> None:
    async def due(self: HostHearing, fact: Any, payload: Any) -> bool:
        at = self.positions.get(payload.host_id)
        return fact is self.report or (at is not None and payload.seq > at.seq)

    HostHearing._due = due  # type: ignore[method-assign]


def _crashes_are_not_mended() -> None:
    restarts.look = nothing


def _healthy_hosts_are_shot() -> None:
    def trigger_happy(silent: Silent, config: Any) -> Decision:
        seen = replace(silent, state=LivenessState.NON_RESPONSIVE, suspected=True, silence=100.0)
        return decide(seen if silent.state is LivenessState.UP else silent, config)

    async def look_at_everybody(ha: Any) -> None:
        for host_id in ha.watches:
            ha.core.wake(host_id)

    put(fencing, "decide", trigger_happy)
    fencing.part.every(0.5)(look_at_everybody)


def _quarantine_holds_no_looks() -> None:
    put_value(reconcile, "HELD_IN_QUARANTINE", frozenset())


def _restored_databases_are_noticed_late() -> None:
    """What hosts say is heard before the log was compared with the stream."""

    async def at_once(event: Any, work: Any) -> None:
        await work

    put(service, "after", at_once)


def _quarantine_never_begins() -> None:
    Quarantine.begin = nothing  # type: ignore[method-assign]


def _hosts_that_know_more_are_not_believed() -> None:
    HostHearing._doubt = nothing  # type: ignore[method-assign]


def _operations_begin_at_once() -> None:
    """Before the leader has compared its log with its stream."""

    def started(self: Operations, row: Any) -> None:
        if self.leading:
            self._launch(row, ANSWER_FIRST_SECONDS)

    Operations._started = started  # type: ignore[method-assign]


def _lost_streams_raise_no_doubt() -> None:
    Quarantine.begin_doubt = nothing  # type: ignore[method-assign]


def _epochs_stay_as_they_are() -> None:
    """A placement is decided under the epoch of the one before."""

    async def same(self: Store, before: Any) -> int:
        return max(1, int(before.epoch))

    Store.next_epoch = same  # type: ignore[method-assign]


def _equal_epochs_reopen() -> None:
    """`<` where it must be `<=`: what was closed here is opened again under the same epoch."""

    def lax(order: Any, known: Any) -> Any:
        return judge(order, replace(known, closed_epoch=known.closed_epoch - 1))

    put(journal, "judge", lax)


def _one_reading_proves_death() -> None:
    put_value(evidence, "OFF_APART_SECONDS", 0.0)
    evidence_hear = Watch.hear_power

    def hear(self: Watch, reading: Any, listening_since: float) -> None:
        evidence_hear(self, reading, listening_since)
        self.off_first = reading if reading.state is PowerState.OFF else self.off_first

    Watch.hear_power = hear  # type: ignore[method-assign]


def _silence_proves_death() -> None:
    def off(seen: Any) -> Any:
        if seen.beat is None or not seen.boot_id or seen.beat.at > -20.0:
            return None
        return Held(0.0, seen.boot_id, ProofKind.BMC_OFF, "it is silent")

    put(evidence, "_off", off)


def _failed_reads_count_as_off() -> None:
    hear = Watch.hear_power

    def gullible(self: Watch, reading: Any, listening_since: float) -> None:
        off = replace(reading, state=PowerState.OFF, trusted=True)
        hear(self, off if reading.state is PowerState.UNKNOWN else reading, listening_since)

    Watch.hear_power = gullible  # type: ignore[method-assign]


def _signs_of_life_void_nothing() -> None:
    put(evidence, "_voided", lambda seen: False)


def _signs_of_life_do_not_count_against_off() -> None:
    put(evidence, "_last_sign", lambda seen: float("-inf"))
    Watch.last_sign = lambda self, listening_since: float("-inf")  # type: ignore[method-assign]
    hear = Watch.hear

    def deaf(self: Watch, beat: Any, now: float) -> None:
        first = self.off_first
        hear(self, beat, now)
        self.off_first = first

    Watch.hear = deaf  # type: ignore[method-assign]


def _suspects_are_fenced_at_once() -> None:
    def hasty(silent: Silent, config: Any) -> Decision:
        return decide(replace(silent, silence=max(silent.silence, 100.0)), config)

    put(fencing, "decide", hasty)


def _cut_off_leaders_fence() -> None:
    def bold(silent: Silent, config: Any) -> Decision:
        return decide(replace(silent, cut_off=False, storm=False, leading=1e9), config)

    put(fencing, "decide", bold)


def _fenced_hosts_stay_off() -> None:
    put(fencing, "_power_on", nothing)


def _restarts_are_forgotten_once_asked() -> None:
    """An answer that got lost is taken for an answer."""
    ask = restarts._ask

    async def once(ha: Any, vm: Any, row: Any) -> None:
        await ha.core.commit(RESTARTS.update(row, row.public, replaced(row.private, pending="")))
        row = await RESTARTS.find(ha.core.pool, vm.id)
        await ask(ha, vm, row)

    restarts._ask = once


def _restarts_wait_by_wall_time() -> None:
    """A clock that was set back holds everything up."""
    original = restart_order._due

    def due(vm: Any, attempts: Any, now: Any, config: Any, last_reason: str) -> Any:
        last = max(attempts, default=now)
        return max(last, original(vm, tuple(min(at, now) for at in attempts), now, config, last_reason))

    put(restart_order, "_due", due)


def _deaths_are_not_believed_by_inventory() -> None:
    Deaths.has_ended = lambda self, host_id, boot_id: False  # type: ignore[method-assign]


def _orders_of_the_dead_wait_for_ever() -> None:
    OwnersOrders.end_with_their_hosts = nothing  # type: ignore[method-assign]


def _answers_are_not_remembered() -> None:
    """A request that is repeated is carried out again."""

    async def forgets(self: Core, caller: Any) -> None:
        return None

    Core.first_answer = forgets  # type: ignore[method-assign]


def _moves_keep_the_source_running() -> None:
    """The migration's failure is settled for the source, whatever the destination says."""

    def stays(here: Any, there: Any, epoch: int, *, source_died: bool) -> bool:
        return False

    put(migration, "has_arrived", stays)


def _arrivals_are_taken_for_granted() -> None:
    def arrives(here: Any, there: Any, epoch: int, *, source_died: bool) -> bool:
        return True

    put(migration, "has_arrived", arrives)


def _destinations_are_not_told_to_forget() -> None:
    migration._forget = nothing


def _deadlines_pass_by() -> None:
    reconcile.LOOKS["order"] = nothing


def _nothing_brakes() -> None:
    async def past(ha: Any, watch: Any, limit: int) -> bool:
        return True

    fencing._past_brake = past


def _the_brake_is_in_memory() -> None:
    """A new leader begins with an empty window."""

    async def booked(*_: Any, **__: Any) -> bool:
        return True

    ha_store.book_power_off = booked


def _ends_of_other_placements_count() -> None:
    stopping._is_the_same = nothing


MUTANTS: dict[str, Mutant] = {
    "operations are not resumed": Mutant(_operations_are_not_resumed, 5, "services"),
    "strays are left": Mutant(
        _strays_are_left,
        0,
        guarded="a domain runs where it may not only after a proof of death that was wrong, and that is a violation itself",
    ),
    "claims are left": Mutant(
        _claims_are_left, 0, guarded="the scheduler settles claims by itself, from what is said of their VMs"
    ),
    "stops are not asked again": Mutant(_stops_are_not_asked_again, 11, "silent stop"),
    "lower epochs are obeyed": Mutant(_lower_epochs_are_obeyed, 10, "start overtaken"),
    "equal epochs reopen": Mutant(
        _equal_epochs_reopen,
        0,
        guarded="what comes late has a lower number than the order that closed, or was taken back before",
    ),
    "epochs stay as they are": Mutant(_epochs_stay_as_they_are, 10, "everywhere since"),
    "old orders are obeyed": Mutant(_old_orders_are_obeyed, 10, "former boot"),
    "boot id is forgotten": Mutant(_boot_id_is_forgotten, 10, "former boot's journal", quick=True),
    "failed hosts are not told to forget": Mutant(
        _failed_hosts_are_not_told_to_forget,
        0,
        guarded="an order that was taken back is refused, and an agent ends what it started for one that is cancelled meanwhile",
    ),
    "failed migrations are believed": Mutant(_failed_migrations_are_believed, 10, "has left"),
    "moves keep the source": Mutant(_moves_keep_the_source_running, 10, "has left"),
    "arrivals are taken for granted": Mutant(
        _arrivals_are_taken_for_granted,
        0,
        guarded="a source that still runs it is heard first, and the destination says right after what it has",
    ),
    "destinations are not told to forget": Mutant(
        _destinations_are_not_told_to_forget,
        0,
        guarded="libvirt ends what waits for a migration whose source is done with it",
    ),
    "facts are said once": Mutant(_facts_are_said_once, 10, "fact lost", quick=True),
    "lost streams are not noticed": Mutant(_lost_streams_are_not_noticed, 10, "stream lost"),
    "gaps are not noticed": Mutant(_gaps_are_not_noticed, 11, "fact lost"),
    "answers are not remembered": Mutant(_answers_are_not_remembered, 10, "answers", quick=True),
    "deadlines pass by": Mutant(
        _deadlines_pass_by,
        0,
        guarded="an order that comes late is too old by then, and what it would end is under a later epoch",
    ),
    "crashes are not mended": Mutant(_crashes_are_not_mended, 1, "crashes", quick=True),
    "restarts are forgotten once asked": Mutant(
        _restarts_are_forgotten_once_asked,
        0,
        guarded="a VM that is still down under the same epoch is looked at again, and asked for as the next attempt",
    ),
    "restarts wait by wall time": Mutant(_restarts_wait_by_wall_time, 1, "set back", quick=True),
    "healthy hosts are shot": Mutant(_healthy_hosts_are_shot, 2, "fences", quick=True),
    "one reading proves death": Mutant(_one_reading_proves_death, 10, "BMC reset", quick=True),
    "silence proves death": Mutant(_silence_proves_death, 1, "fences", quick=True),
    "failed reads count as off": Mutant(_failed_reads_count_as_off, 10, "silent", quick=True),
    "signs of life void nothing": Mutant(_signs_of_life_void_nothing, 10, "wrong machine"),
    "signs of life don't count against off": Mutant(_signs_of_life_do_not_count_against_off, 10, "BMC reset"),
    "suspects are fenced at once": Mutant(_suspects_are_fenced_at_once, 10, "moments", quick=True),
    "cut off leaders fence": Mutant(
        _cut_off_leaders_fence,
        0,
        guarded="whoever is cut off finds nobody to run a fence agent either: an executor needs the same majority",
    ),
    "fenced hosts stay off": Mutant(_fenced_hosts_stay_off, 1, "hung", quick=True),
    "deaths are not believed": Mutant(_deaths_are_not_believed_by_inventory, 10, "dies in the middle"),
    "lost hosts are not buried": Mutant(slips.lost_hosts_are_not_buried, 10, "dead"),
    "orders of the dead wait for ever": Mutant(_orders_of_the_dead_wait_for_ever, 10, "dies in the middle"),
    "readings are not heard": Mutant(idle.readings_are_not_heard, 1, "dead"),
    "two readings are never far enough apart": Mutant(
        idle.two_readings_are_never_far_enough_apart, 1, "dead"
    ),
    "people prove nothing": Mutant(idle.people_prove_nothing, 1, "looked at"),
    "new boots prove nothing": Mutant(idle.new_boots_prove_nothing, 10, "without libvirtd"),
    "silence is never long enough": Mutant(idle.silence_is_never_long_enough, 1, "hung"),
    "nobody asks BMCs": Mutant(idle.nobody_asks_bmcs, 1, "dead"),
    "on is taken for off": Mutant(idle.on_is_taken_for_off, 1, "hung"),
    "fences are not carried out": Mutant(idle.fences_are_not_carried_out, 1, "hung"),
    "the hold after a start never ends": Mutant(idle.the_hold_after_a_start_never_ends, 1, "hung"),
    "pauses never end": Mutant(idle.pauses_never_end, 1, "hung"),
    "nobody is the majority": Mutant(idle.nobody_is_the_majority, 1, "dead"),
    "restarts wait for minutes": Mutant(idle.restarts_wait_for_minutes, 1, "set back"),
    "nobody is suspected": Mutant(idle.nobody_is_suspected, 1, "dead"),
    "listening always begins anew": Mutant(idle.listening_always_begins_anew, 1, "dead"),
    "identities are never believed": Mutant(idle.identities_are_never_believed, 1, "dead"),
    "on is not understood": Mutant(idle.on_is_not_understood, 1, "hung"),
    "restarts are not asked for": Mutant(idle.restarts_are_not_asked_for, 1, "set back"),
    "the brake always holds": Mutant(idle.the_brake_always_holds, 1, "hung"),
    "nothing brakes": Mutant(_nothing_brakes, 10, "one after another"),
    "the brake is in memory": Mutant(_the_brake_is_in_memory, 10, "one after another"),
    "ends of other placements count": Mutant(_ends_of_other_placements_count, 10, "started since"),
    "cancels are forgotten": Mutant(slips.cancels_are_forgotten, 10, "stop overtaken", quick=True),
    "boots don't count in ages": Mutant(slips.boots_do_not_count_in_ages, 11, "former boot"),
    "old asks for power are obeyed": Mutant(slips.old_asks_for_power_are_obeyed, 10, "fence overtaken"),
    "asks for power are good for hours": Mutant(
        slips.asks_for_power_are_good_for_hours, 10, "fence overtaken"
    ),
    "silence is counted by wall time": Mutant(slips.silence_is_counted_by_wall_time, 10, "clocks forward"),
    "claims are left by both": Mutant(slips.claims_are_left_by_both, 10, "has left"),
    "late starts meet nothing": Mutant(slips.late_starts_meet_nothing, 10, "start overtaken"),
    "what nobody heard counts as silence": Mutant(
        slips.what_nobody_heard_counts_as_silence, 10, "leader cut off", quick=True
    ),
    "everybody is the majority": Mutant(slips.everybody_is_the_majority, 11, "most cut"),
    "the brake forgets in seconds": Mutant(slips.the_brake_forgets_in_seconds, 10, "one after another"),
    "the brake lets one more": Mutant(slips.the_brake_lets_one_more, 10, "one after another"),
    "epochs don't rise after a restore": Mutant(
        slips.epochs_do_not_rise_after_a_restore,
        0,
        guarded="what hosts said since the backup is heard again from their stream, and its epochs are taken over",
    ),
    "numbers don't rise after a restore": Mutant(
        slips.numbers_do_not_rise_after_a_restore, 12, "everywhere since"
    ),
    "quarantine never begins": Mutant(_quarantine_never_begins, 10, "moved since"),
    "quarantine holds no looks": Mutant(_quarantine_holds_no_looks, 2, "moved since", quick=True),
    "hosts that know more are not believed": Mutant(
        _hosts_that_know_more_are_not_believed, 11, "made anew", quick=True
    ),
    "operations begin at once": Mutant(_operations_begin_at_once, 1, "asked anew", quick=True),
    "lost streams raise no doubt": Mutant(_lost_streams_raise_no_doubt, 10, "asked anew", quick=True),
    "restored databases are noticed late": Mutant(_restored_databases_are_noticed_late, 5, "moved since"),
}


def apply(play: Play) -> None:
    """Puts the mistake into this process. Raises KeyError for one that doesn't exist."""
    if play.mutant:
        MUTANTS[play.mutant].apply()


alone.before.append(apply)
