"""What a dead host held in a lockspace is freed by another host as soon as its death is proven, and never otherwise."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from msgspec.structs import replace

from tests.storage.scripted_storage import Site, site
from tests.storage.test_lockspaces import able, becomes, joined_by
from tests.support.bell import Bell
from tests.support.runtime import running
from volery.contracts.base import Owner
from volery.contracts.errors import Kind, Refused
from volery.contracts.host import HostStatus
from volery.contracts.ids import new_id
from volery.contracts.leases import FREE_HOST_LEASE, HostLeaseReading
from volery.contracts.liveness import LIVENESS_CHANGED, HostLiveness, LivenessState, ProofKind
from volery.contracts.storage import PREPARE_LEASE, PrepareLease, StorageDomain
from volery.runtime.database import open_direct
from volery.runtime.programs import Settings

FREE = FREE_HOST_LEASE.kind


@dataclass
class Party:
    """Hosts that have joined the lockspace of a domain and said so, and an ha that says what the test holds."""

    at: Site
    ha: Bell
    settings: Settings
    domain: StorageDomain = field(init=False)

    async def begin(self) -> None:
        numbers = range(len(self.at.hosts))
        for number in numbers:
            await able(self.at, number)
        self.domain = await joined_by(self.at, await self.at.new_domain(leases=True), *numbers)
        await self.at.until(lambda: self.known(*numbers))

    async def known(self, *numbers: int) -> bool:
        """Whether storage has written down under which boots these hosts joined."""
        async with open_direct(self.settings.database, Owner.STORAGE) as connection:
            rows = await connection.fetch("select boot_id, generation from lockspace_member")
        boots = {row["boot_id"] for row in rows if row["generation"]}
        return boots >= {self.at.hosts[n].agent.boot_id for n in numbers}

    async def believed_dead(self, number: int) -> bool:
        """Whether storage has written down that this host's boot has ended."""
        async with open_direct(self.settings.database, Owner.STORAGE) as connection:
            boots = await connection.fetch("select boot_id from host_death")
        return self.at.hosts[number].agent.boot_id in {row["boot_id"] for row in boots}

    def lease(self, number: int) -> HostLeaseReading:
        """A host's lease, on the storage."""
        leases = self.at.shelf.lockspaces[self.domain.id]
        return next(one for one in leases.values() if one.holder == self.at.rows[number].id)

    def is_free(self, number: int) -> bool:
        return self.lease(number).timestamp == 0

    async def freed(self, number: int) -> None:
        async def so() -> bool:
            return self.is_free(number)

        await self.at.until(so)

    def asked(self, number: int) -> list[Any]:
        return self.at.hosts[number].agent.begun(FREE)

    def proof(self, number: int) -> HostLiveness:
        """What ha says from now on when it is asked."""
        boot_id = self.at.hosts[number].agent.boot_id
        return self.ha.holds(self.at.rows[number].id, boot_id, LivenessState.DEAD, boot_id)

    async def falls(self, number: int) -> None:
        """Silent, and nothing is proven."""
        await self.at.hosts[number].agent.kill()
        await becomes(self.at, number, status=HostStatus.NON_RESPONSIVE)

    async def dies(self, number: int) -> None:
        await self.falls(number)
        await self.ha.says(LIVENESS_CHANGED, self.proof(number))

    async def boots(self, number: int) -> None:
        former = self.at.hosts[number].agent.boot_id
        await self.at.hosts[number].boot()
        boot_id = self.at.hosts[number].agent.boot_id
        said = self.ha.holds(self.at.rows[number].id, boot_id, LivenessState.UP, former)
        await self.ha.says(LIVENESS_CHANGED, said)
        await becomes(self.at, number, status=HostStatus.UP, boot_id=boot_id)


@asynccontextmanager
async def party(settings: Settings, hosts: int = 2) -> AsyncIterator[Party]:
    ha = Bell()
    async with running(settings, ha.service()), site(settings, hosts=hosts) as at:
        made = Party(at, ha, settings)
        await made.begin()
        yield made


async def test_a_dead_hosts_lease_is_freed_at_once_and_its_next_boot_joins_again(
    configured: Settings,
) -> None:
    async with party(configured) as made:
        at, before = made.at, made.lease(0)
        await made.dies(0)
        await made.freed(0)
        assert made.lease(0) == replace(before, timestamp=0)
        (order,) = made.asked(1)
        assert (order.host_number, order.generation) == (
            at.hosts[0].joined[made.domain.id].host_number,
            before.generation,
        )
        await joined_by(at, made.domain, 1)
        await made.boots(0)
        await at.until(lambda: made.known(0))
        assert made.lease(0).generation == before.generation + 1
        await joined_by(at, made.domain, 0, 1)
        await at.hosts[0].agent.report("storage")
        await at.hosts[0].agent.until_committed("storage")
        assert not made.is_free(0)
        assert len(made.asked(1)) == 1


async def test_a_persons_word_alone_frees_nothing(configured: Settings) -> None:
    async with party(configured) as made:
        at = made.at
        await made.falls(0)
        said = made.proof(0)
        assert said.proof is not None
        said = replace(said, proof=replace(said.proof, kind=ProofKind.PERSON))
        made.ha.knows(said)
        await made.ha.says(LIVENESS_CHANGED, said)
        await at.until(lambda: made.believed_dead(0))
        ask = PrepareLease(storage_domain_id=made.domain.id, vm_id=new_id(), host_id=at.rows[1].id)
        await at.bus.ask(PREPARE_LEASE, ask)
        assert not made.is_free(0)
        assert made.asked(1) == []


