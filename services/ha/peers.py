"""Peers of a silent host try it: what they find is evidence, kept with the judgement and with what was ordered."""

from __future__ import annotations

import asyncio
import contextlib
import logging

import msgspec
import nats.errors

from services.ha.executors import heard_in
from services.ha.policies.fencing import LONG_SILENCE_SECONDS
from services.ha.policies.peers import FRESH_SECONDS, choose, found_by
from services.ha.state import Ha
from services.ha.watch import Watch
from volery.contracts.agent import SIGNATURE_HEADER
from volery.contracts.base import encode, fill
from volery.contracts.liveness import LivenessState
from volery.contracts.peers import TRY_SUBJECT, HostTried, TryHost
from volery.runtime.bus import ERROR_HEADER
from volery.runtime.clock import monotonic
from volery.runtime.service import Part

log = logging.getLogger(__name__)

part = Part()

LOOK_SECONDS = 0.5
ANSWER_SECONDS = 6.0
"""A peer's own time at a door is four seconds."""


@part.every(LOOK_SECONDS)
async def try_what_is_due(ha: Ha) -> None:
    """Beside everything else, one round per silent host at a time."""
    now = monotonic()
    if not ha.config.try_peers_seconds:
        return
    for host_id, watch in ha.watches.items():
        if not watch.known or not watch.suspected or watch.state is LivenessState.DEAD:
            watch.tried_next = 0.0
            continue
        if now >= watch.tried_next:
            long = now - watch.last_sign(ha.listening_since) > LONG_SILENCE_SECONDS
            watch.tried_next = now + ha.config.try_peers_seconds * (6 if long else 1)
            ha.core.operations.spawn(_round(ha, host_id, watch))


async def _round(ha: Ha, host_id: str, watch: Watch) -> None:
    now, doors = monotonic(), watch.facts.doors
    watch.forget_peers(now - 2 * FRESH_SECONDS)
    heard = {w.facts.id: w for w in heard_in(ha, watch.facts.cluster_id, now) if w is not watch}
    if doors:
        await asyncio.gather(*(_ask(ha, heard[peer], host_id, watch) for peer in choose(host_id, heard)))


async def _ask(ha: Ha, peer: Watch, host_id: str, watch: Watch) -> None:
    """What isn't answered, or refused, is no opinion: a peer of a former release doesn't know the question."""
    ask = TryHost(host_id=peer.facts.id, target_host_id=host_id, doors=watch.facts.doors)
    subject, body, asked_at = fill(TRY_SUBJECT, ask), encode(ask), monotonic()
    try:
        message = await ha.orders.request(
            subject, body, timeout=ANSWER_SECONDS, headers={SIGNATURE_HEADER: ha.sign(subject, body)}
        )
    except (nats.errors.Error, TimeoutError) as error:
        log.info("host %s did not try host %s: %r", peer.facts.name, watch.facts.name, error)
        return
    if message.headers and ERROR_HEADER in message.headers:
        log.info("host %s did not try host %s: %r", peer.facts.name, watch.facts.name, message.data[:300])
        return
    with contextlib.suppress(msgspec.DecodeError):
        found = msgspec.json.decode(message.data, type=HostTried)
        if (found.host_id, found.target_host_id) == (peer.facts.id, host_id):
            watch.hear_peer(peer.facts.id, found_by(asked_at, f"host {peer.facts.name}", found.doors))
