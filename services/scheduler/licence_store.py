"""Every SQL statement about which VM held which physical CPUs when. `store.release` closes what is opened here."""

from __future__ import annotations

import msgspec

from services.scheduler.store import Pool
from volery.contracts.base import encode
from volery.contracts.licence import AskLicenceReport, CpuUse, LicenceReport
from volery.contracts.scheduling import Claim
from volery.runtime.tables import Change

_CPUS = msgspec.json.Decoder(tuple[int, ...])


def begin_use(claim: Claim, vm_name: str, host_name: str, cores: int, sockets: int) -> Change:
    assert claim.cpus is not None
    cpus = sorted(frozenset[int]().union(*claim.cpus.pins))
    return Change(
        """insert into cpu_use (id, vm_id, vm_name, epoch, host_id, host_name, policy, cpus, exclusive, vcpus, cores,
               sockets)
           values ({0}, {1}, {2}, {3}, {4}, {5}, {6}, {7}, {8}, {9}, {10}, {11}) returning 1""",
        (
            claim.id,
            claim.vm_id,
            vm_name,
            claim.epoch,
            claim.host_id,
            host_name,
            claim.cpu_pinning,
            encode(cpus).decode(),
            encode(claim.cpus.exclusive).decode(),
            claim.vcpus,
            cores,
            sockets,
        ),
    )


async def report(pool: Pool, ask: AskLicenceReport) -> LicenceReport:
    records = await pool.fetch(
        """select * from cpu_use
           where id > $1 and ($2 = '' or vm_id = $2) and ($3 = '' or host_id = $3)
             and ($4::timestamptz is null or ended_at is null or ended_at > $4::timestamptz)
             and ($5::timestamptz is null or began_at < $5::timestamptz)
           order by id limit $6::integer""",
        ask.page,
        ask.vm_id,
        ask.host_id,
        ask.since,
        ask.until,
        ask.limit + 1,
    )
    items = tuple(
        CpuUse(
            id=r["id"],
            vm_id=r["vm_id"],
            vm_name=r["vm_name"],
            epoch=r["epoch"],
            host_id=r["host_id"],
            host_name=r["host_name"],
            policy=r["policy"],
            cpus=_CPUS.decode(r["cpus"]),
            exclusive=_CPUS.decode(r["exclusive"]),
            cores=r["cores"],
            sockets=r["sockets"],
            since=r["began_at"],
            until=r["ended_at"],
        )
        for r in records[: ask.limit]
    )
    return LicenceReport(items=items, next=items[-1].id if len(records) > ask.limit else "")


async def close_uses(pool: Pool) -> None:
    """Of claims that the previous release gave back, which knows of no report."""
    await pool.execute(
        """update cpu_use u set ended_at = now()
           where ended_at is null and not exists (select 1 from claim c where c.id = u.id)"""
    )


async def forget_uses(pool: Pool, days: int) -> None:
    await pool.execute("delete from cpu_use where ended_at < now() - make_interval(days => $1)", days)
