"""The SQL of rounds: many claims, releases, decisions and what they guard, each kind in one change over arrays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import add

from services.scheduler.store import CLAIMS, ClaimPrivate, held
from volery.contracts.scheduling import Claim
from volery.runtime.tables import ENTITY_COLUMNS, Change, Row


@dataclass(slots=True)
class HostChange:
    """What one round takes of a host, less what it gives back there: as `store.held`."""

    counts: tuple[int, ...] = (0, 0, 0, 0, 0, 0)
    takes: bool = False
    """At least one VM was placed there."""
    largest: int = 0
    """vCPUs of the largest of these. Whoever gets CPUs of its own isn't in a round."""

    def add(self, claim: Claim, times: int) -> None:
        self.counts = tuple(map(add, self.counts, held(claim, times)))
        if times > 0:
            self.takes, self.largest = True, max(self.largest, claim.vcpus)


def change_capacity(changes: Mapping[str, HostChange]) -> list[Change]:
    """The guard fails when a host that takes a VM would have more than it may promise afterwards, or is no longer up. One
    that only gets back needs nothing.

    Hosts are locked in the order of their ids, so that rounds of several replicas wait for each other and never in a circle.
    """
    ids = sorted(changes)
    columns = zip(*(changes[host_id].counts for host_id in ids), strict=True)
    update = Change(
        """update host_capacity h
           set memory_used_bytes = h.memory_used_bytes + n.memory, vcpus_used = h.vcpus_used + n.vcpus,
               guests = h.guests + n.guests, ha_guests = h.ha_guests + n.ha_guests,
               pages_2m_used = h.pages_2m_used + n.small, pages_1g_used = h.pages_1g_used + n.large,
               largest_shared = greatest(h.largest_shared, n.largest)
           from (select a.* from unnest({0}::text[], {1}::bigint[], {2}::integer[], {3}::integer[], {4}::integer[],
                                        {5}::integer[], {6}::integer[], {7}::integer[], {8}::boolean[])
                     as a(id, memory, vcpus, guests, ha_guests, small, large, largest, takes)
                 join (select id from host_capacity where id = any({0}::text[]) order by id for update) l
                     on l.id = a.id) n
           where h.id = n.id
             and (not n.takes
                  or h.status = 'up' and not h.gone and h.memory_used_bytes + n.memory <= h.memory_limit_bytes
                     and (h.vcpus_used - h.vcpus_exclusive + n.vcpus) * h.cpus::bigint
                         <= h.vcpus_limit::bigint * (h.cpus - h.cpus_exclusive)
                     and (h.cpus_exclusive = 0 or n.largest <= h.cpus - h.cpus_exclusive)
                     and (n.small <= 0 or h.pages_2m_used + n.small <= h.pages_2m)
                     and (n.large <= 0 or h.pages_1g_used + n.large <= h.pages_1g))
           returning h.id, n.takes""",
        (
            ids,
            *map(list, columns),
            [changes[host_id].largest for host_id in ids],
            [changes[host_id].takes for host_id in ids],
        ),
        guarded=False,
    )
    takers = Change(
        "select 1 from {prev} took where took.takes and took.id = any({0}::text[])",
        ([host_id for host_id in ids if changes[host_id].takes],),
        each_of=0,
    )
    return [update, takers]


def next_placements(counted: Mapping[str, tuple[int, int]]) -> Change:
    """Group → the placements that were counted before its VMs' places were read, and how many are added. Guards that
    nobody else placed one of its VMs since."""
    ids = sorted(counted)
    return Change(
        """update affinity_group g set placements = g.placements + n.more
           from (select a.* from unnest({0}::text[], {1}::bigint[], {2}::bigint[]) as a(id, seen, more)
                 join (select id from affinity_group where id = any({0}::text[]) order by id for update) l
                     on l.id = a.id) n
           where g.id = n.id and g.placements = n.seen
           returning 1""",
        (ids, [counted[group_id][0] for group_id in ids], [counted[group_id][1] for group_id in ids]),
        each_of=0,
    )


_TYPES = {
    "revision": "bigint",
    "epoch": "bigint",
    "memory_bytes": "bigint",
    "vcpus": "integer",
    "high_availability": "boolean",
    "pages_2m": "integer",
    "pages_1g": "integer",
    "exclusive_cpus": "integer",
    "created_at": "timestamptz",
    "updated_at": "timestamptz",
}
"""Columns of claims that aren't text."""
_CLAIM = (*ENTITY_COLUMNS, *CLAIMS.columns)
_COLUMNS = ", ".join(_CLAIM)
_ARRAYS = ", ".join(f"{{{number}}}::{_TYPES.get(name, 'text')}[]" for number, name in enumerate(_CLAIM))


def insert_claims(inserts: Sequence[Change]) -> Change:
    """Many of `CLAIMS.insert` at once."""
    columns = zip(*(change.arguments for change in inserts), strict=True)
    return Change(
        f"insert into claim ({_COLUMNS}) select * from unnest({_ARRAYS}) as n({_COLUMNS}) returning 1",
        tuple(list(column) for column in columns),
        facts=tuple(fact for change in inserts for fact in change.facts),
        each_of=0,
    )


_SET = ("revision", "doc", *CLAIMS.columns)
_SEEN = ", ".join(("id", "seen", *_SET))
_NEW = ", ".join(f"{name} = n.{name}" for name in _SET)
_NEW_ARRAYS = ", ".join(
    f"{{{number}}}::{_TYPES.get(name, 'text')}[]" for number, name in enumerate(("id", "revision", *_SET))
)


def update_claims(updates: Sequence[Change]) -> Change:
    """Many of `CLAIMS.update` at once."""
    columns = zip(*(change.arguments for change in updates), strict=True)
    return Change(
        f"""update claim c set {_NEW} from unnest({_NEW_ARRAYS}) as n({_SEEN})
            where c.id = n.id and c.revision = n.seen
            returning 1""",
        tuple(list(column) for column in columns),
        facts=tuple(fact for change in updates for fact in change.facts),
        each_of=0,
    )


def delete_claims(rows: Sequence[Row[Claim, ClaimPrivate]]) -> Change:
    """Many of `CLAIMS.delete` at once."""
    return Change(
        """delete from claim c using unnest({0}::text[], {1}::bigint[]) as n(id, revision)
           where c.id = n.id and c.revision = n.revision
           returning 1""",
        ([row.id for row in rows], [row.public.revision for row in rows]),
        facts=tuple(fact for row in rows for fact in CLAIMS.delete(row).facts),
        each_of=0,
    )


def keep_decisions(kept: Sequence[Change]) -> Change:
    """Many of `store.keep_decision` at once."""
    columns = zip(*(change.arguments for change in kept), strict=True)
    return Change(
        """insert into decision (id, vm_id, host_id, doc, body)
           select * from unnest({0}::text[], {1}::text[], {2}::text[], {3}::text[], {4}::bytea[])
               as n(id, vm_id, host_id, doc, body)
           returning 1""",
        tuple(list(column) for column in columns),
        each_of=0,
    )
