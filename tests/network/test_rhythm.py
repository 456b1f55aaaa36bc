"""What network does every now and then, done at once."""

from __future__ import annotations

from typing import Any

from services.network import hosts, projection
from services.network.service import make_service
from tests.network.scripted_network import plant
from tests.support.service_process import captured
from volery.contracts.agent import REPORT_SUBJECT
from volery.contracts.base import Owner
from volery.contracts.ids import new_id
from volery.contracts.network import ALLOCATE_NIC, AllocateNic
from volery.runtime.database import open_direct
from volery.runtime.programs import Settings


async def test_addresses_of_vms_that_are_unknown_are_taken_back(configured: Settings) -> None:
    found: list[Any] = []
    async with plant(configured, hosts=0, service=captured(make_service(), found)) as at:
        network = await at.network()
        vm = await at.world.vm(at.center, "known")
        nics = {}
        for name, vm_id in (("orphan", new_id()), ("fresh", new_id()), ("known", vm.id)):
            nics[name] = new_id()
            ask = AllocateNic(nic_id=nics[name], vm_id=vm_id, network_id=network.id)
            await at.bus.ask(ALLOCATE_NIC, ask)
        async with open_direct(configured.database, Owner.NETWORK) as connection:
            old = "update nic set created_at = now() - interval '1 hour' where id <> $1"
            await connection.execute(old, nics["fresh"])
            await connection.execute("delete from vm")
            await projection.release_orphans(found[0])
            left = {row["id"] for row in await connection.fetch("select id from nic")}
        assert left == {nics["fresh"], nics["known"]}


async def test_a_host_that_has_said_nothing_yet_is_asked_once_and_then_waited_for(
    configured: Settings,
) -> None:
    """It begins with a report: thousands of hosts would be asked again while theirs wait for their turn."""
    found: list[Any] = []
    async with plant(configured, hosts=1, service=captured(make_service(), found)) as at:
        silent = await at.world.host(at.center, new_id(), "silent", cluster_id=at.cluster.id)
        heard: list[bytes] = []

        async def hear(message: Any) -> None:
            heard.append(message.data)

        await at.bus.client.subscribe(REPORT_SUBJECT.format(host_id=silent.id), cb=hear)
        await at.bus.client.flush()
        await at.until(lambda: found[0].store.host(silent.id))
        found[0].asked.pop(silent.id, None)
        heard.clear()
        for _ in range(3):
            await hosts.ask_for_reports(found[0])
        await found[0].core.bus.client.flush()
        await at.bus.client.flush()
        assert len(heard) == 1
