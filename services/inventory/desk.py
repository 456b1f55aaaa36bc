"""What inventory's handlers may touch; nothing is global."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from services.inventory.config import InventoryConfig
from services.inventory.store import Store
from volery.contracts.agent import DomainReport
from volery.contracts.base import Owner
from volery.contracts.errors import Refused
from volery.contracts.operation import ENDED, GET_OPERATION, GetOperation, Operation
from volery.runtime.bus import connect
from volery.runtime.connection import revoke
from volery.runtime.core import Core
from volery.runtime.identity import Realm


@dataclass(slots=True)
class Inventory:
    core: Core
    store: Store
    config: InventoryConfig
    seen: dict[tuple[str, str], DomainReport] = field(default_factory=dict)
    """(host, VM) → the newest report of its domain. A cache: decisions that need it ask for a report first."""
    reports: dict[str, asyncio.Event] = field(default_factory=dict)
    """Host → set by its next full report."""

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

    async def foreign_operation(self, operation: Operation) -> Operation:
        """Another service's operation, once it has ended. Raises Refused when it failed."""
        owner = Owner(operation.id.split("-", 1)[0])
        pause = 0.005
        while operation.state not in ENDED:
            await asyncio.sleep(pause)
            pause = min(pause * 1.5, 0.5)
            operation = await self.core.bus.ask(GET_OPERATION[owner], GetOperation(id=operation.id))
        if operation.problem is not None:
            problem = operation.problem
            raise Refused(problem.kind, problem.message, **problem.details)
        return operation

    async def revoke_keys(self, public_keys: Sequence[str], role: str = "agent") -> None:
        """Cut these users off the bus, now and for ever."""
        keys = [key for key in public_keys if key]
        if not keys or not self.config.secrets_dir:
            return
        claims = await connect(self.core.bus_config, "claims")
        try:
            await revoke(Realm.load(Path(self.config.secrets_dir)), claims, keys, role)
        finally:
            await claims.close()

    async def fresh_report(self, host_id: str) -> None:
        """Ask the host for its full state and wait until that was committed."""
        event = self.reports.setdefault(host_id, asyncio.Event())
        event.clear()
        while not event.is_set():
            await self.core.hosts.ask_report(host_id)
            try:
                await asyncio.wait_for(event.wait(), 3.0)
            except TimeoutError:
                continue
