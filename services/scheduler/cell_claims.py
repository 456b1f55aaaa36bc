"""What is written of NUMA cells: what hosts have, what claims take, and the guard that keeps the one within the other.

The rows of a host's cells are written after the host's own, whose lock orders claims.
"""

from __future__ import annotations

from collections.abc import Sequence

from services.scheduler.cells import CellFigures
from volery.contracts.scheduling import CellClaim, Claim
from volery.runtime.tables import Change

_NEWEST = "not exists (select 1 from host_capacity where id = {0} and revision > {1})"
_MORE = """update host_cell
           set memory_used_bytes = memory_used_bytes + {2}, pages_2m_used = pages_2m_used + {3},
               pages_1g_used = pages_1g_used + {4}
           where host_id = {0} and cell = {1}"""
_FITS = """and (memory_used_bytes + {2} <= memory_bytes or {2} = 0)
           and (pages_2m_used + {3} <= pages_2m or {3} = 0) and (pages_1g_used + {4} <= pages_1g or {4} = 0)"""
"""What is asked of the sum comes first: a parameter's type is that of its first use."""


def saw_cells(host_id: str, revision: int, cells: Sequence[CellFigures]) -> list[Change]:
    """Nothing, when a newer revision of the host is known."""
    columns = [
        [c.cell for c in cells],
        [c.cpus for c in cells],
        *([c.limit[n] for c in cells] for n in range(3)),
    ]
    kept = [c.cell for c in cells]
    gone = Change(
        f"delete from host_cell where host_id = {{0}} and not (cell = any({{2}}::integer[])) and {_NEWEST}",
        (host_id, revision, kept),
        guarded=False,
    )
    if not cells:
        return [gone]
    there = Change(
        f"""insert into host_cell (host_id, cell, cpus, memory_bytes, pages_2m, pages_1g)
            select {{0}}, n.cell, n.cpus, n.memory, n.small, n.large
            from unnest({{2}}::integer[], {{3}}::integer[], {{4}}::bigint[], {{5}}::integer[], {{6}}::integer[])
                 as n(cell, cpus, memory, small, large)
            where {_NEWEST}
            on conflict (host_id, cell) do update set cpus = excluded.cpus, memory_bytes = excluded.memory_bytes,
                pages_2m = excluded.pages_2m, pages_1g = excluded.pages_1g""",
        (host_id, revision, *columns),
        guarded=False,
    )
    return [gone, there]


def take(claim: Claim, *, forced: bool = False) -> list[Change]:
    """Each fails when its cell has not that much left, or isn't there. Forced: what runs there is recorded anyhow."""
    return [change for cell in claim.cells for change in (_hold(claim, cell, forced), _note(claim, cell))]


def _hold(claim: Claim, cell: CellClaim, forced: bool) -> Change:
    return Change(
        f"{_MORE} returning 1" if forced else f"{_MORE} {_FITS} returning 1",
        (claim.host_id, cell.cell, cell.memory_bytes, cell.pages_2m, cell.pages_1g),
        guarded=not forced,
    )


def _note(claim: Claim, cell: CellClaim) -> Change:
    return Change(
        """insert into claim_cell (claim_id, host_id, cell, memory_bytes, pages_2m, pages_1g)
           values ({0}, {1}, {2}, {3}, {4}, {5})""",
        (claim.id, claim.host_id, cell.cell, cell.memory_bytes, cell.pages_2m, cell.pages_1g),
        guarded=False,
    )


def give_back(claim: Claim) -> list[Change]:
    """What it held of cells. Most claims hold none."""
    if not claim.cells:
        return []
    return [
        *(
            Change(
                """update host_cell
                   set memory_used_bytes = memory_used_bytes - {2}, pages_2m_used = pages_2m_used - {3},
                       pages_1g_used = pages_1g_used - {4}
                   where host_id = {0} and cell = {1}""",
                (claim.host_id, cell.cell, cell.memory_bytes, cell.pages_2m, cell.pages_1g),
                guarded=False,
            )
            for cell in claim.cells
        ),
        Change("delete from claim_cell where claim_id = {0}", (claim.id,), guarded=False),
    ]
