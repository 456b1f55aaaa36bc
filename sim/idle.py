"""Mistakes of ha that keep what is promised from happening: it waits, holds, or doesn't believe what it should.

A mistake takes the place of a method of the product, which types rightly forbid: hence the types that are ignored.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from services.ha import executors, fencing, listening, liveness, pauses, restarts
from services.ha.policies import evidence, restart_order
from services.ha.policies.fencing import Act, Decision, Silent, decide
from services.ha.watch import Watch
from sim.put import no, nothing, put, put_value
from volery.contracts.fencing import PowerState


def readings_are_not_heard() -> None:
    Watch.hear_power = lambda self, reading, listening_since: None  # type: ignore[method-assign]


def two_readings_are_never_far_enough_apart() -> None:
    """Milliseconds where it must be seconds."""
    put_value(evidence, "OFF_APART_SECONDS", evidence.OFF_APART_SECONDS * 1000)


def people_prove_nothing() -> None:
    put(evidence, "_confirmed", lambda seen: None)


def new_boots_prove_nothing() -> None:
    put(evidence, "_new_boot", lambda seen, held, now: None)


def silence_is_never_long_enough() -> None:
    """Seconds where milliseconds are meant."""

    def patient(silent: Silent, config: Any) -> Decision:
        return decide(replace(silent, silence=silent.silence / 1000), config)

    put(fencing, "decide", patient)


def nobody_asks_bmcs() -> None:
    fencing._read = nothing


def on_is_taken_for_off() -> None:
    hear = Watch.hear_power

    def confused(self: Watch, reading: Any, listening_since: float) -> None:
        off = replace(reading, state=PowerState.OFF)
        hear(self, off if reading.state is PowerState.ON else reading, listening_since)

    Watch.hear_power = confused  # type: ignore[method-assign]


def fences_are_not_carried_out() -> None:
    async def held(ha: Any, watch: Any, row: Any, record: Any) -> Decision:
        return Decision(Act.HOLD, "brake", "it is held")

    fencing._power_off = held


def the_hold_after_a_start_never_ends() -> None:
    def timid(silent: Silent, config: Any) -> Decision:
        return decide(replace(silent, leading=0.0), config)

    put(fencing, "decide", timid)


def pauses_never_end() -> None:
    async def paused(ha: Any, host: Any) -> str:
        return "by somebody, once"

    put(pauses, "words", paused)


def nobody_is_the_majority() -> None:
    """`>=` of twice as many."""
    put(executors, "has_majority", lambda ha, cluster_id, now: False)


def restarts_wait_for_minutes() -> None:
    """Where they must wait for seconds."""
    seconds = restart_order.delay
    put(restart_order, "delay", lambda count, config: 60 * seconds(count, config))


def nobody_is_suspected() -> None:
    put_value(liveness, "SUSPICIOUS", frozenset())


def listening_always_begins_anew() -> None:
    put(listening, "goes_on", lambda ha: False)


def identities_are_never_believed() -> None:
    hear = Watch.hear_power

    def wary(self: Watch, reading: Any, listening_since: float) -> None:
        hear(self, replace(reading, trusted=False), listening_since)

    Watch.hear_power = wary  # type: ignore[method-assign]


def on_is_not_understood() -> None:
    hear = Watch.hear_power

    def slow(self: Watch, reading: Any, listening_since: float) -> None:
        unknown = replace(reading, state=PowerState.UNKNOWN)
        hear(self, unknown if reading.state is PowerState.ON else reading, listening_since)

    Watch.hear_power = slow  # type: ignore[method-assign]


def restarts_are_not_asked_for() -> None:
    restarts._ask = nothing


def the_brake_always_holds() -> None:
    fencing._past_brake = no
