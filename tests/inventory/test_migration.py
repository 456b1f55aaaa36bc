"""A migration that fails leaves the VM where it was, under an epoch that its host knows too."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime

from tests.inventory.world import Machine, World, until, world_of
from tests.support.speaker import Speaker
from volery.contracts import network as contract
from volery.contracts.base import Owner
from volery.contracts.cluster import GetById
from volery.contracts.domain_orders import MIGRATE_DOMAIN
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
from volery.contracts.operation import Operation, OperationState
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
