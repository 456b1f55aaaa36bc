"""Logical networks: made, on every host that should have them, deleted; and what is refused."""

from __future__ import annotations

import asyncio
import ipaddress

import pytest

from tests.network.scripted_network import plant, refusing
from volery.contracts.cluster import DeleteById, GetById
from volery.contracts.errors import Kind, Refused
from volery.contracts.host import HOST_CHANGED, HostStatus
from volery.contracts.ids import new_id
from volery.contracts.network import (
    ALLOCATE_NIC,
    CREATE_NETWORK,
    DELETE_NETWORK,
    GET_NETWORK,
    LIST_ATTACHMENTS,
    LIST_NETWORKS,
    PREPARE_NETWORKS,
    SETUP_HOST_NETWORKS,
    UPDATE_NETWORK,
    AllocateNic,
    CreateNetwork,
    PrepareNetworks,
    SetupHostNetworks,
    UpdateNetwork,
)
from volery.contracts.network_orders import NetworkKind
from volery.contracts.operation import ListQuery
from volery.runtime.programs import Settings


async def test_a_network_gets_onto_every_host_and_can_be_prepared(configured: Settings) -> None:
    async with plant(configured) as at:
        network = await at.network()
        assert network.bridge.startswith("v")
        assert len(network.bridge) <= 15
        ask = PrepareNetworks(host_id=at.rows[0].id, network_ids=(network.id,))
        prepared = await at.bus.ask(PREPARE_NETWORKS, ask)
        assert prepared.bridges[0].bridge == network.bridge
        ready = await at.until_ready(network, 2)
        assert ready.problems == {}
        await at.bus.ask(DELETE_NETWORK, DeleteById(id=network.id))

        async def gone() -> bool:
            return all(host.networks == () for host in at.hosts)

        await at.until(gone)
        with pytest.raises(Refused, match="there is no network"):
            await at.bus.ask(PREPARE_NETWORKS, ask)


async def test_vxlan_peers_follow_the_hosts(configured: Settings) -> None:
    async with plant(configured, hosts=3) as at:
        network = await at.network(kind=NetworkKind.VXLAN)
        assert network.mtu == 1450
        assert network.vni > 0
        await at.until_ready(network, 3)
        assert at.hosts[0].networks[0].peers == ("10.0.0.2", "10.0.0.3")
        assert at.hosts[0].networks[0].local_address == "10.0.0.1"
        silent = at.rows[2]
        fields = {f: getattr(silent, f) for f in silent.__struct_fields__}
        await at.world.put(HOST_CHANGED, type(silent)(**fields | {"status": HostStatus.NON_RESPONSIVE}))
        await at.until_ready(network, 2)
        assert at.hosts[0].networks[0].peers == ("10.0.0.2", "10.0.0.3")
        await at.world.put(HOST_CHANGED, type(silent)(**fields | {"address": "10.0.0.9"}))

        async def moved() -> bool:
            return at.hosts[0].networks[0].peers == ("10.0.0.2", "10.0.0.9")

        await at.until(moved)


async def test_what_volery_picks_never_overlaps(configured: Settings) -> None:
    async with plant(configured, hosts=0) as at:
        nats = await asyncio.gather(*(at.network(f"nat{i}", kind=NetworkKind.NAT) for i in range(12)))
        vxlans = await asyncio.gather(*(at.network(f"vx{i}", kind=NetworkKind.VXLAN) for i in range(12)))
        subnets = [ipaddress.IPv4Network(n.subnet) for n in nats]
        assert not any(a.overlaps(b) for i, a in enumerate(subnets) for b in subnets[:i])
        assert len({n.vni for n in vxlans}) == 12
        assert len({n.bridge for n in (*nats, *vxlans)}) == 24
        whole = str(subnets[0].supernet(new_prefix=16))
        with pytest.raises(Refused, match="overlaps"):
            await at.network("big", kind=NetworkKind.NAT, subnet=whole)
        with pytest.raises(Refused, match="another network's"):
            await at.network("same", kind=NetworkKind.VXLAN, vni=vxlans[0].vni)
        with pytest.raises(Refused, match="already"):
            await at.network("nat0")


