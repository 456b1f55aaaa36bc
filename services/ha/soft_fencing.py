"""Soft fencing: how it is set and tested, and the restart of a silent host's agent beside everything else."""

from __future__ import annotations

import logging
import re
from typing import Any

from msgspec.structs import replace

from services.ha import power, ssh, store
from services.ha.policies.soft_fencing import Soft, Tried
from services.ha.soft_fence_store import SOFT_FENCES, SoftFencePrivate
from services.ha.state import Ha
from services.ha.store import RECORDS
from services.ha.watch import HostFacts, Watch
from volery.contracts.base import Done
from volery.contracts.cluster import DeleteById, GetById
from volery.contracts.errors import Refused, conflict, invalid, not_found
from volery.contracts.operation import ListQuery
from volery.contracts.power import FenceState
from volery.contracts.soft_fence import (
    DELETE_SOFT_FENCE,
    GET_SOFT_FENCE,
    LIST_SOFT_FENCES,
    SET_SOFT_FENCE,
    TEST_SOFT_FENCE,
    SetSoftFence,
    SoftFence,
    TestSoftFence,
)
from volery.runtime import checks
from volery.runtime.bus import Caller
from volery.runtime.clock import monotonic, utc_now
from volery.runtime.pages import page
from volery.runtime.service import Part
from volery.runtime.tables import Change, Nothing, Row, Stale, Taken

log = logging.getLogger(__name__)

part = Part()

SoftRow = Row[SoftFence, SoftFencePrivate]

_ADDRESS = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.:_-]{0,252}[A-Za-z0-9])?")
_UNIT = re.compile(r"[A-Za-z0-9][A-Za-z0-9@_.-]{0,99}")
_USERNAME = re.compile(r"[a-z_][a-z0-9_-]{0,31}")


@part.answers(GET_SOFT_FENCE)
async def get_soft(ha: Ha, ask: GetById, caller: Caller) -> Any:
    return await SOFT_FENCES.raw(ha.core.pool, ask.id)


@part.answers(LIST_SOFT_FENCES)
async def list_soft(ha: Ha, ask: ListQuery, caller: Caller) -> Any:
    return await page(ha.core.pool, SOFT_FENCES, ask)


@part.answers(SET_SOFT_FENCE)
async def set_soft(ha: Ha, ask: SetSoftFence, caller: Caller) -> SoftFence:
    _check(ask)
    try:
        host_key = ssh.pinned(ask.host_key)
    except ValueError as error:
        raise invalid(
            f"host_key is no public key ({error}): give the line of /etc/ssh/ssh_host_ed25519_key.pub on the host",
            rule="host_key",
        ) from None
    host = await store.host(ha.core.pool, ask.id)
    if host is None:
        raise not_found("host", ask.id)
    if not ha.vault.seals:
        raise conflict(
            "ha has no key to encrypt its SSH key with: set VOLERY_HA_KEY_FILE to a file that only it may read"
        )
    while True:
        try:
            return await _set(ha, host, ask, host_key, caller)
        except (Stale, Taken):
            continue


def _check(ask: SetSoftFence) -> None:
    """Raises Refused(invalid)."""
    if not _ADDRESS.fullmatch(ask.address):
        raise invalid(f"address is a host name or an IP address, not {ask.address[:80]!r}", rule="address")
    if not _USERNAME.fullmatch(ask.username):
        raise invalid(f"username is a user of the host, not {ask.username[:80]!r}", rule="username")
    if not _UNIT.fullmatch(ask.unit):
        raise invalid(f"unit is the name of a systemd unit, not {ask.unit[:80]!r}", rule="unit")
    checks.between(ask.port, 1, 65535, "port")


