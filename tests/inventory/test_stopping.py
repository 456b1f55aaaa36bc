"""What becomes of a VM whose stop did not stop it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from services.inventory.service import service as inventory
from services.scheduler.service import service as scheduler
from tests.support.plane import (
    Plane,
    default_cluster,
    ended,
    enrolled_agent,
    plane_servers,
    running_plane,
    succeeded,
    until_host,
)
from volery.contracts.cluster import GetById
from volery.contracts.host import HostStatus
from volery.contracts.operation import OperationState
from volery.contracts.vm import (
    ACT_ON_VM,
    CREATE_VM,
    GET_VM,
    STOP_VM,
    ActOnVm,
    CreateVm,
    DesiredState,
    StopVm,
    VmAction,
    VmStatus,
)

MIB = 1024 * 1024


@pytest.fixture
def plane() -> Iterator[Plane]:
    with plane_servers() as made:
        yield made


async def test_a_paused_vm_that_would_not_stop_is_still_paused(plane: Plane) -> None:
    async with running_plane(plane, inventory, scheduler) as bus:
        cluster = await default_cluster(bus)
        agent = await enrolled_agent(bus, plane, cluster, "h1", VOLERY_AGENT_LIBVIRT_URI="test:///default")
        agent.start()
        try:
            await until_host(bus, agent.host.id, HostStatus.UP)
            ask = CreateVm(name="vm", cluster_id=cluster.id, memory_bytes=32 * MIB, start=True)
            vm_id = (await succeeded(bus, await bus.ask(CREATE_VM, ask))).object_id
            await succeeded(bus, await bus.ask(ACT_ON_VM, ActOnVm(id=vm_id, action=VmAction.PAUSE)))
            # A paused guest hears neither its agent nor ACPI.
            stop = await ended(bus, await bus.ask(STOP_VM, StopVm(id=vm_id, timeout_seconds=1)))
            assert stop.state is OperationState.FAILED
            vm = await bus.ask(GET_VM, GetById(id=vm_id))
            assert (vm.status, vm.desired) == (VmStatus.PAUSED, DesiredState.PAUSED)
        finally:
            agent.stop()
