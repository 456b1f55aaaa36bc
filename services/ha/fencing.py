"""What is done about silent hosts, one step at a time per host, decided anew from what is known before each step."""

from __future__ import annotations

import logging
from datetime import timedelta

from msgspec.structs import replace

from services.ha import executors, pauses, power, soft_fencing, store
from services.ha.policies import kdump
from services.ha.policies.fencing import (
    Act,
    Decision,
    Power,
    Record,
    Silent,
    brake_limit,
    brake_sentence,
    decide,
    is_lease_alive,
    is_soft_due,
)
from services.ha.policies.peers import answered, sentence
from services.ha.policies.soft_fencing import state_of
from services.ha.power import PowerRow, with_step
from services.ha.state import Ha
from services.ha.store import POLICIES, POWER, RECORDS
from services.ha.watch import Watch
from volery.contracts.fencing import PowerAction, PowerState
from volery.contracts.liveness import LivenessState
from volery.contracts.power import FenceRecord, FenceState
from volery.runtime.clock import monotonic, utc_now
from volery.runtime.service import Part
from volery.runtime.tables import Nothing, Row

log = logging.getLogger(__name__)

part = Part()

LOOK_SECONDS = 0.5
FORGET_SECONDS = 600.0
DECIDED_SECONDS = 5.0
"""What was decided longer ago is decided anew: the database, or this very process, stood still meanwhile, and beats may
wait to be heard."""
KEEP_DAYS = 90
NEVER = float("inf")

RecordRow = Row[FenceRecord, Nothing]


@part.every(LOOK_SECONDS)
async def look_at_silent(ha: Ha) -> None:
    """Every host that isn't heard of, and those whose record is open."""
    if not ha.listed:
        return
    open_ones = await store.open_records(ha.core.pool)
    for host_id, watch in ha.watches.items():
        silent = watch.suspected or watch.state is LivenessState.DEAD
        if watch.known and (silent or host_id in open_ones):
            ha.core.wake(host_id)


async def treat(ha: Ha, host_id: str) -> None:
    """One step for one host. The runtime calls it once at a time per host."""
    watch = ha.watches.get(host_id)
    if watch is None or not watch.known or not ha.listed:
        return
    row = await POWER.find(ha.core.pool, host_id)
    record = await store.open_record(ha.core.pool, host_id)
    record = await _proven(ha, watch, record)
    known = await gather(ha, watch, row, record)
    if is_soft_due(known, ha.config):
        soft_fencing.begin(ha, watch)
    decision = decide(known, ha.config)
    if decision.act is Act.READ and decision.sentence:
        await say(ha, host_id, decision.sentence)
    if decision.act is Act.READ and row is not None:
        await _read(ha, watch, row, record)
    elif decision.act is Act.POWER_OFF and row is not None:
        decision = await _power_off(ha, watch, row, record)
    elif decision.act is Act.POWER_ON and row is not None and record is not None:
        await _power_on(ha, watch, row, record)
    elif decision.act is Act.CLOSE and record is not None:
        await _close(ha, watch, record)
    if decision.act is not Act.READ:
        await say(ha, host_id, decision.sentence)


async def _proven(ha: Ha, watch: Watch, record: RecordRow | None) -> RecordRow | None:
    """The record says so once the death of the boot that it is about was proven."""
    proof = watch.proof
    if record is None or proof is None or record.public.state is not FenceState.RUNNING:
        return record
    if proof.boot_id != record.public.boot_id:
        return record
    return await _keep(ha, record, "proven", f"{proof.kind}: {proof.details}", FenceState.OFF)


async def gather(ha: Ha, watch: Watch, row: PowerRow | None, record: RecordRow | None) -> Silent:
    """What the decision is made of, as it is now."""
    now, facts, pool = monotonic(), watch.facts, ha.core.pool
    acted_at = ha.acted_at.get(facts.id)
    policy = await POLICIES.find(pool, facts.cluster_id)
    expected = executors.expected_in(ha, facts.cluster_id)
    silence = now - watch.last_sign(ha.listening_since)
    return Silent(
        name=facts.name,
        status=facts.status,
        state=watch.state,
        suspected=watch.suspected,
        boot_id=watch.boot_id,
        silence=silence,
        power=_power(ha, watch, row, now),
        record=_record(watch, record, now),
        protected_vms=await store.highly_available_on(pool, facts.id),
        unsettled_vms=await store.unsettled_on(pool, facts.id),
        paused=await pauses.words(ha, facts),
        switched_age=None if acted_at is None else now - acted_at,
        leaving_age=watch.leaving_age(now),
        leading=now - ha.leading_since,
        storm=ha.storm_since is not None,
        cut_off=await executors.is_cut_off(ha, watch),
        quarantine=ha.core.quarantine.reason,
        ours=executors.runs_here(watch),
        policy=None if policy is None else policy.public,
        lease_alive=is_lease_alive(watch.lease, watch.boot_id, now),
        broken_hosts=sum(each.suspected for each in expected),
        cluster_hosts=len(expected),
        peers_tried=len(watch.peers),
        peers_answered=answered(watch.peers.values(), now),
        dump=kdump.words(watch.dump, watch.last_sign(ha.listening_since), now, ha.config),
        soft=state_of(await soft_fencing.gather(ha, watch, now), silence, ha.config),
    )


