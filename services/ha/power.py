"""Power management of hosts: how it is set, tested, and used by hand; and what is asked of its devices."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

from msgspec import UNSET
from msgspec.structs import replace

from services.ha import executors, kdump, store
from services.ha.policies import kdump as rules_of_kdump
from services.ha.policies import power as rules
from services.ha.policies.evidence import Reading
from services.ha.state import Ha
from services.ha.store import POWER, RECORDS, PowerPrivate
from services.ha.watch import HostFacts, Watch
from volery.contracts.base import Done
from volery.contracts.cluster import DeleteById, GetById
from volery.contracts.errors import Kind, Refused, conflict, invalid, not_found
from volery.contracts.fencing import FenceDevice, PowerAction, PowerAnswer, PowerState
from volery.contracts.ids import new_id
from volery.contracts.operation import ListQuery
from volery.contracts.power import (
    DELETE_POWER_MANAGEMENT,
    GET_POWER_MANAGEMENT,
    LIST_POWER_MANAGEMENT,
    SET_POWER_MANAGEMENT,
    SWITCH_POWER,
    TEST_POWER_MANAGEMENT,
    FenceRecord,
    FenceState,
    FenceStep,
    Identity,
    NewFenceDevice,
    PowerManagement,
    PowerSwitched,
    SetPowerManagement,
    SwitchPower,
    TestPowerManagement,
)
from volery.fencing import rules as agent_rules
from volery.fencing.catalog import CATALOG
from volery.runtime.bus import Caller
from volery.runtime.clock import monotonic, utc_now
from volery.runtime.pages import page
from volery.runtime.service import Part
from volery.runtime.tables import Change, Nothing, Row, Stale, Taken

log = logging.getLogger(__name__)

part = Part()

TEST_LOOK_SECONDS = 1.0
IDENTITY_SECONDS = 60.0
"""A reading is trusted when its BMC said whose it is within this: a cable can be swapped any day."""
FAILED_SHARE = 0.1
NOT_ASKED = "nothing was asked of its BMC: what had been decided no longer held"

PowerRow = Row[PowerManagement, PowerPrivate]


@part.answers(GET_POWER_MANAGEMENT)
async def get_power(ha: Ha, ask: GetById, caller: Caller) -> Any:
    return await POWER.raw(ha.core.pool, ask.id)


@part.answers(LIST_POWER_MANAGEMENT)
async def list_power(ha: Ha, ask: ListQuery, caller: Caller) -> Any:
    return await page(ha.core.pool, POWER, ask)


@part.answers(SET_POWER_MANAGEMENT)
async def set_power(ha: Ha, ask: SetPowerManagement, caller: Caller) -> Any:
    while True:
        try:
            return await _set_power(ha, ask, caller)
        except (Stale, Taken):
            continue


async def _set_power(ha: Ha, ask: SetPowerManagement, caller: Caller) -> Any:
    host = await _host(ha, ask.id)
    row = await POWER.find(ha.core.pool, ask.id)
    _check_revision(ask.if_revision, row, host)
    devices = tuple(rules.device_of(new) for new in ask.devices)
    rules.check_devices(devices)
    agents = await store.fence_agents_in(ha.core.pool, host.cluster_id)
    old = list(zip(row.public.devices, row.private.secrets, strict=True)) if row is not None else []
    sealed = tuple(
        [
            await _sealed(ha, new, device, old, agents)
            for new, device in zip(ask.devices, devices, strict=True)
        ]
    )
    addresses = rules_of_kdump.check_addresses(
        ask.kdump_addresses, proves=ask.kdump_proves, taken=await kdump.taken(ha, ask.id)
    )
    now = utc_now()
    made = PowerManagement(
        id=ask.id,
        revision=1 if row is None else row.public.revision,
        created_at=now if row is None else row.public.created_at,
        updated_at=now,
        host_name=host.name,
        cluster_id=host.cluster_id,
        enabled=ask.enabled,
        together=ask.together,
        devices=devices,
        kdump_addresses=addresses,
        kdump_proves=ask.kdump_proves,
    )
    private = PowerPrivate(secrets=sealed)
    change = POWER.insert(made, private) if row is None else POWER.update(row, made, private)
    await ha.core.commit(change, caller=caller, answer=change.document)
    log.info("power management of host %s was set by %s", host.name, caller.principal)
    return change.document


def _check_revision(wanted: int, row: PowerRow | None, host: HostFacts) -> None:
    current = row.public.revision if row is not None else 0
    if wanted and wanted != current:
        raise Refused(
            Kind.STALE,
            f"the power management of host {host.name} is at revision {current}, not {wanted}: get it again",
            revision=current,
        )


async def _sealed(
    ha: Ha,
    new: NewFenceDevice,
    device: FenceDevice,
    old: Sequence[tuple[FenceDevice, dict[str, str]]],
    agents: set[str],
) -> dict[str, str]:
    """The device's secrets as they are kept. Raises Refused for a device that can't work."""
    kept = rules.secrets_for(new, device, old)
    if kept is not None:
        secrets = {name: ha.vault.open(text) for name, text in kept.items()}
    else:
        assert new.secrets is not UNSET
        secrets = dict(new.secrets)
    await _check_device(device, secrets, agents)
    if secrets and not ha.vault.seals:
        raise conflict(
            "ha has no key to encrypt the BMC's password with: set VOLERY_HA_KEY_FILE to a file that only it may read"
        )
    return {name: ha.vault.seal(text) for name, text in secrets.items()}


async def _check_device(device: FenceDevice, secrets: dict[str, str], agents: set[str]) -> None:
    """As strictly as this machine can: an agent that isn't installed here is checked by the host that runs it. `agents`
    are what the cluster's hosts have, as far as they say."""
    agent_rules.check_frame(device)
    try:
        await CATALOG.check_device(device, secrets)
    except Refused as refused:
        if refused.kind is not Kind.UNAVAILABLE:
            raise
        if agents and device.agent not in agents:
            meant = agent_rules.near(device.agent, agents)
            hint = f"did you mean {' or '.join(meant)}?" if meant else "install it on the cluster's hosts"
            raise invalid(
                f"no host of the cluster has {device.agent}: {hint}", rule="agent", near=meant
            ) from None