async def test_a_vms_lease_is_prepared_after_what_the_dead_host_held_is_free(configured: Settings) -> None:
    async with party(configured) as made:
        at = made.at
        gate = at.hosts[1].held[FREE] = asyncio.Event()
        await made.dies(0)
        await at.until(lambda: began(made, 1))
        ask = PrepareLease(storage_domain_id=made.domain.id, vm_id=new_id(), host_id=at.rows[1].id)
        preparing = asyncio.create_task(at.bus.ask(PREPARE_LEASE, ask))
        done, _ = await asyncio.wait({preparing}, timeout=0.5)
        assert not done
        gate.set()
        await preparing
        assert made.is_free(0)


async def began(made: Party, number: int) -> bool:
    return bool(made.asked(number))


async def test_nothing_is_freed_without_a_proof_of_the_boot_that_holds_it(configured: Settings) -> None:
    async with party(configured, hosts=3) as made:
        at = made.at
        await made.falls(0)
        rows, boot_id = at.rows, at.hosts[0].agent.boot_id
        of_another = made.ha.holds(rows[0].id, boot_id, LivenessState.NON_RESPONSIVE, new_id())
        await made.ha.says(LIVENESS_CHANGED, of_another)
        await made.dies(2)
        await made.freed(2)
        assert not made.is_free(0)
        ask = PrepareLease(storage_domain_id=made.domain.id, vm_id=new_id(), host_id=rows[1].id)
        await at.bus.ask(PREPARE_LEASE, ask)
        assert not made.is_free(0)


async def test_a_proof_that_was_voided_since_frees_nothing(configured: Settings) -> None:
    """Nobody could free it when it was proven; when somebody can, ha says that the boot lives."""
    async with party(configured) as made:
        at = made.at
        at.hosts[1].refusing[FREE] = Refused(Kind.UNAVAILABLE, "the storage could not be read")
        await made.dies(0)
        await at.until(lambda: began(made, 1))
        boot_id = at.hosts[0].agent.boot_id
        made.ha.holds(at.rows[0].id, boot_id, LivenessState.UP)
        at.hosts[1].refusing.clear()
        count = len(made.asked(1))
        ask = PrepareLease(storage_domain_id=made.domain.id, vm_id=new_id(), host_id=at.rows[1].id)
        await at.bus.ask(PREPARE_LEASE, ask)
        assert not made.is_free(0)
        assert len(made.asked(1)) == count


async def test_a_proof_that_is_voided_while_its_order_is_under_way_ends_the_order(
    configured: Settings,
) -> None:
    soon = {"VOLERY_STORAGE_FREE_LEASE_SECONDS": "0.5"}
    async with party(dataclasses.replace(configured, environ=soon)) as made:
        at, before = made.at, made.lease(0)
        at.hosts[1].held[FREE] = asyncio.Event()
        await made.dies(0)
        await at.until(lambda: began(made, 1))
        made.ha.holds(at.rows[0].id, at.hosts[0].agent.boot_id, LivenessState.UP)
        await at.hosts[0].agent.start()
        await becomes(at, 0, status=HostStatus.UP)

        async def ended() -> bool:
            async with open_direct(configured.database, Owner.STORAGE) as connection:
                return not await connection.fetch("select 1 from lockspace_member where freer_host_id <> ''")

        await at.until(ended, 30.0)
        assert made.lease(0) == before
        assert await made.known(0), "its number is its own as before"


async def test_a_number_is_not_joined_while_it_may_be_written_free(configured: Settings) -> None:
    async with party(configured, hosts=2) as made:
        at, before = made.at, made.lease(0)
        gate = at.hosts[1].held[FREE] = asyncio.Event()
        await made.dies(0)
        await at.until(lambda: began(made, 1))
        await made.boots(0)
        await at.hosts[0].agent.until_committed("storage")
        await asyncio.sleep(1.0)  # longer than a join takes here
        assert made.lease(0) == before
        gate.set()
        await at.until(lambda: made.known(0))
        assert made.lease(0).generation == before.generation + 1
        assert not made.is_free(0)


async def test_when_the_host_that_frees_dies_another_does(configured: Settings) -> None:
    async with party(configured, hosts=3) as made:
        at = made.at
        gates = {number: asyncio.Event() for number in (1, 2)}
        for number, gate in gates.items():
            at.hosts[number].held[FREE] = gate

        async def first() -> int:
            return next((number for number in (1, 2) if made.asked(number)), 0)

        await made.dies(0)
        freer = await at.until(first)
        gates[3 - freer].set()
        await made.dies(freer)
        await made.freed(0)
        await made.freed(freer)
        assert len(made.asked(freer)) == 1


async def test_a_number_that_is_another_boots_already_is_left_alone(configured: Settings) -> None:
    async with party(configured) as made:
        at = made.at
        number = at.hosts[0].joined[made.domain.id].host_number
        leases = at.shelf.lockspaces[made.domain.id]
        leases[number] = replace(leases[number], generation=leases[number].generation + 1)
        await made.dies(0)

        async def settled() -> bool:
            async with open_direct(configured.database, Owner.STORAGE) as connection:
                rows = await connection.fetch(
                    "select 1 from lockspace_member where host_id = $1 and boot_id = ''", at.rows[0].id
                )
            return bool(rows)

        await at.until(settled)
        assert not made.is_free(0)
        assert len(made.asked(1)) == 1
