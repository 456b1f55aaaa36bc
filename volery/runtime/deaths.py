"""Boots of hosts that have ended by proof, as ha says now: what was ordered from them has ended, what ran there too.

Facts only wake: before anything is ended ha is asked what it holds now, because a proof that was said may have been
voided since. What is noted here is durable; everything that follows from it is looked for again after a crash. A service
that ran something on the host ends it first, then the orders end, so that no operation goes on before the truth is
written.

Who guards what when a proof was wrong: the boot that lives on is given no order any more until ha says that it lives;
what it still runs is under an epoch that was since raised, is told to forget it as soon as it is heard, and can't be
started again by an old order, whose id has ended and whose epoch is too low.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

import asyncpg
import msgspec

from volery.contracts.agent import Outcome
from volery.contracts.base import encode
from volery.contracts.cluster import GetById
from volery.contracts.errors import Kind, Problem, Refused
from volery.contracts.liveness import GET_LIVENESS, LIST_LIVENESS, HostLiveness, LivenessState, Proof
from volery.contracts.operation import ListQuery
from volery.runtime.bus import Bus
from volery.runtime.hear_owners import Said
from volery.runtime.tables import Change, Stale, commit

log = logging.getLogger(__name__)

LOOK_SECONDS = 15.0
"""How often every host is asked about, for facts that were missed; more seldom where there are thousands:"""
LOOK_SECONDS_A_HOST = 0.01
AGAIN_SECONDS = 0.5
PAGE = 200


def host_died(refused: Refused) -> bool:
    """Whether an order ended because the boot of its host that had it, or would have had it, has ended by proof."""
    return refused.details.get("outcome") == str(Outcome.HOST_DIED)


@dataclass(slots=True)
class Deaths:
    bus: Bus
    pool: asyncpg.Pool[asyncpg.Record]
    ended: dict[tuple[str, str], Proof] = field(default_factory=dict)
    """(host, boot) → the proof that it has ended."""
    down: dict[str, Proof] = field(default_factory=dict)
    """Hosts none of whose boots lives, as far as ha knows; what ran there is written down as ended."""
    falling: dict[str, Proof] = field(default_factory=dict)
    """Likewise, but that isn't written down yet."""
    names: dict[str, str] = field(default_factory=dict)
    first: Callable[[], Awaitable[None]] | None = None
    """What ran on hosts under boots that have ended is written down as ended."""
    then: Callable[[], Awaitable[None]] | None = None
    """Orders that those boots had end."""
    waiting: dict[str, None] = field(default_factory=dict)
    """Hosts that ha is to be asked about, in the order in which they were heard of."""
    event: asyncio.Event = field(default_factory=asyncio.Event)

    def has_ended(self, host_id: str, boot_id: str) -> bool:
        return (host_id, boot_id) in self.ended

    def problem(self, host_id: str, what: str, proof: Proof) -> Problem:
        """Why an order for this host has ended."""
        details = f": {proof.details}" if proof.details else ""
        return Problem(
            kind=Kind.UNAVAILABLE,
            message=f"host {self.names.get(host_id, host_id)} died ({proof.kind} at {proof.at:%Y-%m-%d %H:%M:%S} UTC"
            f"{details}) before it said how {what} ended; nothing of it runs there any more",
            details={"host_died": True, "host_id": host_id, "proof_id": proof.id, "proof": str(proof.kind)},
        )

    async def confirmed(self, host_id: str, boot_id: str) -> bool:
        """Whether this boot has ended, as ha says now: for what can't be taken back. Raises Refused when ha can't be asked."""
        said = await self._one(host_id)
        if said is not None:
            await self._note(said)
        return self.has_ended(host_id, boot_id)

    async def heard(self, fact: HostLiveness) -> Sequence[Change]:
        """ha says something new of a host: it is asked again before anything follows from it. From most of what it says
        nothing does."""
        if self._matters(fact):
            self.waiting[fact.id] = None
            self.event.set()
        return ()

    async def heard_together(self, said: Sequence[Said]) -> Sequence[Change]:
        for each in said:
            await self.heard(each.payload)
        return ()

    def _matters(self, said: HostLiveness) -> bool:
        """Whether it tells of a death, or of a life that was believed to have ended."""
        known = said.id in self.falling or said.id in self.down or self.has_ended(said.id, said.boot_id)
        return known or said.proof is not None or bool(said.former) or said.state is LivenessState.DEAD

    async def run(self) -> None:
        """Until cancelled."""
        self.event.set()
        await self._load()
        while True:
            hosts, self.waiting = self.waiting, {}
            try:
                said = [await self._one(host_id) for host_id in hosts] if hosts else await self._all()
            except Refused as refused:
                log.debug("%s: ha can't be asked which hosts died: %s", self.bus.name, refused.message)
                self.waiting = hosts | self.waiting
                said = []
            for liveness in said:
                if liveness is not None:
                    await self._note(liveness)
            if self.ended:
                await self._follow()
            await self._wait()

    async def _wait(self) -> None:
        """Until something was heard; a host that could not be asked about is asked about soon."""
        look_seconds = max(LOOK_SECONDS, LOOK_SECONDS_A_HOST * len(self.names))
        try:
            async with asyncio.timeout(AGAIN_SECONDS if self.waiting else look_seconds):
                await self.event.wait()
        except TimeoutError:
            return
        finally:
            self.event.clear()

    async def _follow(self) -> None:
        if self.first is not None:
            await self.first()
        self.down = dict(self.falling)
        if self.then is not None:
            await self.then()

    async def _load(self) -> None:
        rows = await self.pool.fetch("select host_id, boot_id, proof from host_death")
        self.ended = {
            (row["host_id"], row["boot_id"]): msgspec.json.decode(row["proof"], type=Proof) for row in rows
        }

    async def _one(self, host_id: str) -> HostLiveness | None:
        try:
            return await self.bus.ask(GET_LIVENESS, GetById(id=host_id), again=False)
        except Refused as refused:
            if refused.kind is Kind.NOT_FOUND:
                return None
            raise

    async def _all(self) -> list[HostLiveness]:
        found: list[HostLiveness] = []
        query = ListQuery(limit=PAGE)
        while True:
            page = await self.bus.ask(LIST_LIVENESS, query, again=False)
            found += [msgspec.json.decode(item, type=HostLiveness) for item in page.items]
            if not page.next:
                return found
            query = msgspec.structs.replace(query, page=page.next)

    async def _note(self, said: HostLiveness) -> None:
        """Durable before anything follows from it. A boot that ha says lives has not ended, whatever was said before."""
        self.names[said.id] = said.host_name or said.id
        proof = said.proof
        lives = said.boot_id and (
            proof is None or proof.boot_id != said.boot_id or said.state is LivenessState.UP
        )
        if lives and self.has_ended(said.id, said.boot_id):
            log.warning(
                "host %s: the proof of its death is void, boot %s lives", said.host_name, said.boot_id
            )
            await self._forget(said.id, said.boot_id)
        for ended in (*said.former, *([] if proof is None else [proof])):
            if ended.boot_id and not (lives and ended.boot_id == said.boot_id):
                await self._keep(said.id, ended)
        if not lives and said.state is LivenessState.DEAD and proof is not None:
            self.falling[said.id] = proof
        else:
            self.falling.pop(said.id, None)
            self.down.pop(said.id, None)

    async def _keep(self, host_id: str, proof: Proof) -> None:
        if self.has_ended(host_id, proof.boot_id):
            return
        log.warning("host %s: boot %s has ended by proof %s", self.names[host_id], proof.boot_id, proof.kind)
        await self._write(
            Change(
                """insert into host_death (host_id, boot_id, proof) values ({0}, {1}, {2})
                   on conflict (host_id, boot_id) do nothing""",
                (host_id, proof.boot_id, encode(proof).decode()),
                guarded=False,
            )
        )
        self.ended[host_id, proof.boot_id] = proof

    async def _forget(self, host_id: str, boot_id: str) -> None:
        await self._write(
            Change(
                "delete from host_death where host_id = {0} and boot_id = {1}",
                (host_id, boot_id),
                guarded=False,
            )
        )
        self.ended.pop((host_id, boot_id), None)

    async def _write(self, change: Change) -> None:
        while True:
            try:
                await commit(self.pool, [change])
            except Stale:
                continue
            return
