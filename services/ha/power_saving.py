"""Hosts are switched off to save power, and on again: asked by inventory, which has made sure that nothing runs there.

Nothing is answered that isn't certain. An order to switch off whose answer got lost, or that a former leader gave, may
come true for as long as its device may take; until then both directions are `unavailable`. Each order carries the revision
of the host under which it was decided, and none is carried out after a newer one: a question that comes late switches
nothing.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta

from services.ha import executors, pauses, power, store
from services.ha import power_order_store as orders
from services.ha.policies.fencing import Power
from services.ha.policies.power_saving import READY, Tired, refusal, uncertain_seconds
from services.ha.power import PowerRow, new_record, with_step
from services.ha.power_order_store import Ordered, PowerOrder
from services.ha.state import Ha
from services.ha.store import POWER, RECORDS
from services.ha.watch import Watch
from volery.contracts.errors import Kind, Refused, conflict
from volery.contracts.fencing import PowerAction, PowerState
from volery.contracts.power import POWER_DOWN, POWER_UP, FenceState, OrderPower, PowerOrdered
from volery.runtime.bus import Caller
from volery.runtime.clock import monotonic, utc_now
from volery.runtime.service import Part
from volery.runtime.tables import Nothing, Row

log = logging.getLogger(__name__)

part = Part()

APART_SECONDS = 2.0
"""Between the two readings that say off."""
FORGET_SECONDS = 3600.0
BY = "service:inventory"


@part.leader_answers(POWER_DOWN)
async def power_down(ha: Ha, ask: OrderPower, caller: Caller) -> PowerOrdered:
    """Raises Refused(conflict) when nothing was done and nothing will be; unavailable when that isn't certain."""
    watch = ha.watch(ask.id)
    row = await POWER.find(ha.core.pool, ask.id)
    before = await _newest(ha, ask, watch)
    again = _is_again(before, ask, Ordered.DOWN, Ordered.SETTLED)
    if not again:
        await _check(ha, watch, row, ask)
    if ask.dry_run or row is None:
        return PowerOrdered(id=ask.id, state=PowerState.UNKNOWN)
    async with _at_power(ha, watch, ask):
        reading = await power.read_now(ha, watch, row)
        was, words = reading.state, reading.words
        if was is not PowerState.OFF:
            if again and before is not None:
                _check_certain(ha, watch, row, before)
                if was is PowerState.ON:
                    await orders.settle(ha.core.pool, ask.id, ask.revision)
                    return await _answer(
                        ha, ask, caller, was, was, words or "it was ordered off, and is still on"
                    )
                raise _uncertain(watch, words)
            words = await _order(ha, watch, row, ask, Ordered.DOWN, caller)
        await _confirm_off(ha, watch, row)
        await orders.settle(ha.core.pool, ask.id, ask.revision)
        return await _answer(ha, ask, caller, PowerState.OFF, was, words)


@part.leader_answers(POWER_UP)
async def power_up(ha: Ha, ask: OrderPower, caller: Caller) -> PowerOrdered:
    watch = ha.watch(ask.id)
    row = await POWER.get(ha.core.pool, ask.id)
    if not row.public.enabled:
        raise conflict(
            f"the power management of host {watch.facts.name} is switched off: switch it on, or the host by hand"
        )
    before = await _newest(ha, ask, watch)
    async with _at_power(ha, watch, ask):
        if before is not None and before.action is Ordered.DOWN:
            _check_certain(ha, watch, row, before)
        reading = await power.read_now(ha, watch, row)
        again = _is_again(before, ask, Ordered.UP)
        if reading.state is PowerState.ON:
            was = PowerState.OFF if again else PowerState.ON
            return await _answer(ha, ask, caller, reading.state, was, reading.words)
        if reading.state is PowerState.UNKNOWN:
            raise _uncertain(watch, reading.words)
        if (
            again
            and before is not None
            and utc_now() - before.at < timedelta(seconds=ha.config.off_retry_seconds)
        ):
            raise _uncertain(watch, "it was ordered on a moment ago, and its BMC says off so far")
        words = await _order(ha, watch, row, ask, Ordered.UP, caller)
        after = await power.read_now(ha, watch, row)
        if after.state is not PowerState.ON:
            raise _uncertain(watch, after.words or words or "it was ordered on, and its BMC says off so far")
        return await _answer(ha, ask, caller, after.state, PowerState.OFF, words)


@asynccontextmanager
async def _at_power(ha: Ha, watch: Watch, ask: OrderPower) -> AsyncIterator[None]:
    """Alone with the host's power. Raises Refused(unavailable) while another question about it is being answered."""
    if ask.id in ha.ordering:
        raise _uncertain(watch, "its BMC is being asked")
    ha.ordering.add(ask.id)
    try:
        async with ha.at_power[ask.id]:
            yield
    finally:
        ha.ordering.discard(ask.id)


async def _newest(ha: Ha, ask: OrderPower, watch: Watch) -> PowerOrder | None:
    """Raises Refused(conflict) for a question that comes after a newer one."""
    found = await orders.newest(ha.core.pool, ask.id)
    if found is not None and found.revision > ask.revision:
        raise _late(watch)
    return found


