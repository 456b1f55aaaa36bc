"""VMs that run without a claim, and the capacity that they take: statements about many of them at once."""

from __future__ import annotations

from collections.abc import Sequence
from operator import add

from services.scheduler.model import SeenVm
from services.scheduler.store import RECENT_SECONDS, Pool, held, seen
from volery.contracts.scheduling import Claim
from volery.runtime.tables import Change, text_columns

OF_RECENT_VMS = "and v.heard_at > now() - make_interval(secs => $3)"


async def unclaimed_vms(
    pool: Pool, settled_seconds: float, most: int, *, recent: bool = False
) -> list[SeenVm]:
    """VMs that certainly run on a host where no claim holds their capacity: external ones, and after a loss. Those of one
    host are neighbours. `recent`: only those that were heard of lately."""
    lately = OF_RECENT_VMS if recent else ""
    records = await pool.fetch(
        f"""select v.* from vm v join host_capacity h on h.id = v.host_id
           where not v.deleted and v.status in ('up', 'paused', 'powering_up', 'reboot_in_progress')
             and v.heard_at < now() - make_interval(secs => $1) {lately}
             and not exists (select 1 from claim c where c.vm_id = v.id and c.host_id = v.host_id)
             and not exists (select 1 from claim c where c.vm_id = v.id and c.epoch >= v.epoch)
           order by v.host_id, v.id limit $2""",
        settled_seconds,
        most,
        *((RECENT_SECONDS,) if recent else ()),
    )
    return [seen(record) for record in records]


def force_capacities(claims: Sequence[Claim]) -> Change:
    """For VMs that run on their hosts already: what is true must be recordable. Locked in the order of ids, as by rounds."""
    sums: dict[str, tuple[int, ...]] = {}
    largest: dict[str, int] = {}
    for claim in claims:
        counts = held(claim)
        sums[claim.host_id] = tuple(map(add, sums.get(claim.host_id, (0,) * len(counts)), counts))
        largest[claim.host_id] = max(largest.get(claim.host_id, 0), claim.vcpus)
    return Change(
        """update host_capacity h
           set memory_used_bytes = h.memory_used_bytes + n.memory::bigint, vcpus_used = h.vcpus_used + n.vcpus::integer,
               guests = h.guests + n.guests::integer, ha_guests = h.ha_guests + n.ha_guests::integer,
               pages_2m_used = h.pages_2m_used + n.small::integer, pages_1g_used = h.pages_1g_used + n.large::integer,
               largest_shared = greatest(h.largest_shared, n.largest::integer)
           from (select a.* from unnest({0}::text[], {1}::text[], {2}::text[], {3}::text[], {4}::text[], {5}::text[],
                                        {6}::text[], {7}::text[])
                     as a(id, memory, vcpus, guests, ha_guests, small, large, largest)
                 join (select id from host_capacity where id = any({0}::text[]) order by id for update) l
                     on l.id = a.id) n
           where h.id = n.id""",
        text_columns((host_id, *taken, largest[host_id]) for host_id, taken in sorted(sums.items())),
        guarded=False,
    )