async def _set(ha: Ha, host: HostFacts, ask: SetSoftFence, host_key: str, caller: Caller) -> SoftFence:
    row, now = await SOFT_FENCES.find(ha.core.pool, ask.id), utc_now()
    if row is not None:
        checks.revision(row.public, ask.if_revision, "soft fencing")
    comment = f"volery-ha@{host.name}"
    if row is None or ask.new_key:
        private, public = ssh.new_key(comment)
    else:
        private = ha.vault.open(row.private.key)
        public = ssh.public_half(private, comment)
    made = SoftFence(
        id=ask.id,
        revision=1 if row is None else row.public.revision,
        created_at=now if row is None else row.public.created_at,
        updated_at=now,
        host_name=host.name,
        cluster_id=host.cluster_id,
        enabled=ask.enabled,
        address=ask.address,
        port=ask.port,
        username=ask.username,
        unit=ask.unit,
        host_key=host_key,
        authorized_key=f'restrict,command="{_command(ask.unit)}" {public}',
    )
    kept = SoftFencePrivate(key=ha.vault.seal(private))
    change = SOFT_FENCES.insert(made, kept) if row is None else SOFT_FENCES.update(row, made, kept)
    await ha.core.commit(change, caller=caller, answer=change.document)
    log.info("soft fencing of host %s was set by %s", host.name, caller.principal)
    found: SoftFence = change.document
    return found


@part.answers(DELETE_SOFT_FENCE)
async def delete_soft(ha: Ha, ask: DeleteById, caller: Caller) -> Done:
    while True:
        row = await SOFT_FENCES.get(ha.core.pool, ask.id)
        checks.revision(row.public, ask.if_revision, "soft fencing")
        try:
            await ha.core.commit(SOFT_FENCES.delete(row), caller=caller, answer=Done())
        except Stale:
            continue
        return Done()


async def host_gone(ha: Ha, host_id: str) -> list[Change]:
    row = await SOFT_FENCES.find(ha.core.pool, host_id)
    return [] if row is None else [SOFT_FENCES.delete(row)]


@part.answers(TEST_SOFT_FENCE)
async def test_soft(ha: Ha, ask: TestSoftFence, caller: Caller) -> SoftFence:
    row = await SOFT_FENCES.get(ha.core.pool, ask.id)
    said = await ssh.log_in(_place(row), ha.vault.open(row.private.key), ha.config.soft_fence_seconds)
    while True:
        words = said.words or "ha can log in"
        new = replace(row.public, tested_at=utc_now(), test_passed=said.worked, test_words=words)
        change = SOFT_FENCES.update(row, new)
        try:
            await ha.core.commit(change, caller=caller, answer=change.document)
        except Stale:
            row = await SOFT_FENCES.get(ha.core.pool, ask.id)
            continue
        found: SoftFence = change.document
        return found


def _command(unit: str) -> str:
    return f"systemctl restart {unit}"


def _place(row: SoftRow) -> ssh.Place:
    at = row.public
    return ssh.Place(at.address, at.port, at.username, at.host_key)


async def gather(ha: Ha, watch: Watch, now: float) -> Soft:
    """How it is with one host."""
    if not ha.config.soft_fence_seconds:
        return Soft()
    row = await SOFT_FENCES.find(ha.core.pool, watch.facts.id)
    tried = watch.soft
    return Soft(
        enabled=row is not None and row.public.enabled,
        running=watch.soft_running,
        begun_age=None if watch.soft_begun is None else now - watch.soft_begun,
        worked_age=now - tried.at if tried is not None and tried.worked else None,
    )


def begin(ha: Ha, watch: Watch) -> None:
    """Beside whatever else is done about the host: no reading and no proof waits for it."""
    watch.soft_running, watch.soft_begun = True, monotonic()
    ha.core.operations.spawn(_restart(ha, watch))


async def _restart(ha: Ha, watch: Watch) -> None:
    """To its end, which is kept as evidence and as a record."""
    try:
        row = await SOFT_FENCES.get(ha.core.pool, watch.facts.id)
        command, boot_id = _command(row.public.unit), watch.boot_id
        record = power.new_record(watch, "service:ha", "silent: its agent is restarted over SSH")
        log.warning("host %s is silent; its agent is restarted over SSH", watch.facts.name)
        private = ha.vault.open(row.private.key)
        said = await ssh.restart(_place(row), private, command, ha.config.soft_fence_seconds)
        if watch.boot_id == boot_id:
            watch.soft = Tried(monotonic(), said.worked, said.words)
        log.warning("host %s: soft fencing: %s", watch.facts.name, said.words)
        state = FenceState.SUCCEEDED if said.worked else FenceState.FAILED
        ended = power.with_step(record, "soft_fence", said.words, state)
        await ha.core.commit(RECORDS.insert(ended, Nothing()))
    except Refused as refused:
        log.warning("host %s: its agent can't be restarted over SSH: %s", watch.facts.name, refused.message)
    finally:
        watch.soft_running = False
