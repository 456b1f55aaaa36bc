"""A service's database as it was once: what an administrator does with a backup of PostgreSQL."""

from __future__ import annotations

from io import BytesIO

from volery.contracts.base import Owner
from volery.runtime.config import DatabaseConfig
from volery.runtime.database import open_direct

Backup = dict[str, bytes]
"""Table → its rows, as COPY gives them."""


async def backed_up(config: DatabaseConfig, owner: Owner) -> Backup:
    """Every table of the service at one moment, also while it runs."""
    async with open_direct(config, owner) as connection:
        async with connection.transaction(isolation="repeatable_read", readonly=True):
            # In the order in which they were created: what refers to others comes after them.
            names = await connection.fetch(
                """select relname from pg_class
                   where relkind = 'r' and relnamespace = current_schema()::regnamespace order by oid"""
            )
            kept: Backup = {}
            for (name,) in names:
                rows = BytesIO()
                await connection.copy_from_table(name, output=rows, format="binary")
                kept[name] = rows.getvalue()
            return kept


async def restored(config: DatabaseConfig, owner: Owner, backup: Backup) -> None:
    """While the service is away."""
    async with open_direct(config, owner) as connection:
        async with connection.transaction():
            await connection.execute(f"truncate {', '.join(backup)}")
            for name, rows in backup.items():
                await connection.copy_to_table(name, source=BytesIO(rows), format="binary")
