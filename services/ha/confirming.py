"""A person's word that a host is off, or was rebooted: proof of death, refused while there is a sign of life."""

from __future__ import annotations

from services.ha import liveness, store
from services.ha.policies.evidence import DEAD, Confirmed, judge
from services.ha.policies.power import check_confirmed
from services.ha.power import new_record, with_step
from services.ha.state import Ha
from services.ha.store import RECORDS
from services.ha.watch import Watch
from volery.contracts.errors import conflict
from volery.contracts.liveness import HostLiveness
from volery.contracts.power import CONFIRM_HOST_REBOOTED, ConfirmHostRebooted, FenceState
from volery.runtime.bus import Caller
from volery.runtime.clock import monotonic
from volery.runtime.service import Part
from volery.runtime.tables import Nothing

part = Part()


@part.leader_answers(CONFIRM_HOST_REBOOTED)
async def confirm_rebooted(ha: Ha, ask: ConfirmHostRebooted, caller: Caller) -> HostLiveness:
    found = (await store.LIVENESS.get(ha.core.pool, ask.id)).public
    watch = ha.watch(ask.id)
    check_confirmed(
        found.host_name,
        ask.confirm,
        f"what ran on host {found.host_name} is started elsewhere, and runs twice if it isn't off",
    )
    if watch.state is DEAD:
        return found
    record = new_record(watch, caller.principal, ask.reason or "confirmed that it is off or was rebooted")
    record = with_step(record, "confirmed", ask.reason, FenceState.SUCCEEDED)
    audited = RECORDS.insert(record, Nothing())
    while True:
        _check_silent(ha, watch, found.host_name)
        person = Confirmed(monotonic(), watch.boot_id, caller.principal)
        seen = watch.seen(ha.listening_since, monotonic(), person)
        judgement = judge(seen, ha.config, 0.0)
        written = await liveness.conclude(ha, ask.id, watch, seen, judgement, audited, caller=caller)
        if written is not None:
            watch.person = person
            return written
        found = (await store.LIVENESS.get(ha.core.pool, ask.id)).public


def _check_silent(ha: Ha, watch: Watch, name: str) -> None:
    """Raises Refused(conflict) when it was heard of a moment ago, or ha could not have heard it."""
    if not watch.boot_id:
        raise conflict(f"nothing ever ran on host {name} as far as ha knows: there is nothing to confirm")
    needed, now = ha.config.silence_seconds, monotonic()
    sign = watch.last_sign(float("-inf"))
    if now - sign < needed:
        raise conflict(
            f"host {name} showed a sign of life {now - sign:.1f} s ago: it lives. Switch it off first, and confirm when "
            f"it has been silent for {needed:g} s",
            rule="sign_of_life",
        )
    listened = now - ha.listening_since
    if listened < needed:
        raise conflict(
            f"ha listens since {max(listened, 0.0):.1f} s only, so it can't tell whether host {name} lives: confirm again "
            f"in {needed - listened:.0f} s",
            rule="listening",
        )