@part.answers(DELETE_POWER_MANAGEMENT)
async def delete_power(ha: Ha, ask: DeleteById, caller: Caller) -> Done:
    while True:
        row = await POWER.get(ha.core.pool, ask.id)
        _check_revision(ask.if_revision, row, await _host(ha, ask.id))
        try:
            await ha.core.commit(POWER.delete(row), caller=caller, answer=Done())
        except Stale:
            continue
        return Done()


@part.leader_answers(TEST_POWER_MANAGEMENT)
async def test_power(ha: Ha, ask: TestPowerManagement, caller: Caller) -> PowerManagement:
    row = await POWER.get(ha.core.pool, ask.id)
    return await test(ha, row)


@part.every(TEST_LOOK_SECONDS)
async def test_what_is_due(ha: Ha) -> None:
    now, between = utc_now(), timedelta(seconds=ha.config.test_seconds)
    for row in await store.untested_power(ha.core.pool, now - between, now - between * FAILED_SHARE):
        if ha.listed and row.id in ha.watches:
            await test(ha, row)


async def test(ha: Ha, row: PowerRow) -> PowerManagement:
    """Ask every device whose it is and for its power. What it came to is written, and announced when it differs."""
    watch = ha.watch(row.id)
    async with ha.at_power[row.id]:
        identities = await _each(ha, watch, row, PowerAction.IDENTITY)
        states = await _each(ha, watch, row, PowerAction.STATUS)
    identity = rules.identity_of(identities, watch.facts.hardware_uuid)
    state = rules.state_of([a.state for a in states], together=row.public.together)
    said = [rules.identity_words(identity, identities, watch.facts.hardware_uuid)]
    said += [a.words for a in states if a.state is PowerState.UNKNOWN]
    asked = all(a.state is not PowerState.UNKNOWN for a in states)
    now = utc_now()
    new = replace(
        row.public,
        identity=identity,
        identity_checked_at=now if identity is Identity.CHECKED else row.public.identity_checked_at,
        power=state,
        tested_at=now,
        test_passed=asked and identity is Identity.CHECKED,
        test_words="; ".join(dict.fromkeys(word for word in said if word)),
    )
    if not new.test_passed and row.public.test_passed:
        log.warning("power management of host %s fails its test: %s", new.host_name, new.test_words)
    try:
        await ha.core.commit(POWER.update(row, new))
    except Stale:
        return (await POWER.get(ha.core.pool, row.id)).public
    return replace(new, revision=row.public.revision + 1)


