"""Tables of leases: which host has which number in a lockspace, and which VMs have a lease."""

from __future__ import annotations

from dataclasses import dataclass

from services.storage.store import Member, Pool
from volery.contracts.errors import Kind, Refused
from volery.contracts.leases import MAX_HOST_NUMBER, LockspaceReport
from volery.runtime.tables import Change, Taken, commit

_MEMBER = (
    "domain_id, host_id, number, asked, boot_id, generation, io_timeout_seconds, reset_host, freer_host_id"
)


@dataclass(frozen=True, slots=True)
class VmLease:
    domain_id: str
    vm_id: str
    doomed: bool
    """Nobody needs it any more."""


@dataclass(frozen=True, slots=True)
class LeaseStore:
    pool: Pool

    # Numbers

    async def members(self, domain_id: str) -> dict[str, Member]:
        """By host."""
        rows = await self.pool.fetch(
            f"select {_MEMBER} from lockspace_member where domain_id = $1", domain_id
        )
        return {row["host_id"]: Member(**dict(row)) for row in rows}

    async def member(self, domain_id: str, host_id: str) -> Member | None:
        row = await self.pool.fetchrow(
            f"select {_MEMBER} from lockspace_member where domain_id = $1 and host_id = $2",
            domain_id,
            host_id,
        )
        return None if row is None else Member(**dict(row))

    async def resetting(self) -> list[Member]:
        """Those that would reset their hosts, were they lost."""
        rows = await self.pool.fetch(
            f"select {_MEMBER} from lockspace_member where reset_host and boot_id <> '' order by domain_id"
        )
        return [Member(**dict(row)) for row in rows]

    async def memberships(self, host_id: str) -> dict[str, Member]:
        """By domain."""
        rows = await self.pool.fetch(f"select {_MEMBER} from lockspace_member where host_id = $1", host_id)
        return {row["domain_id"]: Member(**dict(row)) for row in rows}

    async def number(self, domain_id: str, host_id: str) -> Member:
        """The host's number, a new one if it has none. Raises Refused(exhausted) when all are taken."""
        while (found := await self.member(domain_id, host_id)) is None:
            taken = {member.number for member in (await self.members(domain_id)).values()}
            number = next((n for n in range(1, MAX_HOST_NUMBER + 1) if n not in taken), 0)
            if not number:
                raise Refused(
                    Kind.EXHAUSTED,
                    f"all {MAX_HOST_NUMBER} numbers of this storage domain's lockspace are given to hosts, some of "
                    "which are gone without having given theirs back: make another storage domain for leases",
                )
            try:
                await commit(self.pool, [self._new(domain_id, host_id, number)])
            except Taken:
                continue
        return found

    def _new(self, domain_id: str, host_id: str, number: int) -> Change:
        return Change(
            """insert into lockspace_member (domain_id, host_id, number, asked, boot_id, generation,
                   io_timeout_seconds, reset_host)
               values ({0}, {1}, {2}, false, '', 0, 0, false) returning 1""",
            (domain_id, host_id, number),
        )

    def adopted(self, domain_id: str, host_id: str, number: int) -> Change:
        """A host holds this number and nobody has written it down: a restored database has forgotten it."""
        return Change(
            """insert into lockspace_member (domain_id, host_id, number, asked, boot_id, generation,
                   io_timeout_seconds, reset_host)
               values ({0}, {1}, {2}, true, '', 0, 0, false) on conflict do nothing""",
            (domain_id, host_id, number),
            guarded=False,
        )

    def asked(self, member: Member) -> Change:
        """Written before the order is: from here on the host may hold the number."""
        return Change(
            """update lockspace_member set asked = true where domain_id = {0} and host_id = {1} and number = {2}
               returning 1""",
            (member.domain_id, member.host_id, member.number),
        )

    def joined(self, host_id: str, boot_id: str, said: LockspaceReport) -> Change:
        return Change(
            """update lockspace_member set asked = true, boot_id = {3}, generation = {4}, io_timeout_seconds = {5},
                   reset_host = {6}
               where domain_id = {0} and host_id = {1} and number = {2}""",
            (
                said.domain_id,
                host_id,
                said.host_number,
                boot_id,
                said.generation,
                said.io_timeout_seconds,
                said.reset_host,
            ),
            guarded=False,
        )

    def ended(self, member: Member) -> Change:
        """The host said that it is not in the lockspace (any more): a reboot ends that."""
        return Change(
            """update lockspace_member set boot_id = '', generation = 0
               where freer_host_id = '' and domain_id = {0} and host_id = {1} and generation = {2}""",
            (member.domain_id, member.host_id, member.generation),
            guarded=False,
        )

    async def dead(self) -> list[Member]:
        """Those whose boot has ended by proof while it held them, and those that are being freed."""
        rows = await self.pool.fetch(
            f"""select {_MEMBER} from lockspace_member m where freer_host_id <> '' or boot_id <> '' and exists (
                    select 1 from host_death d where d.host_id = m.host_id and d.boot_id = m.boot_id)"""
        )
        return [Member(**dict(row)) for row in rows]

    def freeing(self, member: Member, freer_host_id: str) -> Change:
        """Written before the order is: from here on that host may write the lease. "": it will not (any more)."""
        return Change(
            """update lockspace_member set freer_host_id = {4} where domain_id = {0} and host_id = {1}
               and boot_id = {2} and generation = {3} returning 1""",
            (member.domain_id, member.host_id, member.boot_id, member.generation, freer_host_id),
        )

    def freed(self, member: Member) -> Change:
        """Nothing of that boot is left in the lockspace."""
        return Change(
            """update lockspace_member set freer_host_id = '', boot_id = '', generation = 0
               where domain_id = {0} and host_id = {1} and boot_id = {2} and generation = {3} returning 1""",
            (member.domain_id, member.host_id, member.boot_id, member.generation),
        )

    def left(self, domain_id: str, host_id: str) -> Change:
        """It gave its number back, and is the first to get it again."""
        return Change(
            """update lockspace_member set asked = false, boot_id = '', generation = 0
               where domain_id = {0} and host_id = {1}""",
            (domain_id, host_id),
            guarded=False,
        )

    def host_gone(self, host_id: str) -> Change:
        """Of a host that was deleted; what it may still hold is never given to another."""
        return Change(
            "delete from lockspace_member where host_id = {0} and not asked", (host_id,), guarded=False
        )

    # Leases of VMs

    def has_lease(self, domain_id: str, vm_id: str, *, of_disk: bool = False) -> Change:
        """`of_disk`: `vm_id` is a disk's."""
        return Change(
            """insert into vm_lease (domain_id, vm_id, doomed, of_disk) values ({0}, {1}, false, {2})
               on conflict (domain_id, vm_id) do update set doomed = false""",
            (domain_id, vm_id, of_disk),
            guarded=False,
        )

    def doomed(self, vm_id: str, domain_id: str = "") -> Change:
        """`domain_id` "" is every domain."""
        return Change(
            "update vm_lease set doomed = true where vm_id = {0} and ({1}::text = '' or domain_id = {1}::text)",
            (vm_id, domain_id),
            guarded=False,
        )

    def doomed_but(self, vm_ids: list[str]) -> Change:
        """Of VMs whose deletion was never heard."""
        return Change(
            "update vm_lease set doomed = true where not of_disk and not vm_id = any({0}::text[])",
            (vm_ids,),
            guarded=False,
        )

    def removed(self, lease: VmLease) -> Change:
        return Change(
            "delete from vm_lease where domain_id = {0} and vm_id = {1} and doomed",
            (lease.domain_id, lease.vm_id),
            guarded=False,
        )

    async def lease(self, domain_id: str, vm_id: str) -> VmLease | None:
        row = await self.pool.fetchrow(
            "select domain_id, vm_id, doomed from vm_lease where domain_id = $1 and vm_id = $2",
            domain_id,
            vm_id,
        )
        return None if row is None else VmLease(**dict(row))

    async def leases_of(self, vm_id: str) -> list[VmLease]:
        rows = await self.pool.fetch("select domain_id, vm_id, doomed from vm_lease where vm_id = $1", vm_id)
        return [VmLease(**dict(row)) for row in rows]

    async def leases_in(self, domain_id: str) -> list[VmLease]:
        """VMs' alone: those of disks are held for as long as something is written, and keep nothing from changing."""
        sql = "select domain_id, vm_id, doomed from vm_lease where not of_disk and domain_id = $1 order by vm_id"
        rows = await self.pool.fetch(sql, domain_id)
        return [VmLease(**dict(row)) for row in rows]

    async def doomed_leases(self) -> list[VmLease]:
        rows = await self.pool.fetch("select domain_id, vm_id, doomed from vm_lease where doomed limit 1000")
        return [VmLease(**dict(row)) for row in rows]

    def domain_gone(self, domain_id: str) -> list[Change]:
        return [
            Change("delete from lockspace_member where domain_id = {0}", (domain_id,), guarded=False),
            Change("delete from vm_lease where domain_id = {0}", (domain_id,), guarded=False),
        ]