def _power(ha: Ha, watch: Watch, row: PowerRow | None, now: float) -> Power | None:
    if row is None:
        return None
    public, reading = row.public, watch.reading
    read_at = ha.read_at.get(row.id)
    return Power(
        enabled=public.enabled,
        identity=public.identity,
        state=reading.state if reading is not None else PowerState.UNKNOWN,
        read_age=None if read_at is None or reading is None else now - read_at,
        words=reading.words if reading is not None else "",
        executor=executors.can_execute(ha, watch, [device.agent for device in public.devices]),
    )


def _record(watch: Watch, row: RecordRow | None, now: float) -> Record | None:
    if row is None:
        return None
    found, proof = row.public, watch.proof
    offs, ons = _ages(row, "ordered_off"), _ages(row, "ordered_on")
    return Record(
        state=found.state,
        boot_id=found.boot_id,
        offs=_orders(row),
        last_off_age=min(offs, default=NEVER),
        last_on_age=min(ons, default=NEVER),
        proven_age=now - proof.at if proof is not None and proof.boot_id == found.boot_id else NEVER,
    )


def _orders(row: RecordRow) -> int:
    """How often it was really ordered off."""
    return max(0, len(_ages(row, "ordered_off")) - len(_ages(row, "held_back")))


def _ages(row: RecordRow, name: str) -> list[float]:
    """How long ago these steps were, in seconds by the wall clock: the record outlives its writer."""
    wall = utc_now()
    return [(wall - step.at).total_seconds() for step in row.public.steps if step.step == name]


async def _read(ha: Ha, watch: Watch, row: PowerRow, record: RecordRow | None) -> None:
    before = watch.reading
    reading = await power.read(ha, watch, row)
    watch.hear_power(reading, ha.listening_since)
    if before is None or before.state is not reading.state:
        said = f": {reading.words}" if reading.words else ""
        log.warning("host %s is silent; its BMC says %s%s", watch.facts.name, reading.state, said)
        if record is not None:
            await _keep(ha, record, str(reading.state), reading.words, record.public.state)


async def _power_off(ha: Ha, watch: Watch, row: PowerRow, record: RecordRow | None) -> Decision:
    """Past the brake and once nobody else is at its power, which may take a minute, the order."""
    config, facts = ha.config, watch.facts
    hosts = len(executors.in_cluster(ha, facts.cluster_id))
    limit = brake_limit(hosts, config)
    if not await _past_brake(ha, watch, limit):
        return Decision(Act.HOLD, "brake", brake_sentence(facts.name, limit, hosts, config))
    async with ha.at_power[row.id]:
        return await _order_off(ha, watch, record)


async def _order_off(ha: Ha, watch: Watch, record: RecordRow | None) -> Decision:
    """With one more look at the evidence; a reading follows, whatever was answered."""
    facts, looked_at = watch.facts, monotonic()
    row = await POWER.find(ha.core.pool, facts.id)
    again = decide(await gather(ha, watch, row, record), ha.config)
    if again.act is not Act.POWER_OFF or row is None:
        return again

    def is_silent() -> bool:
        return watch.last_sign(float("-inf")) < looked_at

    if record is None:
        made = power.new_record(watch, "service:ha", f"silent, and its BMC says {PowerState.ON}")
        await ha.core.commit(RECORDS.insert(made, Nothing()))
        record = Row(made, Nothing())
    tried = _orders(record)
    record = await _keep(ha, record, "peers", sentence(list(watch.peers.values())), FenceState.RUNNING)
    record = await _keep(ha, record, "ordered_off", f"boot {watch.boot_id}", FenceState.RUNNING)
    if not is_silent() or monotonic() - looked_at > DECIDED_SECONDS:
        words = "writing that took too long, or it was heard of meanwhile: nothing was asked of its BMC"
        await _keep(ha, record, "held_back", words, FenceState.RUNNING)
        return Decision(
            Act.WAIT, "held_back", f"host {facts.name}: it is looked at anew before it is ordered off"
        )
    log.warning("host %s is ordered off: boot %s", facts.name, watch.boot_id)
    watch.distrust_power()
    answer = await power.switch_now(ha, watch, row, PowerAction.OFF, tried, is_silent)
    await _keep(ha, record, f"answered_{answer.state}", answer.words, FenceState.RUNNING)
    return again


