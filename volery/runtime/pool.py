"""asyncpg's pool, with a release that costs nothing when nothing is left to do.

asyncpg 0.32 gives each connection back in a task of its own, under a timeout, so that a cancelled caller can't leave it half
reset: a quarter of what a statement costs here. A connection with no transaction, cancellation or listener left has
nothing to be reset, and goes back at once; every other goes asyncpg's way. `tests/runtime/test_pool.py` fails when a newer
asyncpg keeps its connections otherwise.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import asyncpg
from asyncpg.pool import PoolConnectionProxy

if TYPE_CHECKING:
    _Pool = asyncpg.Pool[asyncpg.Record]
else:
    _Pool = asyncpg.Pool


class ServicePool(_Pool):
    async def release(
        self, connection: PoolConnectionProxy[asyncpg.Record], *, timeout: float | None = None
    ) -> None:
        proxy: Any = connection
        if (
            proxy._con is None
            or proxy._holder._pool is not self
            or not self._clean(proxy._holder, proxy._con)
        ):
            await super().release(connection, timeout=timeout)
            return
        proxy._con._pool_release_ctr += 1  # what was made under this checkout can't be used any more
        proxy._holder._timeout = None
        proxy._holder._release()
        proxy._holder._setup_inactive_callback()

    def _clean(self, holder: Any, connection: Any) -> bool:
        pool: Any = self
        protocol = connection._protocol
        return not (
            connection.is_closed()
            or protocol._is_cancelling()
            or protocol.is_in_transaction()
            or connection._top_xact is not None
            or connection._listeners
            or connection._log_listeners
            or protocol.queries_count >= holder._max_queries
            or holder._generation != pool._generation
        )


async def _keep_session(connection: object) -> None:
    """Nobody changes a pooled session beyond its transaction, which the pool ends before it asks this; asyncpg's own
    reset would cost every statement a second round trip."""


async def create_pool(**arguments: Any) -> ServicePool:
    """A pool as `asyncpg.create_pool` makes it, whose sessions are kept as they are."""
    return await ServicePool(
        init_size=arguments["min_size"],
        max_queries=50_000,
        max_inactive_connection_lifetime=300.0,
        reset=_keep_session,
        loop=None,
        connection_class=asyncpg.Connection,
        record_class=asyncpg.Record,
        **arguments,
    )