async def test_one_bad_network_keeps_no_other_away(configured: Settings) -> None:
    async with plant(configured, hosts=1) as at:
        at.hosts[0].refuse = refusing(Refused(Kind.CONFLICT, "eth0 carries the host's own address"), "bad")
        good = await at.network("good")
        await at.until_ready(good, 1)
        bad = await at.network("bad")
        other = await at.network("other")
        await at.until_ready(other, 1)

        async def told() -> bool:
            return (await at.get(bad)).problems != {}

        await at.until(told)
        assert at.hosts[0].names() == {"good", "other"}
        assert (await at.get(bad)).problems == {at.rows[0].id: "eth0 carries the host's own address"}
        both = PrepareNetworks(host_id=at.rows[0].id, network_ids=(good.id, bad.id))
        with pytest.raises(Refused, match="the host's own address") as refused:
            await at.bus.ask(PREPARE_NETWORKS, both)
        assert refused.value.kind is Kind.UNAVAILABLE
        await at.bus.ask(
            PREPARE_NETWORKS, PrepareNetworks(host_id=at.rows[0].id, network_ids=(good.id, other.id))
        )
        at.hosts[0].refuse = None
        await at.bus.ask(UPDATE_NETWORK, UpdateNetwork(id=bad.id, mtu=1400))
        await at.until_ready(bad, 1)
        assert at.hosts[0].names() == {"good", "bad", "other"}


async def test_a_host_that_lost_its_bridges_gets_them_again(configured: Settings) -> None:
    async with plant(configured, hosts=1) as at:
        network = await at.network()
        await at.until_ready(network, 1)
        host = at.hosts[0]
        host.broken.add(network.id)
        before = host.applies()
        await host.agent.report("network")

        async def again() -> bool:
            return host.applies() > before and not host.broken

        await at.until(again)
        await at.until_ready(network, 1)
        await host.agent.kill()
        host.networks = ()
        host.agent.lose_journal()
        await host.agent.start()

        async def back() -> bool:
            return host.names() == {"n1"}

        await at.until(back)


async def test_nothing_is_ordered_twice_without_need(configured: Settings) -> None:
    async with plant(configured, hosts=1) as at:
        network = await at.network()
        await at.until_ready(network, 1)
        applied = at.hosts[0].applies()
        await at.bus.ask(UPDATE_NETWORK, UpdateNetwork(id=network.id, description="nothing for hosts"))
        for _ in range(3):
            await at.hosts[0].agent.report("network")
            await at.hosts[0].agent.until_committed("network")
        other = await at.network("other")
        await at.until_ready(other, 1)
        assert at.hosts[0].applies() == applied + 1


async def test_a_vlan_waits_for_its_nic(configured: Settings) -> None:
    async with plant(configured, hosts=1) as at:
        vlan = await at.network("v7", vlan=7)
        host_id = at.rows[0].id

        async def told() -> bool:
            return "no NIC" in (await at.get(vlan)).problems.get(host_id, "")

        await at.until(told)
        with pytest.raises(Refused, match="no NIC of host h1 was chosen"):
            await at.bus.ask(PREPARE_NETWORKS, PrepareNetworks(host_id=host_id, network_ids=(vlan.id,)))
        setup = SetupHostNetworks(host_id=host_id, nics={vlan.id: "eth1"}, check_seconds=5)
        op = await at.ended(await at.bus.ask(SETUP_HOST_NETWORKS, setup))
        assert op.state == "succeeded", op.problem
        await at.until_ready(vlan, 1)
        assert (at.hosts[0].networks[0].nic, at.hosts[0].networks[0].vlan) == ("eth1", 7)
        assert len((await at.bus.ask(LIST_ATTACHMENTS, ListQuery())).items) == 1
        same = await at.network("again7", vlan=7)
        with pytest.raises(Refused, match="carries network v7 already"):
            await at.bus.ask(SETUP_HOST_NETWORKS, SetupHostNetworks(host_id=host_id, nics={same.id: "eth1"}))
        for nics, sentence in (
            ({vlan.id: "eth9"}, "has no NIC"),
            ({new_id(): "eth0"}, "there is no network"),
            ({}, "which network"),
        ):
            with pytest.raises(Refused, match=sentence):
                await at.bus.ask(SETUP_HOST_NETWORKS, SetupHostNetworks(host_id=host_id, nics=nics))


