"""PostgreSQL in memory, as far as Volery's statements go: what asyncpg's pool and connection answer, on any event loop.

    database = Database(seed)
    await database.migrate("ha")
    async with database.pool("ha") as pool: ...

Isolation is READ COMMITTED. Each statement runs in one piece, so statements interleave only between each other;
transactions of several statements hold their rows, and whoever needs one waits and then begins its statement again.
That is the one difference in kind: a statement that waited sees all that was committed meanwhile, in PostgreSQL only
the row that it waited for. What a statement needs and this database does not have raises Unsupported with its text.
"""

from sim.postgres.database import Database, Snapshot
from sim.postgres.errors import Unsupported

__all__ = ["Database", "Snapshot", "Unsupported"]
