"""A migration that fails leaves the VM where it was, under an epoch that its host knows too."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from datetime import UTC, datetime

from msgspec.structs import replace

from tests.inventory.test_deaths import deadline_now, pass_the_deadline
from tests.inventory.world import (
    Machine,
    World,
    found_cluster,
    inventory_of,
    surroundings,
    until,
    world_of,
)
from tests.support.speaker import Speaker
from volery.contracts import network as contract
from volery.contracts.base import Owner
from volery.contracts.cluster import GetById
from volery.contracts.domain import DomainState
from volery.contracts.domain_orders import FORGET_DOMAIN, MIGRATE_DOMAIN, RUN_DOMAIN, MigrateDomain
from volery.contracts.errors import Kind, Refused
from volery.contracts.ids import new_id
from volery.contracts.network import (
    ALLOCATE_NIC,
    GET_NETWORK,
    PREPARE_NETWORKS,
    AllocatedNic,
    AllocateNic,
    NetworkBridge,
    PreparedNetworks,
    PrepareNetworks,
)
from volery.contracts.network_orders import NetworkKind
from volery.contracts.operation import GET_OPERATION, GetOperation, Operation, OperationState
from volery.contracts.vm import MIGRATE_VM, MigrateVm, NewNic, Vm, VmStatus
from volery.runtime.bus import LOST, Caller
from volery.runtime.database import open_direct
from volery.runtime.programs import Settings


@dataclass
class Network(Speaker):
    """Prepares every network, unless it is told not to."""

    owner: Owner = Owner.NETWORK
    refusals: dict[str, Refused] = field(default_factory=dict)
    """Host → how the next question about it is refused."""
    data_center_id: str = ""

    def __post_init__(self) -> None:
        self.answers = [
            (GET_NETWORK, self._get),
            (ALLOCATE_NIC, self._allocate),
            (PREPARE_NETWORKS, self._prepare),
        ]

    async def _get(self, _: Speaker, ask: GetById, caller: Caller) -> contract.Network:
        now = datetime.now(UTC)
        return contract.Network(
            id=ask.id,
            revision=1,
            created_at=now,
            updated_at=now,
            name="office",
            data_center_id=self.data_center_id,
            kind=NetworkKind.BRIDGE,
        )

    async def _allocate(self, _: Speaker, ask: AllocateNic, caller: Caller) -> AllocatedNic:
        return AllocatedNic(nic_id=ask.nic_id, mac=ask.mac)

    async def _prepare(self, _: Speaker, ask: PrepareNetworks, caller: Caller) -> PreparedNetworks:
        if (refusal := self.refusals.pop(ask.host_id, None)) is not None:
            raise refusal
        bridges = tuple(NetworkBridge(network_id=n, bridge="br0", mtu=1500) for n in ask.network_ids)
        return PreparedNetworks(bridges=bridges)


async def fail_to_move(
    world: World, network: Network, here: Machine, keeping: Refused
) -> tuple[Vm, Operation]:
    """A migration that fails, and its source's network at the moment when the source is to keep the VM."""
    assert world.cluster is not None
    network.data_center_id = world.cluster.data_center_id
    vm = await world.vm(nics=(NewNic(mac="52:54:00:00:00:01", network_id=new_id()),))
    assert vm.host_id == here.id
    here.refusals[MIGRATE_DOMAIN.kind] = Refused(Kind.CONFLICT, "cannot migrate")
    network.refusals[here.id] = keeping
    op = await world.ended(await world.bus.ask(MIGRATE_VM, MigrateVm(id=vm.id)))
    assert op.state is OperationState.FAILED
    assert not network.refusals
    return await world.vm_is(vm.id, VmStatus.UP), op


async def test_a_source_is_told_its_epoch_also_when_an_answer_on_the_way_got_lost(
    configured: Settings,
) -> None:
    network = Network()
    async with world_of(configured, network.service()) as (world, (here, there)):
        lost = Refused(Kind.TIMEOUT, "it did not answer", **{LOST: True})
        vm, _ = await fail_to_move(world, network, here, lost)
        assert vm.host_id == here.id
        assert here.domains[vm.id].epoch == vm.epoch
        assert not there.domains


async def test_a_source_that_could_not_be_told_its_epoch_is_told_when_it_reports(
    configured: Settings,
) -> None:
    network = Network()
    async with world_of(configured, network.service()) as (world, (here, _)):
        vm, _ = await fail_to_move(world, network, here, Refused(Kind.CONFLICT, "eth1 has no link"))
        assert here.domains[vm.id].epoch < vm.epoch, "nobody believes what it says"
        await here.agent.report("inventory")

        async def told() -> bool:
            return here.domains[vm.id].epoch == vm.epoch

        await until(told)
        assert (await world.get(vm.id)).host_id == here.id