def _late(watch: Watch) -> Refused:
    return conflict(
        f"something newer was decided about the power of host {watch.facts.name}: nothing is done",
        rule="late",
    )


def _is_again(before: PowerOrder | None, ask: OrderPower, *actions: Ordered) -> bool:
    return before is not None and before.revision == ask.revision and before.action in actions


async def _check(ha: Ha, watch: Watch, row: PowerRow | None, ask: OrderPower) -> None:
    """Raises Refused when it isn't to be switched off."""
    if not ask.dry_run and (watch.facts.revision < ask.revision or watch.facts.status not in READY):
        raise Refused(
            Kind.UNAVAILABLE,
            f"ha has not heard yet that host {watch.facts.name} leaves; nothing was done",
            rule="not_heard",
        )
    rule, sentence = refusal(await _tired(ha, watch, row, ask))
    if rule:
        raise conflict(sentence, rule=rule)


async def _tired(ha: Ha, watch: Watch, row: PowerRow | None, ask: OrderPower) -> Tired:
    facts, public = watch.facts, None if row is None else row.public
    others = [each for each in executors.expected_in(ha, facts.cluster_id) if each is not watch]
    known = None if public is None else Power(
        enabled=public.enabled,
        identity=public.identity,
        executor=executors.can_execute(ha, watch, [device.agent for device in public.devices]),
    )  # fmt: skip
    return Tired(
        name=facts.name or ask.id,
        state=watch.state,
        boot_id=watch.boot_id,
        wanted_boot_id=ask.boot_id,
        power=known,
        power_tested=public is not None and public.test_passed,
        vms=await store.unsettled_on(ha.core.pool, ask.id),
        paused=await pauses.words(ha, facts),
        quarantine=ha.core.quarantine.reason,
        ours=executors.runs_here(watch),
        cut_off=await executors.is_cut_off(ha, watch),
        silent_hosts=sum(each.suspected for each in others),
    )


def _check_certain(ha: Ha, watch: Watch, row: PowerRow, before: PowerOrder) -> None:
    """Raises Refused(unavailable) while an order to switch off may still come true."""
    longest = uncertain_seconds([device.timeout_seconds for device in row.public.devices])
    if utc_now() - before.at < timedelta(seconds=longest):
        raise _uncertain(watch, "an order to switch it off may still come true")


def _uncertain(watch: Watch, words: str) -> Refused:
    said = words or "its BMC does not answer"
    return Refused(
        Kind.UNAVAILABLE, f"the power of host {watch.facts.name} isn't certain: {said}", rule="uncertain"
    )


async def _order(
    ha: Ha, watch: Watch, row: PowerRow, ask: OrderPower, action: Ordered, caller: Caller
) -> str:
    """What its devices said. It is booked before, and recorded before and after."""
    off = action is Ordered.DOWN
    if off:
        await _check(ha, watch, row, ask)
    booked_at = monotonic()
    if not await orders.book(ha.core.pool, ha.core.orders.token, ask.id, ask.revision, action, utc_now()):
        raise _late(watch)
    what = PowerAction.OFF if off else PowerAction.ON
    made = new_record(watch, BY, f"power saving: ordered {what} for {caller.principal}")
    record = with_step(made, f"ordered_{what}", f"boot {watch.boot_id}" if off else "", FenceState.RUNNING)
    inserted = RECORDS.insert(record, Nothing())
    await ha.core.commit(inserted)
    log.warning("host %s is ordered %s to save power, for %s", watch.facts.name, what, caller.principal)

    def may() -> bool:
        return monotonic() - booked_at < row.public.devices[0].timeout_seconds

    answer = await power.switch_now(ha, watch, row, what, may=may)
    state = FenceState.SUCCEEDED if answer.state.value == what.value else FenceState.FAILED
    ended = with_step(record, f"answered_{answer.state}", answer.words, state)
    await ha.core.commit(RECORDS.update(Row(record, Nothing()), ended))
    return answer.words


async def _confirm_off(ha: Ha, watch: Watch, row: PowerRow) -> None:
    """Twice, apart. Raises Refused(unavailable) for anything else: whoever asks again gets to know."""
    for number in range(2):
        if number:
            await asyncio.sleep(APART_SECONDS)
        reading = await power.read_now(ha, watch, row)
        watch.hear_power(reading, ha.listening_since)
        if reading.state is not PowerState.OFF or not reading.trusted:
            raise _uncertain(watch, reading.words or f"its BMC says {reading.state}")


async def _answer(
    ha: Ha, ask: OrderPower, caller: Caller, state: PowerState, was: PowerState, words: str
) -> PowerOrdered:
    answer = PowerOrdered(id=ask.id, state=state, was=was, words=words)
    await ha.core.commit(caller=caller, answer=answer)
    return answer


@part.every(FORGET_SECONDS)
async def forget(ha: Ha) -> None:
    await orders.forget(ha.core.pool)