def secrets_of(ha: Ha, row: PowerRow) -> list[dict[str, str]]:
    """Raises Refused(unavailable) when the key file is another one."""
    return [{name: ha.vault.open(text) for name, text in each.items()} for each in row.private.secrets]


async def _each(ha: Ha, watch: Watch, row: PowerRow, action: PowerAction) -> list[PowerAnswer]:
    """Every device's answer, in order."""
    secrets = secrets_of(ha, row)
    asked = (
        executors.run(ha, watch, action, device, secret)
        for device, secret in zip(row.public.devices, secrets, strict=True)
    )
    return [answer for answer, _ in await asyncio.gather(*asked)]


async def read(ha: Ha, watch: Watch, row: PowerRow) -> Reading:
    """The state of a machine, by a BMC that has just said that it is this machine's."""
    async with ha.at_power[row.id]:
        try:
            return await read_now(ha, watch, row)
        finally:
            ha.read_at[row.id] = monotonic()


async def read_now(ha: Ha, watch: Watch, row: PowerRow) -> Reading:
    """The same, by whoever holds the host's power already."""
    trusted = await _identified(ha, watch, row)
    asked_at = monotonic()
    if trusted is None:
        return Reading(asked_at, PowerState.UNKNOWN, False, "", "its BMC belongs to another machine")
    states: list[PowerState] = []
    words: list[str] = []
    by = ""
    for device, secrets in zip(row.public.devices, secrets_of(ha, row), strict=True):
        answer, asked = await executors.run(ha, watch, PowerAction.STATUS, device, secrets)
        states.append(answer.state)
        words.append(answer.words)
        by = asked or by
        if answer.state is not PowerState.UNKNOWN and not row.public.together:
            break
    state = rules.state_of(states, together=row.public.together)
    return Reading(asked_at, state, trusted, by, "; ".join(w for w in words if w))


async def _identified(ha: Ha, watch: Watch, row: PowerRow) -> bool | None:
    """Whether every device says that it is this machine's; None when one says that it is another's."""
    known = row.public.identity is Identity.CHECKED
    if known and monotonic() - ha.identified_at.get(row.id, float("-inf")) < IDENTITY_SECONDS:
        return True
    identity = rules.identity_of(await _each(ha, watch, row, PowerAction.IDENTITY), watch.facts.hardware_uuid)
    if identity is Identity.CHECKED:
        ha.identified_at[row.id] = monotonic()
    elif identity is Identity.MISMATCH:
        watch.distrust_power()
        ha.identified_at.pop(row.id, None)
    if identity is not row.public.identity and identity is not Identity.UNCHECKED:
        now = utc_now()
        words = "its BMC belongs to another machine now" if identity is Identity.MISMATCH else ""
        checked_at = now if identity is Identity.CHECKED else row.public.identity_checked_at
        changed = replace(
            row.public,
            identity=identity,
            identity_checked_at=checked_at,
            test_passed=False,
            test_words=words or row.public.test_words,
        )
        await ha.core.commit(POWER.update(row, changed))
    return None if identity is Identity.MISMATCH else identity is Identity.CHECKED


async def switch(ha: Ha, watch: Watch, row: PowerRow, action: PowerAction, tried: int = 0) -> PowerAnswer:
    """Off or on, once, by every device (together) or the first that can. Whoever gets no clear answer reads the state."""
    async with ha.at_power[row.id]:
        return await switch_now(ha, watch, row, action, tried)