async def test_a_source_that_was_reset_before_it_was_told_its_epoch_starts_nothing(
    configured: Settings,
) -> None:
    """Its next boot gets the order, and the VM, whose end with the former boot is known by then, may be brought back
    elsewhere."""
    async with world_of(configured) as (world, (here, _)):
        vm = await world.vm()
        fails = here.held[MIGRATE_DOMAIN.kind] = asyncio.Event()
        here.refusals[MIGRATE_DOMAIN.kind] = Refused(Kind.CONFLICT, "cannot migrate")
        here.begun.clear()
        op = await world.bus.ask(MIGRATE_VM, MigrateVm(id=vm.id))
        await here.begun.wait()
        here.agent.deaf = True
        fails.set()

        async def told() -> bool:
            return here.agent.unheard > 0

        await until(told, "the order to keep it is under way")
        await here.die()
        here.agent.deaf = False
        await here.boot()
        assert (await world.ended(op)).state is OperationState.FAILED
        assert (await world.vm_is(vm.id, VmStatus.DOWN)).status_reason == "host_died"
        assert here.agent.begun(RUN_DOMAIN.kind)[-1].goes_on
        assert [vm_id for _, vm_id in here.started] == [vm.id]
        assert not here.domains


async def test_one_that_ended_before_its_source_was_told_its_epoch_has_ended(configured: Settings) -> None:
    """Its end is told under an epoch that is the VM's no more."""
    async with world_of(configured) as (world, (here, _)):
        vm = await world.vm()
        here.refusals[MIGRATE_DOMAIN.kind] = Refused(Kind.CONFLICT, "cannot migrate")
        keeps = here.held[RUN_DOMAIN.kind] = asyncio.Event()
        op = await world.bus.ask(MIGRATE_VM, MigrateVm(id=vm.id))

        async def keeping() -> bool:
            return len(here.agent.begun(RUN_DOMAIN.kind)) > 1

        await until(keeping)
        await here.tell(vm.id, DomainState.GONE, vm.epoch, "shutdown")
        keeps.set()
        assert (await world.ended(op)).state is OperationState.FAILED
        await world.vm_is(vm.id, VmStatus.DOWN)
        assert len(here.started) == 1


async def begun_to_move(
    world: World, vm: Vm, here: Machine, there: Machine
) -> tuple[Operation, asyncio.Event]:
    """A migration whose destination has just made a report, without the VM, that is late."""
    moves = here.held[MIGRATE_DOMAIN.kind] = asyncio.Event()
    here.begun.clear()
    op = await world.bus.ask(MIGRATE_VM, MigrateVm(id=vm.id))
    await here.begun.wait()
    there.agent.muted = True
    await there.agent.report("inventory")
    return op, moves


async def test_a_report_from_before_it_arrived_does_not_end_it(configured: Settings) -> None:
    async with world_of(configured) as (world, (here, there)):
        vm = await world.vm(ha=True)
        op, moves = await begun_to_move(world, vm, here, there)
        moves.set()
        assert (await world.ended(op)).state is OperationState.SUCCEEDED
        there.agent.muted = False
        await there.agent.until_committed("inventory")
        assert (await world.vm_is(vm.id, VmStatus.UP)).host_id == there.id
        assert not there.agent.begun(FORGET_DOMAIN.kind)
        # What really isn't there has ended.
        there.domains.clear()
        await there.agent.report("inventory")
        await world.vm_is(vm.id, VmStatus.DOWN)


async def test_a_vm_that_was_edited_smaller_asks_for_what_its_domain_has_until_it_is_started_anew(
    configured: Settings,
) -> None:
    async with world_of(configured) as (world, (here, there)):
        vm = await world.vm()
        domain = here.domains[vm.id]
        here.domains[vm.id] = replace(domain, memory_bytes=4 * vm.memory_bytes, vcpus=6)
        await here.agent.report("inventory")
        await here.agent.until_committed("inventory")
        op = await world.bus.ask(MIGRATE_VM, MigrateVm(id=vm.id, host_id=there.id))
        assert (await world.ended(op)).state is OperationState.SUCCEEDED
        need = world.scheduler.asked[-1].need
        assert (need.memory_bytes, need.vcpus) == (4 * vm.memory_bytes, 6)


async def test_one_that_arrived_and_that_nobody_saw_there_ends_once_its_host_was_asked(
    configured: Settings,
) -> None:
    async with world_of(configured) as (world, (here, there)):
        vm = await world.vm()
        op, moves = await begun_to_move(world, vm, here, there)
        moves.set()
        assert (await world.ended(op)).state is OperationState.SUCCEEDED
        there.domains.clear()
        spool = there.agent.spools["inventory"]
        spool.waiting.clear()  # no word of it ever comes
        there.agent.muted = False
        await there.agent.report("inventory")
        await world.vm_is(vm.id, VmStatus.DOWN)


