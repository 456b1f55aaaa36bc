"""What is read of NUMA cells, and their counters put right."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from services.scheduler.cells import CellFigures, CellNeed, Taken
from services.scheduler.store import Pool

CellUse = tuple[str, int, Taken]
"""Host, cell, and what claims hold of it."""

_SELECT = """select host_id, cell, cpus, memory_bytes, pages_2m, pages_1g, memory_used_bytes, pages_2m_used,
                    pages_1g_used from host_cell"""


async def cells(pool: Pool, host_ids: Sequence[str] | None = None) -> Mapping[str, list[CellFigures]]:
    """Host → its cells; of these hosts or of all."""
    if host_ids is None:
        records = await pool.fetch(f"{_SELECT} order by host_id, cell")
    else:
        records = await pool.fetch(
            f"{_SELECT} where host_id = any($1::text[]) order by host_id, cell", list(host_ids)
        )
    found: dict[str, list[CellFigures]] = {}
    for r in records:
        figures = CellFigures(r[1], r[2], Taken(r[3], r[4], r[5]), Taken(r[6], r[7], r[8]))
        found.setdefault(r[0], []).append(figures)
    return found


async def used(pool: Pool) -> list[CellUse]:
    """Of those cells of which claims hold anything."""
    records = await pool.fetch(
        """select host_id, cell, memory_used_bytes, pages_2m_used, pages_1g_used from host_cell
           where memory_used_bytes <> 0 or pages_2m_used <> 0 or pages_1g_used <> 0"""
    )
    return [(r[0], r[1], Taken(r[2], r[3], r[4])) for r in records]


async def held(pool: Pool, cluster_id: str) -> Mapping[str, tuple[CellNeed, ...]]:
    """Claim → what it holds of the cells of its host, of a cluster's hosts."""
    records = await pool.fetch(
        """select c.claim_id, c.cell, c.memory_bytes, c.pages_2m, c.pages_1g
           from claim_cell c join host_capacity h on h.id = c.host_id where h.cluster_id = $1 order by c.claim_id, c.cell""",
        cluster_id,
    )
    found: dict[str, tuple[CellNeed, ...]] = {}
    for r in records:
        found[r[0]] = (*found.get(r[0], ()), CellNeed(r[1], Taken(r[2], r[3], r[4])))
    return found


_DIFFERENT = """select s.* from
    (select h.host_id, h.cell, h.memory_used_bytes, h.pages_2m_used, h.pages_1g_used,
            coalesce(sum(c.memory_bytes), 0)::bigint as memory, coalesce(sum(c.pages_2m), 0)::integer as small,
            coalesce(sum(c.pages_1g), 0)::integer as large
     from host_cell h left join claim_cell c on c.host_id = h.host_id and c.cell = h.cell
     group by h.host_id, h.cell, h.memory_used_bytes, h.pages_2m_used, h.pages_1g_used) s
    where (s.memory_used_bytes <> s.memory or s.pages_2m_used <> s.small or s.pages_1g_used <> s.large)"""


async def correct(pool: Pool) -> list[str]:
    """Hosts of whose cells claims hold something else than the cells' counters say; these are right afterwards."""
    await pool.execute(
        "delete from claim_cell c where not exists (select 1 from claim where id = c.claim_id)"
    )
    suspects = await pool.fetch(f"{_DIFFERENT} order by s.host_id, s.cell")
    wrong = []
    for host_id in dict.fromkeys(r["host_id"] for r in suspects):
        async with pool.acquire() as connection, connection.transaction():
            # The host's row is locked first, as by claims, and the sums are made by a later statement.
            await connection.execute("select 1 from host_capacity where id = $1 for update", host_id)
            records = await connection.fetch(f"{_DIFFERENT} and s.host_id = $1", host_id)
            for r in records:
                await connection.execute(
                    """update host_cell set memory_used_bytes = $3, pages_2m_used = $4, pages_1g_used = $5
                       where host_id = $1 and cell = $2""",
                    r["host_id"], r["cell"], r["memory"], r["small"], r["large"],
                )  # fmt: skip
        if records:
            wrong.append(host_id)
    return wrong