async def switch_now(
    ha: Ha,
    watch: Watch,
    row: PowerRow,
    action: PowerAction,
    tried: int = 0,
    may: Callable[[], bool] = lambda: True,
) -> PowerAnswer:
    """The same, by whoever holds the host's power already, after so many tries. `may` is asked before each device that is
    only a way round the one before: a device can take a minute to fail, and what was decided then may be wrong by now."""
    assert action in (PowerAction.ON, PowerAction.OFF)
    ha.identified_at.pop(row.id, None)
    ways = list(zip(row.public.devices, secrets_of(ha, row), strict=True))
    answers: list[PowerAnswer] = []
    for device, secrets in ways if row.public.together else rules.in_turn(ways, tried):
        if not (row.public.together and answers) and not may():
            answers.append(PowerAnswer(ask_id="", action=action, words=NOT_ASKED))
            break
        answer, by = await executors.run(ha, watch, action, device, secrets)
        answers.append(answer)
        if row.public.together or not by:
            continue
        if answer.exit_code == 0:
            break
        # What it did isn't known: it is asked before another way is taken, never told again.
        seen, _ = await executors.run(ha, watch, PowerAction.STATUS, device, secrets)
        if rules.is_over(answer, seen):
            answers.append(seen)
            break
    ha.read_at.pop(row.id, None)
    state = rules.state_of([a.state for a in answers], together=row.public.together)
    words = "; ".join(dict.fromkeys(a.words for a in answers if a.words))
    return PowerAnswer(ask_id="", action=action, state=state, words=words)


def lied(row: PowerRow) -> Change:
    """Its BMC said off while the host lived: nothing that it says counts until a person has looked."""
    words = "it said off while the host showed signs of life: look at it, then set it anew"
    return POWER.update(
        row,
        replace(row.public, enabled=False, identity=Identity.UNCHECKED, test_passed=False, test_words=words),
    )


@part.leader_answers(SWITCH_POWER)
async def switch_by_hand(ha: Ha, ask: SwitchPower, caller: Caller) -> PowerSwitched:
    row = await POWER.get(ha.core.pool, ask.id)
    host = await _host(ha, ask.id)
    watch = ha.watch(ask.id)
    if ask.action in (PowerAction.STATUS, PowerAction.IDENTITY):
        reading = await read(ha, watch, row)
        watch.hear_power(reading, ha.listening_since)
        return PowerSwitched(id=ask.id, action=ask.action, state=reading.state, words=reading.words)
    if ha.at_power[ask.id].locked():
        raise conflict(f"the power of host {host.name} is being switched or read; ask again in a moment")
    if ask.action is PowerAction.OFF:
        if rules.needs_confirmation(host.status):
            rules.check_confirmed(
                host.name, ask.confirm, f"switching host {host.name} off ends the VMs that run on it"
            )
        if executors.runs_here(watch):
            raise conflict(f"host {host.name} is the machine on which ha runs: switch it off at itself")
    acted_at = ha.acted_at.get(ask.id)
    age = None if acted_at is None else monotonic() - acted_at
    rules.check_quiet(host.name, age, ha.config.switch_quiet_seconds)
    ha.acted_at[ask.id] = monotonic()
    record = new_record(watch, caller.principal, ask.reason or f"switched {ask.action} by hand")
    await ha.core.commit(RECORDS.insert(record, Nothing()))
    answer = await switch(ha, watch, row, ask.action)
    switched = PowerSwitched(id=ask.id, action=ask.action, state=answer.state, words=answer.words)
    wanted = PowerState.OFF if ask.action is PowerAction.OFF else PowerState.ON
    ended = with_step(
        record,
        f"ordered_{ask.action}",
        answer.words,
        FenceState.SUCCEEDED if answer.state is wanted else FenceState.FAILED,
    )
    log.warning("host %s: power %s by %s: %s", host.name, ask.action, caller.principal, answer.state)
    change = RECORDS.update(Row(record, Nothing()), ended)
    await ha.core.commit(change, caller=caller, answer=switched)
    return switched


def new_record(watch: Watch, by: str, reason: str) -> FenceRecord:
    now = utc_now()
    return FenceRecord(
        id=new_id(),
        revision=1,
        created_at=now,
        updated_at=now,
        host_id=watch.facts.id,
        host_name=watch.facts.name,
        cluster_id=watch.facts.cluster_id,
        boot_id=watch.boot_id,
        reason=reason,
        requested_by=by,
    )


MOST_STEPS = 40


def with_step(record: FenceRecord, step: str, words: str, state: FenceState) -> FenceRecord:
    now = utc_now()
    ended = state in (FenceState.SUCCEEDED, FenceState.FAILED, FenceState.CANCELLED)
    steps = (*record.steps, FenceStep(at=now, step=step, words=words))[-MOST_STEPS:]
    return replace(record, state=state, steps=steps, ended_at=now if ended else None)


async def _host(ha: Ha, host_id: str) -> HostFacts:
    found = await store.host(ha.core.pool, host_id)
    if found is None:
        raise not_found("host", host_id)
    return found