async def test_whether_it_has_moved_is_not_read_in_an_older_report(configured: Settings) -> None:
    """The source doesn't know; the destination would be told to forget the VM that runs nowhere else."""
    async with world_of(configured) as (world, (here, there)):
        vm = await world.vm()

        async def move_unnoticed(ask: MigrateDomain) -> None:
            await here.moved(ask)
            raise Refused(Kind.UNAVAILABLE, "the agent was restarted meanwhile")

        here.agent.does(MIGRATE_DOMAIN, here.gated(MIGRATE_DOMAIN.kind, move_unnoticed))
        op, moves = await begun_to_move(world, vm, here, there)
        spool = there.agent.spools["inventory"]
        older, arrival = spool.head, spool.head + 1
        moves.set()

        async def asked() -> bool:
            return spool.head > arrival

        await until(asked)
        assert there.agent.client is not None
        await there.agent.client.publish(*spool.waiting[older])

        async def heard() -> bool:
            return spool.confirmed >= older

        await until(heard)
        there.agent.muted = False
        assert (await world.ended(op)).state is OperationState.SUCCEEDED
        assert (await world.vm_is(vm.id, VmStatus.UP)).host_id == there.id
        assert not there.agent.begun(FORGET_DOMAIN.kind)


async def test_one_that_has_ended_by_its_deadline_does_not_begin_again(configured: Settings) -> None:
    """What is still undone is told by `outcome_pending`: whoever waited for its end has gone."""
    async with surroundings(configured) as world:
        async with inventory_of(world):
            await found_cluster(world)
            here, there = [await world.machine(name) for name in ("h1", "h2")]
            vm = await world.vm()
            here.held[MIGRATE_DOMAIN.kind] = asyncio.Event()
            here.begun.clear()
            op = await world.bus.ask(MIGRATE_VM, MigrateVm(id=vm.id))
            await here.begun.wait()
        await pass_the_deadline(world, op)
        forgets = there.held[FORGET_DOMAIN.kind] = asyncio.Event()
        there.begun.clear()
        async with inventory_of(world):
            await there.begun.wait()
            now = await world.bus.ask(GET_OPERATION[Owner.INVENTORY], GetOperation(id=op.id))
            assert (now.state, now.outcome_pending) == (OperationState.FAILED, True)
            forgets.set()
            assert (await world.ended(op)).state is OperationState.FAILED
            assert (await world.vm_is(vm.id, VmStatus.UP)).host_id == here.id


async def test_whoever_waits_for_a_silent_destination_is_told_so_by_the_deadline(
    configured: Settings,
) -> None:
    """Only that host can say whether the VM arrived: nothing of it is touched, and its end is told as not known yet."""
    async with surroundings(configured) as world:
        async with inventory_of(world):
            await found_cluster(world)
            here, there = [await world.machine(name) for name in ("h1", "h2")]
            vm = await world.vm()
            moves = here.held[MIGRATE_DOMAIN.kind] = asyncio.Event()
            here.refusals[MIGRATE_DOMAIN.kind] = Refused(
                Kind.UNAVAILABLE, "the agent was restarted meanwhile"
            )
            here.begun.clear()
            op = await world.bus.ask(MIGRATE_VM, MigrateVm(id=vm.id))
            await here.begun.wait()
        await there.agent.kill()
        await deadline_now(world, op)
        moves.set()
        async with inventory_of(world):

            async def told() -> bool:
                now = await world.bus.ask(GET_OPERATION[Owner.INVENTORY], GetOperation(id=op.id))
                return (now.state, now.outcome_pending) == (OperationState.FAILED, True)

            await until(told)
            assert (await world.get(vm.id)).busy_with == op.id
            await there.agent.start()
            assert (await world.ended(op)).state is OperationState.FAILED
            assert (await world.vm_is(vm.id, VmStatus.UP)).host_id == here.id


AWAY_ONCE = """
create sequence refused;
create function refuse_once() returns trigger language plpgsql as $$
begin
    if nextval('refused') = 1 then
        raise exception 'the database goes away' using errcode = 'admin_shutdown';
    end if;
    return new;
end $$;
create trigger refuse_once before update on operation for each row
    when (old.private not like '%"epoch":%' and new.private like '%"epoch":%') execute function refuse_once();
"""


async def test_a_move_whose_beginning_was_interrupted_begins_again(configured: Settings) -> None:
    """Its epoch is raised with the record that says so, or not at all: one that nobody knows of would leave the VM between
    two hosts."""
    async with world_of(configured) as (world, (here, there)):
        vm = await world.vm()
        async with open_direct(configured.database, "inventory") as connection:
            await connection.execute(AWAY_ONCE)
            op = await world.ended(await world.bus.ask(MIGRATE_VM, MigrateVm(id=vm.id)))
            assert await connection.fetchval("select last_value from refused") > 1, "nothing was interrupted"
        assert op.state is OperationState.SUCCEEDED, op.problem
        moved = await world.get(vm.id)
        assert (moved.host_id, moved.epoch) == (there.id, vm.epoch + 1)
        assert there.domains[vm.id].epoch == moved.epoch
        assert not here.domains
