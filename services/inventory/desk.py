"""What inventory's handlers may touch; nothing is global."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from services.inventory.config import InventoryConfig
from services.inventory.store import Store
from services.inventory.turns import Turns
from volery.contracts.agent import DomainReport
from volery.contracts.base import Message, Order, Owner
from volery.contracts.domain import DomainState
from volery.contracts.errors import Kind, Refused
from volery.contracts.ids import new_id
from volery.contracts.operation import ENDED, GET_OPERATION, GetOperation, Operation
from volery.contracts.vm import VmStatus
from volery.runtime.bus import LOST
from volery.runtime.connection import revoke
from volery.runtime.core import Core
from volery.runtime.identity import Realm

Q = TypeVar("Q", bound=Message)
A = TypeVar("A")
V = TypeVar("V")
HOST_SECONDS = 15.0
REPORT_SECONDS = 1.0
"""How often a host is asked for a report that somebody waits for."""


@dataclass(slots=True)
class Stalled:
    """Times are on the monotonic clock."""

    since: float
    epoch: int
    tried_at: float
    tries: int = 0


class Seen(dict[tuple[str, str], DomainReport]):
    """By host and VM. A host's are found without looking at all others', of which there may be hundreds of thousands."""

    def __init__(self) -> None:
        super().__init__()
        self._on: dict[str, set[str]] = {}

    def __setitem__(self, key: tuple[str, str], report: DomainReport) -> None:
        super().__setitem__(key, report)
        self._on.setdefault(key[0], set()).add(key[1])

    def forget(self, host_id: str) -> None:
        for vm_id in self._on.pop(host_id, ()):
            self.pop((host_id, vm_id), None)


@dataclass(slots=True)
class Inventory:
    core: Core
    store: Store
    config: InventoryConfig
    seen: Seen = field(default_factory=Seen)
    """(host, VM) → the newest report of its domain. A cache: decisions that need it ask for a report first."""
    storage_work: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Host → kinds of storage's orders that it was carrying out by its newest report."""
    boots: dict[tuple[str, str], str] = field(default_factory=dict)
    """(host, VM) → the boot whose report that was."""
    foreign: dict[str, asyncio.Event] = field(default_factory=dict)
    """Another service's operation → set when it says that it ended."""
    turns: Turns = field(default_factory=Turns)
    reports: dict[str, dict[str, asyncio.Event]] = field(default_factory=dict)
    """Host → what it was asked → set by the report that answers it."""
    missing: dict[str, tuple[int, str]] = field(default_factory=dict)
    """VM that its host didn't name, and nobody has seen there yet → its epoch, and what the host was asked then."""

    deaf: set[str] = field(default_factory=set)
    """Hosts whose agent is too old to be told that saved memory is given up; one that reports may have been renewed."""
    evacuated: dict[str, float] = field(default_factory=dict)
    """Host → when the last evacuation of it began, on the monotonic clock."""
    stalled: dict[str, Stalled] = field(default_factory=dict)
    """VM → since when an I/O error keeps it paused, as far as this leader has seen."""

    async def operation_ended(self, operation_id: str) -> Operation:
        """One of inventory's own operations, once it has ended."""
        while True:
            known = self.core.operations.runs.get(operation_id)
            if known is not None:
                await asyncio.wait([known[1]])
            row = await self.core.operations.table.get(self.core.pool, operation_id)
            if row.public.state in ENDED:
                return row.public
            await asyncio.sleep(0.1)

    def running_status(self, host_id: str, vm_id: str) -> VmStatus:
        """Of a VM that runs on: what its host said last. Whoever writes it asks the host for a report afterwards."""
        seen = self.seen.get((host_id, vm_id))
        paused = seen is not None and seen.state is DomainState.PAUSED
        return VmStatus.PAUSED if paused else VmStatus.UP

    async def foreign_operation(self, operation_id: str) -> Operation:
        """Another service's operation, once it has ended. Raises Refused when it failed."""
        operation = await self._ended_elsewhere(operation_id)
        if operation.problem is not None:
            problem = operation.problem
            details = {name: value for name, value in problem.details.items() if name != LOST}
            raise Refused(problem.kind, problem.message, **details)
        return operation

    async def once_free(self, ask: Callable[[], Awaitable[V]]) -> V:
        """The answer of a service whose object is busy with another operation, when that has ended."""
        while True:
            try:
                return await ask()
            except Refused as refused:
                other = refused.details.get("operation", "")
                if refused.kind is not Kind.CONFLICT or not other:
                    raise
            await self._ended_elsewhere(other)

    async def _ended_elsewhere(self, operation_id: str) -> Operation:
        owner = Owner(operation_id.split("-", 1)[0])
        ended = self.foreign.setdefault(operation_id, asyncio.Event())
        try:
            while True:
                operation = await self.core.bus.ask(GET_OPERATION[owner], GetOperation(id=operation_id))
                if operation.state in ENDED:
                    return operation
                await self._wait(ended, 1.0)
        finally:
            self.foreign.pop(operation_id, None)

    async def _wait(self, event: asyncio.Event, seconds: float) -> None:
        """Until the event, or a while: a fact may come late."""
        try:
            await asyncio.wait_for(event.wait(), seconds)
        except TimeoutError:
            return

    async def revoke_keys(self, public_keys: Sequence[str], role: str = "agent") -> None:
        """Cut these users off the bus, now and for ever."""
        keys = [key for key in public_keys if key]
        if not keys or not self.config.secrets_dir:
            return
        claims = await self.core.outside.connect(self.core.bus_config, "claims")
        try:
            await revoke(Realm.load(Path(self.config.secrets_dir)), claims, keys, role)
        finally:
            await claims.close()

    async def order_now(
        self, order: Order[Q, A], question: Q, *, host_id: str, object_id: str, epoch: int
    ) -> A:
        """An order outside any operation, waited for. Raises Refused with the host's sentence."""
        orders = self.core.orders
        order_id = new_id()
        await self.core.commit(
            *orders.give(
                order, question, order_id=order_id, host_id=host_id, object_id=object_id, epoch=epoch
            )
        )
        try:
            return (await asyncio.wait_for(orders.result(order_id), HOST_SECONDS)).answer(order)
        except TimeoutError:
            raise Refused(
                Kind.TIMEOUT,
                f"host {host_id} has not carried out {order.kind} within {HOST_SECONDS:g} s; it may do so later. Look "
                "whether the host is up, then ask again",
            ) from None

    def has_ended(self, host_id: str, boot_id: str) -> bool:
        """Whether this boot has ended by proof. An unknown one has not."""
        return bool(boot_id) and self.core.orders.deaths.has_ended(host_id, boot_id)

    async def fresh_report(self, host_id: str, ended: Callable[[], bool] = lambda: False) -> bool:
        """Ask the host for its full state and wait until a report that it began after that was committed: an older one may
        be on its way. False: `ended` became true instead, so that there is nothing any more that the host could say."""
        ask, event = new_id(), asyncio.Event()
        waiting = self.reports.setdefault(host_id, {})
        waiting[ask] = event
        try:
            while not event.is_set():
                if ended():
                    return False
                await self.core.hosts.ask_report(host_id, ask)
                await self._wait(event, REPORT_SECONDS)
        finally:
            del waiting[ask]
        return True

    def reported(self, host_id: str, asked: Sequence[str] | None) -> None:
        """A report was committed that answers these; one of a former release may be any."""
        for ask, event in self.reports.get(host_id, {}).items():
            if asked is None or ask in asked:
                event.set()
