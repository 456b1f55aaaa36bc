"""After a restore of an older PostgreSQL: no operation begins or goes on until every host has reported.

What the hosts say is newer than what the tables say. Each owner that hears hosts waits for all of them, or for a
person who says that a host is dead. That PostgreSQL is older is known from a stream that is ahead of the log, or from a
host that was told more to be committed than the tables know; an owner whose stream is lost has no such proof and no
proof of the contrary, and is in doubt for some seconds: it begins nothing until the hosts could say what they know.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

import asyncpg
import nats.errors

from volery.contracts.errors import Kind, Refused, invalid
from volery.contracts.ids import new_id
from volery.runtime.clock import monotonic

log = logging.getLogger(__name__)

RAISE = 1_000_000
"""More orders for one object, and more placements of one VM, than there are between a backup and its restore."""

ASK_SECONDS = 5.0
"""Between two times that hosts are asked for the report that a quarantine waits for."""
DOUBT_SECONDS = 10.0
"""The longest doubt: hosts that are well have come back to the bus and have reported by then; one that is off never does."""
DOUBT_ASK_SECONDS = 1.0
RAISE_PER_FACT = 1000
"""More of them than there are for each fact that was said since an earlier restore of the same backup."""


@dataclass(slots=True)
class Quarantine:
    owner: str
    pool: asyncpg.Pool[asyncpg.Record]
    reason: str = ""
    pending: set[str] = field(default_factory=set)
    restored: set[str] = field(default_factory=set)
    """Operations that were under way in a backup that was restored, also after the quarantine that followed."""
    base: int = 0
    """Grows with every restore."""
    on_end: list[Callable[[], None]] = field(default_factory=list)
    unheard: set[str] = field(default_factory=set)
    """Hosts whose report would end the doubt."""
    doubt_ends: float = 0.0
    """On the monotonic clock; in memory only, since what begins it is a leader's first look at its stream."""
    ask_id: str = field(default_factory=new_id)
    """What hosts are asked: a report that doesn't answer it may be from before the restore, out of the hosts' stream."""
    asked_at: dict[str, float] = field(default_factory=dict)
    spoke: set[str] = field(default_factory=set)
    """Hosts that reported without having been asked: they are there, and are asked now."""
    due: asyncio.Event = field(default_factory=asyncio.Event)
    """Hosts are to be asked now: those that spoke, or else all that are waited for."""

    @property
    def in_doubt(self) -> bool:
        return bool(self.unheard) and not self.reason and monotonic() < self.doubt_ends

    @property
    def holds(self) -> str:
        """Why nothing is begun, ended or moved now: "" when there is no reason."""
        return self.reason or ("its stream was lost, and hosts are asked first" if self.in_doubt else "")

    async def load(self) -> None:
        """What a former leader began. Reports that were made until now are no answer."""
        self.ask_id = new_id()
        self.due.set()
        self.reason = await self.pool.fetchval("select reason from quarantine") or ""
        rows = await self.pool.fetch("select host_id from quarantine_host")
        self.pending = {row["host_id"] for row in rows}
        self.base = await self.pool.fetchval("select base from restore_base")
        rows = await self.pool.fetch("select operation_id from restored_operation")
        self.restored = {row["operation_id"] for row in rows}

    async def begin(self, reason: str, position: int = 0, host_id: str = "") -> None:
        """Durable before anything else happens. Waits for every host that was ever heard, and for `host_id`, which the
        tables may not know. `position` is where the stream, or a host's journal, stands: it grows from restore to restore,
        also when the same backup is restored twice."""
        await self.pool.execute(
            """with begun as (
                   insert into quarantine (reason) values ($1) on conflict (single) do nothing returning 1
               ), raised as (
                   update restore_base set base = greatest(base + $2, $2 + $3) where exists (select 1 from begun)
               ), under_way as (
                   insert into restored_operation select id from operation
                   where state in ('pending', 'running', 'cancelling')
                      or (state = 'failed' and position('"outcome_pending":true' in doc) > 0)
                   on conflict do nothing
               ) insert into quarantine_host select host_id from heard_host on conflict do nothing""",
            reason,
            RAISE,
            position * RAISE_PER_FACT,
        )
        await self.load()
        if host_id:
            await self._wait_for(host_id)
        self.unheard.clear()
        log.error("%s is in quarantine: %s; waits for %d hosts", self.owner, reason, len(self.pending))
        await self._end_if_done()

    async def contradicted(self, host_id: str, reason: str) -> None:
        """A host was told more than the tables know."""
        if not self.reason:
            await self.begin(reason, host_id=host_id)
        else:
            await self._wait_for(host_id)

    async def _wait_for(self, host_id: str) -> None:
        if host_id not in self.pending:
            sql = "insert into quarantine_host (host_id) values ($1) on conflict do nothing"
            await self.pool.execute(sql, host_id)
            self.pending.add(host_id)
            self.due.set()

    async def begin_doubt(self) -> None:
        """The owner's stream is lost: any host that was ever heard may know better than the tables."""
        rows = await self.pool.fetch("select host_id from heard_host")
        self.unheard = {row["host_id"] for row in rows}
        self.doubt_ends = monotonic() + DOUBT_SECONDS
        self.due.set()
        if self.in_doubt:
            log.warning("%s has lost its stream: asks %d hosts for a report first", self.owner, len(rows))

    def _end_doubt(self) -> None:
        if self.unheard:
            log.warning("%s goes on without having heard %s", self.owner, ", ".join(sorted(self.unheard)))
            self.unheard.clear()
        if not self.reason:
            for tell in self.on_end:
                tell()

    async def ask(self, for_report: Callable[[str, str], Awaitable[None]]) -> None:
        """For ever. Hosts report by themselves only now and then: those that are waited for are asked."""
        while True:
            waited = self.pending if self.reason else self.unheard
            hosts = sorted(waited & self.spoke if self.spoke else waited)
            self.spoke.clear()
            self.due.clear()
            for host_id in hosts:
                self.asked_at[host_id] = monotonic()
                with contextlib.suppress(nats.errors.Error):
                    await for_report(host_id, self.ask_id)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(DOUBT_ASK_SECONDS if self.unheard else ASK_SECONDS):
                    await self.due.wait()
            if self.unheard and not self.in_doubt:
                self._end_doubt()

    async def reported(self, host_id: str, asked: Sequence[str] | None) -> None:
        """A host's full report was committed, which answers these. Only one that was begun since this leader asked says how
        the host is: the hosts' stream may hold many from between the backup and the restore, and facts after them. None: an
        agent of a former release doesn't say."""
        if asked is None or self.ask_id in asked:
            await self._heard(host_id)
        elif monotonic() - self.asked_at.get(host_id, float("-inf")) >= DOUBT_ASK_SECONDS:
            self.spoke.add(host_id)
            self.due.set()

    async def _heard(self, host_id: str) -> None:
        if host_id in self.unheard:
            self.unheard.discard(host_id)
            if not self.unheard:
                self._end_doubt()
        if host_id not in self.pending:
            return
        await self.pool.execute("delete from quarantine_host where host_id = $1", host_id)
        self.pending.discard(host_id)
        await self._end_if_done()

    async def excuse(self, host_id: str, confirm: str) -> None:
        """A person vouches that nothing of this host runs any more."""
        if confirm != host_id:
            raise invalid("type the host's id again as `confirm`, to be sure that you mean this one")
        log.warning("%s: a person declared host %s dead", self.owner, host_id)
        await self._heard(host_id)

    async def _end_if_done(self) -> None:
        if self.reason and not self.pending:
            await self.pool.execute("delete from quarantine")
            self.reason = ""
            log.warning("%s: quarantine has ended, every host has reported", self.owner)
            for tell in self.on_end:
                tell()

    def check(self) -> None:
        """Raises Refused(unavailable) while it lasts."""
        if self.in_doubt:
            raise Refused(
                Kind.UNAVAILABLE,
                f"{self.owner} has found its stream lost, and asks its hosts whether PostgreSQL was restored from a backup, too: "
                f"nothing is started, moved or deleted until {len(self.unheard)} hosts have reported "
                f"({', '.join(sorted(self.unheard)[:5])}), or {DOUBT_SECONDS:.0f} s have passed; ask again then",
                waits_for_hosts=sorted(self.unheard),
            )
        if self.reason:
            raise Refused(
                Kind.UNAVAILABLE,
                f"{self.owner} is in quarantine: {self.reason}. Nothing is started, moved or deleted until "
                f"{len(self.pending)} hosts have reported ({', '.join(sorted(self.pending)[:5])}); bring them up, or "
                "declare those that are gone for good dead",
                waits_for_hosts=sorted(self.pending),
            )