async def test_a_setup_that_cuts_the_host_off_changes_nothing(configured: Settings) -> None:
    async with plant(configured, hosts=1) as at:
        network = await at.network()
        await at.until_ready(network, 1)
        lost = Refused(
            Kind.UNAVAILABLE, "with these networks the host lost the control plane", rolled_back=True
        )

        def refuse(ask: object) -> None:
            if any(n.nic == "eth0" for n in ask.networks):  # type: ignore[attr-defined]
                raise lost

        at.hosts[0].refuse = refuse
        ask = SetupHostNetworks(host_id=at.rows[0].id, nics={network.id: "eth0"})
        op = await at.ended(await at.bus.ask(SETUP_HOST_NETWORKS, ask))
        assert op.state == "failed"
        assert op.problem is not None
        assert "lost the control plane" in op.problem.message
        assert (await at.bus.ask(LIST_ATTACHMENTS, ListQuery())).items == ()
        assert at.hosts[0].networks[0].nic == ""
        assert (await at.get(network)).ready_host_ids == (at.rows[0].id,)


async def test_a_network_in_use_stays(configured: Settings) -> None:
    async with plant(configured, hosts=0) as at:
        network = await at.network()
        vm = await at.world.vm(at.center, "web")
        nic_id = new_id()
        await at.bus.ask(ALLOCATE_NIC, AllocateNic(nic_id=nic_id, vm_id=vm.id, network_id=network.id))

        async def named() -> bool:
            with pytest.raises(Refused) as refused:
                await at.bus.ask(DELETE_NETWORK, DeleteById(id=network.id))
            return "VM web" in refused.value.message

        await at.until(named)
        await at.world.delete_vm(vm)

        async def freed() -> bool:
            try:
                await at.bus.ask(DELETE_NETWORK, DeleteById(id=network.id))
            except Refused:
                return False
            return True

        await at.until(freed)
        with pytest.raises(Refused, match="there is no network"):
            await at.bus.ask(GET_NETWORK, GetById(id=network.id))


async def test_networks_of_a_cluster_are_on_its_hosts_alone(configured: Settings) -> None:
    async with plant(configured, hosts=1) as at:
        other = await at.world.cluster(at.center, "c2")
        network = await at.network("n", cluster_ids=(other.id,))
        everywhere = await at.network("all")
        await at.until_ready(everywhere, 1)
        assert at.hosts[0].names() == {"all"}
        with pytest.raises(Refused, match="other clusters"):
            await at.bus.ask(
                PREPARE_NETWORKS, PrepareNetworks(host_id=at.rows[0].id, network_ids=(network.id,))
            )
        await at.bus.ask(UPDATE_NETWORK, UpdateNetwork(id=network.id, cluster_ids=(at.cluster.id,)))
        await at.until_ready(network, 1)


BAD: list[tuple[dict[str, object], str]] = [
    ({"name": "\x00"}, "control characters"),
    ({"name": ""}, "1 to 255"),
    ({"data_center_id": "x.y"}, "isn't the id"),
    ({"data_center_id": new_id()}, "there is no data center"),
    ({"vlan": 4095}, "doesn't exist"),
    ({"vlan": -1}, "doesn't exist"),
    ({"mtu": 100}, "isn't possible"),
    ({"mtu": 70000}, "isn't possible"),
    ({"vni": 5}, "has no vni"),
    ({"kind": NetworkKind.VXLAN, "vni": 2**24}, "doesn't exist"),
    ({"kind": NetworkKind.VXLAN, "vlan": 3}, "has no vlan"),
    ({"kind": NetworkKind.NAT, "subnet": "10.1.2.3/24"}, "isn't an IPv4 subnet"),
    ({"kind": NetworkKind.NAT, "subnet": "8.8.8.0/24"}, "isn't private"),
    ({"kind": NetworkKind.NAT, "subnet": "10.0.0.0/30"}, "/8 to /29"),
    ({"kind": NetworkKind.NAT, "subnet": "10.0.0.0/24'<x/>"}, "isn't an IPv4 subnet"),
    ({"mac_pool_id": new_id()}, "there is no MAC pool"),
    ({"cluster_ids": (new_id(),)}, "there is no cluster"),
]


async def test_bad_networks_are_refused_with_a_reason(configured: Settings) -> None:
    async with plant(configured, hosts=1) as at:
        for fields, sentence in BAD:
            given = {"name": "n", "data_center_id": at.center.id} | fields
            with pytest.raises(Refused, match=sentence):
                await at.bus.ask(CREATE_NETWORK, CreateNetwork(**given))  # type: ignore[arg-type]
        assert (await at.bus.ask(LIST_NETWORKS, ListQuery())).items == ()
        assert all(host.names() == set() for host in at.hosts)
