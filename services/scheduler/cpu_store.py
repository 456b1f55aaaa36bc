"""Every SQL statement of the scheduler about physical CPUs that claims hold."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import msgspec

from services.scheduler.policies.cpus import NOBODY, Held
from services.scheduler.store import Pool
from volery.contracts.scheduling import Claim
from volery.runtime.tables import Change

_CPUS = msgspec.json.Decoder(tuple[int, ...])


def take_cpus(claim: Claim) -> Change:
    """As `store.take_capacity`, for a VM that gets CPUs of its own. Its guard fails also when CPUs of the host were given or
    taken back since these were chosen, or when too few would be left for those that share the others."""
    assert claim.cpus is not None
    alone = bool(claim.exclusive_cpus)
    return Change(
        """update host_capacity
           set memory_used_bytes = memory_used_bytes + {1}, vcpus_used = vcpus_used + {2}, guests = guests + 1,
               ha_guests = ha_guests + {3}, cpus_revision = cpus_revision + 1, cpus_exclusive = cpus_exclusive + {4},
               vcpus_exclusive = vcpus_exclusive + {5}, pages_2m_used = pages_2m_used + {8},
               pages_1g_used = pages_1g_used + {9}
           where id = {0} and status = 'up' and not gone and cpus_revision = {7}
             and memory_used_bytes + {1} <= memory_limit_bytes
             and (vcpus_used - vcpus_exclusive + {6}) * cpus::bigint
                 <= vcpus_limit::bigint * (cpus - cpus_exclusive - {4})
             and ({4} = 0 or largest_shared <= cpus - cpus_exclusive - {4})
             and (pages_2m_used + {8} <= pages_2m or {8} = 0) and (pages_1g_used + {9} <= pages_1g or {9} = 0)
           returning 1""",
        (
            claim.host_id,
            claim.memory_bytes,
            claim.vcpus,
            int(claim.high_availability),
            claim.exclusive_cpus,
            claim.vcpus if alone else 0,
            0 if alone else claim.vcpus,
            claim.cpus.revision,
            claim.pages_2m,
            claim.pages_1g,
        ),
    )


async def revisions(pool: Pool) -> dict[str, int]:
    """Host → how often CPUs of it were given or taken back, where that ever happened."""
    records = await pool.fetch(
        "select id, cpus_revision from host_capacity where cpus_revision > 0 and not gone"
    )
    return {r["id"]: r["cpus_revision"] for r in records}


async def held(pool: Pool, host_ids: Collection[str]) -> dict[str, Held]:
    """What is held on these hosts, each as of one moment."""
    records = await pool.fetch(
        """select h.id, h.cpus_revision, u.cpus, u.exclusive, u.vcpus from host_capacity h
           left join cpu_use u on u.host_id = h.id and u.ended_at is null
           where h.id = any($1::text[])""",
        list(host_ids),
    )
    found: dict[str, Held] = {}
    for record in records:
        now = found.get(record["id"], Held(record["cpus_revision"], NOBODY, NOBODY))
        found[record["id"]] = now if record["cpus"] is None else _with(now, dict(record))
    return found


def _with(held: Held, record: Mapping[str, Any]) -> Held:
    alone = frozenset(_CPUS.decode(record["exclusive"]))
    pinned = NOBODY if alone else frozenset(_CPUS.decode(record["cpus"]))
    vcpus = record["vcpus"] if alone else 0
    return Held(held.revision, held.exclusive | alone, held.pinned | pinned, held.vcpus + vcpus)


async def lower_largest(pool: Pool, cluster_id: str) -> None:
    """VMs that share CPUs have left hosts of this cluster: their largest may be smaller now."""
    suspects = await pool.fetch(
        """select h.id from host_capacity h left join claim c on c.host_id = h.id and c.cpu_pinning = ''
           where h.cluster_id = $1 and h.largest_shared > 0
           group by h.id, h.largest_shared having h.largest_shared > coalesce(max(c.vcpus), 0)
           order by h.id""",
        cluster_id,
    )
    for suspect in suspects:
        async with pool.acquire() as connection, connection.transaction():
            # Locked first and looked at by a later statement, as for counters.
            await connection.fetchval(
                "select largest_shared from host_capacity where id = $1 for update", suspect["id"]
            )
            await connection.execute(
                """update host_capacity set largest_shared =
                       (select coalesce(max(vcpus), 0)::integer from claim where host_id = $1 and cpu_pinning = '')
                   where id = $1""",
                suspect["id"],
            )