async def _past_brake(ha: Ha, watch: Watch, limit: int) -> bool:
    """By the database's window, and by this process's own: a clock that jumps opens neither for good."""
    now, config, facts = monotonic(), ha.config, watch.facts
    ha.ordered_off[:] = [each for each in ha.ordered_off if now - each[2] < config.brake_window_seconds]
    own = {h for c, h, _ in ha.ordered_off if c == facts.cluster_id and h != facts.id}
    if len(own) >= limit:
        return False
    wall = utc_now()
    since = wall - timedelta(seconds=config.brake_window_seconds)
    if not await store.book_power_off(
        ha.core.pool, ha.core.orders.token, facts, watch.boot_id, limit, since, wall
    ):
        return False
    ha.ordered_off.append((facts.cluster_id, facts.id, now))
    return True


async def _power_on(ha: Ha, watch: Watch, row: PowerRow, record: RecordRow) -> None:
    """After its death was proven and its VMs were dealt with. What was ordered before is read first, never just repeated: one
    that is still off is ordered on again, some times; then a person looks."""
    tried = len(_ages(record, "ordered_on"))
    if tried:
        reading = await power.read(ha, watch, row)
        if reading.state is not PowerState.OFF:
            ended = FenceState.SUCCEEDED if reading.state is PowerState.ON else FenceState.FAILED
            await _keep(ha, record, str(reading.state), reading.words, ended)
            return
    record = await _keep(ha, record, "ordered_on", "", record.public.state)
    answer = await power.switch(ha, watch, row, PowerAction.ON, tried)
    state = record.public.state
    if answer.state is PowerState.ON:
        state = FenceState.SUCCEEDED
    elif len(_ages(record, "ordered_on")) >= ha.config.on_attempts:
        state = FenceState.FAILED
    await _keep(ha, record, f"answered_{answer.state}", answer.words, state)


async def _close(ha: Ha, watch: Watch, record: RecordRow) -> None:
    if watch.state is LivenessState.DEAD:
        await _keep(ha, record, "left_off", "nobody can switch it on again", FenceState.SUCCEEDED)
    elif watch.boot_id == record.public.boot_id:
        await _keep(ha, record, "lives", "it showed signs of life", FenceState.CANCELLED)
    else:
        await _keep(ha, record, "back", f"boot {watch.boot_id}", FenceState.SUCCEEDED)


async def _keep(ha: Ha, record: RecordRow, step: str, words: str, state: FenceState) -> RecordRow:
    change = RECORDS.update(record, with_step(record.public, step, words, state))
    await ha.core.commit(change)
    return Row(change.document, record.private)


async def say(ha: Ha, host_id: str, sentence: str) -> None:
    """What is being done about it, or why nothing is, for people: announced when it differs. Nothing is said of a host
    whose silence isn't believed yet."""
    row = await store.LIVENESS.find(ha.core.pool, host_id)
    if row is None or row.public.fencing == sentence or row.public.state is LivenessState.UP:
        return
    if sentence:
        log.warning("%s", sentence)
    await ha.core.commit(store.LIVENESS.update(row, replace(row.public, fencing=sentence)))


async def begin(ha: Ha) -> None:
    """Leadership begins: what people switched a while ago still counts."""
    now, wall = monotonic(), utc_now()
    since = wall - timedelta(seconds=ha.config.reboot_quiet_seconds)
    for found in await store.switched_by_hand(ha.core.pool, since):
        age = max(0.0, (wall - found.created_at).total_seconds())
        ha.acted_at[found.host_id] = now - age


@part.every(FORGET_SECONDS)
async def forget(ha: Ha) -> None:
    wall = utc_now()
    await store.forget_power_offs(ha.core.pool, wall - timedelta(days=1))
    for row in await store.old_records(ha.core.pool, wall - timedelta(days=KEEP_DAYS)):
        await ha.core.commit(RECORDS.delete(row))
