"""What every handler of network gets: the runtime's core, the store, and what the leader remembers of hosts."""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from random import Random, SystemRandom
from typing import TypeVar

from services.network.config import NetworkConfig
from services.network.store import HostRow, Store
from volery.contracts.base import Entity, Message
from volery.contracts.cluster import GET_CLUSTER, GET_DATA_CENTER, GetById
from volery.contracts.errors import conflict
from volery.runtime.core import Core
from volery.runtime.losses import Losses
from volery.runtime.tables import Change, Row, Stale, Table

T = TypeVar("T", bound=Entity)
S = TypeVar("S", bound=Message)


@dataclass(slots=True)
class Fabric:
    core: Core
    store: Store
    config: NetworkConfig
    random: Random = field(default_factory=SystemRandom)
    locks: weakref.WeakValueDictionary[str, asyncio.Lock] = field(default_factory=weakref.WeakValueDictionary)
    """Host → who may change its networks now."""
    tried: dict[str, float] = field(default_factory=dict)
    """Host → when its networks were last applied or failed to be, by this process's monotonic clock."""
    asked: dict[str, float] = field(default_factory=dict)
    """Host → when it was last asked for a report."""
    shapes: dict[str, Message] = field(default_factory=dict)
    """Network → what its hosts must know of it, as last heard."""
    losses: dict[str, Losses] = field(default_factory=dict)
    """Network → since when which hosts are without it."""
    settled: asyncio.Event = field(default_factory=asyncio.Event)
    """Set and replaced whenever a host's state was written."""

    def lock(self, host_id: str) -> asyncio.Lock:
        return self.locks.setdefault(host_id, asyncio.Lock())

    def say_settled(self) -> None:
        self.settled.set()
        self.settled = asyncio.Event()

    async def edit(
        self,
        table: Table[T, S],
        object_id: str,
        decide: Callable[[Row[T, S]], tuple[T, S] | None],
        *more: Change,
    ) -> None:
        """Read, decide, write, again when somebody else was first."""
        while True:
            row = await table.find(self.core.pool, object_id)
            decided = decide(row) if row is not None else None
            if row is None or decided is None or decided == (row.public, row.private):
                return
            try:
                await self.core.commit(table.update(row, *decided), *more)
            except Stale:
                continue
            return

    def then_wake(self, change: Change, *keys: str) -> Change:
        """The change, after whose commit the reconcile loop looks at these keys: earlier it would see what was."""

        def wake() -> None:
            for key in keys:
                self.core.wake(key)

        return change.and_then(wake)

    async def check_data_center(self, data_center_id: str) -> None:
        """Raises Refused(not_found). Inventory is asked when its fact has not been heard (yet)."""
        if not await self.store.knows_data_center(data_center_id):
            await self.core.bus.ask(GET_DATA_CENTER, GetById(id=data_center_id))

    async def check_clusters(self, data_center_id: str, cluster_ids: tuple[str, ...]) -> None:
        """Raises Refused unless all are clusters of the data center."""
        known = await self.store.clusters_in(data_center_id)
        for cluster_id in cluster_ids:
            if cluster_id in known:
                continue
            cluster = await self.core.bus.ask(GET_CLUSTER, GetById(id=cluster_id))
            if cluster.data_center_id != data_center_id:
                raise conflict(
                    f"cluster {cluster.name} belongs to another data center than the network: choose clusters of its own",
                    cluster_id=cluster_id,
                )

    async def neighbours(self, host: HostRow) -> list[HostRow]:
        return await self.store.hosts_in(host.data_center_id)


@asynccontextmanager
async def open_fabric(core: Core) -> AsyncIterator[Fabric]:
    config: NetworkConfig = core.config
    yield Fabric(core, Store(core.pool), config)
