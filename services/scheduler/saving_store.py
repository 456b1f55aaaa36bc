"""The SQL of hosts that sleep to save power: which do, since when it is proven that they can be woken, and who wants them."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from services.scheduler.policies.saving import Sleeper
from services.scheduler.store import Pool
from volery.contracts.host import Host, PowerSaving
from volery.runtime.tables import Change


def saw(host: Host) -> list[Change]:
    """Of a host that never slept nothing is written: what was, no longer counts by its revision."""
    if host.power_saving is PowerSaving.AWAKE and host.power_on_proven_at is None:
        return []
    written = Change(
        """insert into host_sleep (host_id, revision, power_saving, proven_at) values ({0}, {1}, {2}, {3})
           on conflict (host_id) do update set revision = excluded.revision, power_saving = excluded.power_saving,
               proven_at = excluded.proven_at
           where host_sleep.revision < excluded.revision""",
        (host.id, host.revision, str(host.power_saving), host.power_on_proven_at),
        guarded=False,
    )
    return [written]


async def sleepers(pool: Pool, cluster_id: str, days: float) -> list[Sleeper]:
    """Those of a cluster, by name."""
    records = await pool.fetch(
        """select h.id, h.name, h.memory_limit_bytes, coalesce(w.vm_name, '') as wanted_by,
                  coalesce(s.proven_at > now() - make_interval(secs => $2), false) as proven
           from host_sleep s join host_capacity h on h.id = s.host_id and h.revision = s.revision
                left join host_wanted w on w.host_id = h.id
           where h.cluster_id = $1 and not h.gone and s.power_saving = 'asleep' order by h.name, h.id""",
        cluster_id,
        days * 86400,
    )
    return [
        Sleeper(r["id"], r["name"], r["memory_limit_bytes"], r["proven"], r["wanted_by"]) for r in records
    ]


async def sleeping(pool: Pool, host_ids: Sequence[str]) -> list[str]:
    """Which of these hosts sleep."""
    records = await pool.fetch(
        """select h.id from host_sleep s join host_capacity h on h.id = s.host_id and h.revision = s.revision
           where h.id = any($1::text[]) and not h.gone and s.power_saving = 'asleep' order by h.id""",
        list(host_ids),
    )
    return [r["id"] for r in records]


def want(host_id: str, cluster_id: str, vm_name: str, now: datetime) -> Change:
    return Change(
        """insert into host_wanted (host_id, cluster_id, vm_name, at) values ({0}, {1}, {2}, {3})
           on conflict (host_id) do update set cluster_id = excluded.cluster_id, vm_name = excluded.vm_name,
               at = excluded.at""",
        (host_id, cluster_id, vm_name, now),
        guarded=False,
    )


def want_no_more(host_ids: Sequence[str]) -> Change:
    return Change(
        "delete from host_wanted where host_id = any({0}::text[])", (list(host_ids),), guarded=False
    )


async def forget_wanted(pool: Pool, seconds: float) -> None:
    """Whoever still wants a place asks again."""
    await pool.execute("delete from host_wanted where at < now() - make_interval(secs => $1)", seconds)
