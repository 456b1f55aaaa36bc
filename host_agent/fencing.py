"""Runs fence agents against other hosts' BMCs for ha: signed, fresh, from its present leader, one at a time per host.

Nothing is journaled but the leader's token: whoever doesn't hear an answer asks for the status. An ask that comes again
while it is remembered gets its first answer, so that a repeat on the bus switches nothing twice.
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
from collections import OrderedDict
from collections.abc import Awaitable, Mapping
from typing import Final, Protocol

import msgspec

from host_agent.clock import BootClock
from host_agent.journal import Journal
from host_agent.rules import too_old
from volery.contracts.agent import SIGNATURE_HEADER
from volery.contracts.errors import Kind, Refused, conflict, invalid, unavailable
from volery.contracts.fencing import AskPower, FenceDevice, PowerAction, PowerAnswer
from volery.fencing import running
from volery.runtime.signing import Verifier

log = logging.getLogger(__name__)

OWNER: Final = "ha"
"""Who alone may ask."""
AT_ONCE: Final = 8
REMEMBERED: Final = 256

_ask = msgspec.json.Decoder(AskPower)


class Run(Protocol):
    """How an agent is run: `volery.fencing.running.run`."""

    def __call__(
        self, action: PowerAction, device: FenceDevice, secrets: Mapping[str, str], *, ask_id: str
    ) -> Awaitable[PowerAnswer]: ...


class Executor:
    """This host as one that switches others. `hear` answers when the agent has ended."""

    def __init__(
        self,
        host_id: str,
        journal: Journal,
        verifier: Verifier,
        clock: BootClock,
        run: Run = running.run,
        at_once: int = AT_ONCE,
    ) -> None:
        self._host_id = host_id
        self._journal = journal
        self._verifier = verifier
        self._clock = clock
        self._run = run
        self._at_once = at_once
        self._running: dict[str, tuple[str, asyncio.Task[PowerAnswer]]] = {}
        """By target: which ask, and its work."""
        self._answered: OrderedDict[str, PowerAnswer] = OrderedDict()

    def trust(self, verifier: Verifier) -> None:
        """Whose asks are heard from now on: ha's key may be renewed."""
        self._verifier = verifier

    async def hear(self, subject: str, payload: bytes, headers: Mapping[str, str] | None) -> PowerAnswer:
        """The answer to an ask that came. Raises Refused when nothing was done."""
        try:
            ask = _ask.decode(payload)
        except msgspec.DecodeError as error:
            # msgspec names the field and the type, never the value.
            raise invalid(f"this is no question about power: {error}") from None
        try:
            self._check_sender(ask, subject, payload, (headers or {}).get(SIGNATURE_HEADER, ""))
            return await self._answer(ask)
        except Refused as problem:
            log.warning("%s: %s", _name(ask), problem.message)
            raise

    def _check_sender(self, ask: AskPower, subject: str, payload: bytes, signature: str) -> None:
        if self._verifier.owner_of(subject, payload, signature) != OWNER:
            raise Refused(
                Kind.FORBIDDEN,
                f"{_name(ask)} is not signed by {OWNER} as this host knows it: nothing was done; a host that was enrolled"
                f" before {OWNER} had a key gets it when its agent is started again",
            )
        if ask.host_id != self._host_id:
            raise invalid(f"{_name(ask)} is for another executor, host {ask.host_id}")

    async def _answer(self, ask: AskPower) -> PowerAnswer:
        if (known := self._answered.get(ask.ask_id)) is not None:
            return known
        at_work = self._running.get(ask.target_host_id)
        if at_work is not None and at_work[0] == ask.ask_id:
            return await asyncio.shield(at_work[1])
        self._check(ask)
        # In the dictionary before anything is awaited, so that there is never a second for this target.
        task = asyncio.create_task(self._carry_out(ask), name=f"power {ask.target_host_id}")
        self._running[ask.target_host_id] = (ask.ask_id, task)
        try:
            # Not cut off when whoever waits for it goes away.
            return await asyncio.shield(task)
        finally:
            if not task.done():
                task.add_done_callback(lambda _: self._running.pop(ask.target_host_id, None))
            else:
                self._running.pop(ask.target_host_id, None)

    def _check(self, ask: AskPower) -> None:
        if ask.target_host_id == self._host_id or ask.target_boot_id == self._clock.boot_id:
            raise conflict(
                f"{_name(ask)} was sent to that host itself: a host doesn't judge its own death; ask another",
                rule="self",
            )
        if (age := too_old(ask.beat_seq, ask.ttl_ms, self._clock.beat())) is not None:
            raise Refused(
                Kind.STALE, f"{_name(ask)} {age}: look at the evidence again, then ask with the newest beat"
            )
        at_work = self._running.get(ask.target_host_id)
        if at_work is not None:
            raise conflict(
                f"{_name(ask)}: this host is asking that BMC already (ask {at_work[0]}); wait for its answer",
                rule="one_at_a_time",
            )
        if len(self._running) >= self._at_once:
            raise Refused(
                Kind.EXHAUSTED,
                f"{_name(ask)}: this host runs {self._at_once} fence agents already; ask another host, or again later",
            )

    async def _carry_out(self, ask: AskPower) -> PowerAnswer:
        try:
            highest = await self._journal.see_token(OWNER, ask.fencing_token)
        except sqlite3.Error as error:
            raise unavailable(f"this host's journal can't be written ({error}): nothing was done") from error
        if ask.fencing_token < highest:
            raise Refused(
                Kind.STALE,
                f"{_name(ask)} comes from a former leader of {OWNER} (token {ask.fencing_token}, the host has seen"
                f" {highest}): the present leader decides",
                fencing_token=highest,
            )
        # The disk may have taken its time.
        if (age := too_old(ask.beat_seq, ask.ttl_ms, self._clock.beat())) is not None:
            raise Refused(Kind.STALE, f"{_name(ask)} {age}: look at the evidence again")
        log.info("%s begins, by %s", _name(ask), ask.device.agent)
        answer = await self._run(ask.action, ask.device, ask.secrets, ask_id=ask.ask_id)
        log.info("%s ended: %s, %s", _name(ask), answer.state, answer.words or "without a word")
        self._answered[ask.ask_id] = answer
        while len(self._answered) > REMEMBERED:
            self._answered.popitem(last=False)
        return answer


def _name(ask: AskPower) -> str:
    return f"power {ask.action.value} for host {ask.target_host_id} (ask {ask.ask_id})"
