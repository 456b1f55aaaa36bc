"""Properties of the set of networks that a host must have."""

from __future__ import annotations

import ipaddress
import random
from datetime import UTC, datetime

from hypothesis import given
from hypothesis import strategies as st

from host_agent import network_plan
from services.network import model
from services.network.store import HostRow
from volery.contracts.host import HostStatus
from volery.contracts.network import Attachment, CreateNetwork, Network
from volery.contracts.network_orders import NetworkKind

NOW = datetime(2026, 11, 20, tzinfo=UTC)
CENTERS = ["dc-a", "dc-b"]
CLUSTERS = ["c1", "c2", "c3"]
NICS = ("eth0", "eth1", "bond0")


def network_id(number: int) -> str:
    return f"00000000-0000-7000-8000-{number:012x}"


@st.composite
def networks(draw: st.DrawFn) -> list[Network]:
    found = []
    for number in range(draw(st.integers(0, 8))):
        kind = draw(st.sampled_from(NetworkKind))
        name = network_id(number)
        found.append(
            Network(
                id=name,
                revision=1,
                created_at=NOW,
                updated_at=NOW,
                name=f"n{number}",
                data_center_id=draw(st.sampled_from(CENTERS)),
                kind=kind,
                vlan=draw(st.sampled_from([0, 0, 7, 8])) if kind is NetworkKind.BRIDGE else 0,
                mtu=draw(st.sampled_from([1450, 1500, 9000])),
                vni=4096 + number if kind is NetworkKind.VXLAN else 0,
                subnet=f"10.99.{number}.0/24" if kind is NetworkKind.NAT else "",
                bridge=model.bridge_name(name, "abcde"),
                cluster_ids=tuple(draw(st.sets(st.sampled_from(CLUSTERS), max_size=2))),
            )
        )
    return found


@st.composite
def hosts(draw: st.DrawFn) -> list[HostRow]:
    addresses = draw(
        st.lists(
            st.sampled_from(["", "name.test", *(f"10.0.0.{i}" for i in range(1, 9)), "fd00::1", "fd00::2"]),
            min_size=1,
            max_size=6,
        )
    )
    return [
        HostRow(
            id=f"h{number}",
            name=f"host {number}",
            data_center_id=draw(st.sampled_from(CENTERS)),
            cluster_id=draw(st.sampled_from(CLUSTERS)),
            status=draw(st.sampled_from(HostStatus)),
            address=address,
            nics=draw(st.sampled_from([(), NICS, NICS[:1]])),
            boot_id="",
        )
        for number, address in enumerate(addresses)
    ]


@st.composite
def attachments(draw: st.DrawFn) -> list[Attachment]:
    pairs = draw(st.sets(st.tuples(st.integers(0, 5), st.integers(0, 7)), max_size=8))
    return [
        Attachment(
            id=f"{host}-{number}",
            revision=1,
            created_at=NOW,
            updated_at=NOW,
            host_id=f"h{host}",
            network_id=network_id(number),
            nic=draw(st.sampled_from(NICS)),
        )
        for host, number in sorted(pairs)
    ]


def neighbours(host: HostRow, everybody: list[HostRow]) -> list[HostRow]:
    return [other for other in everybody if other.data_center_id == host.data_center_id]


@given(networks(), hosts(), attachments())
def test_a_host_gets_or_is_told_about_each_network_that_belongs_to_it(
    found: list[Network], everybody: list[HostRow], chosen: list[Attachment]
) -> None:
    for host in everybody:
        wanted = model.desired(host, found, chosen, neighbours(host, everybody))
        has = {network.network_id for network in wanted.networks}
        assert has | wanted.problems.keys() == {n.id for n in found if model.belongs(n, host)}
        assert not has & wanted.problems.keys()
        assert all(wanted.problems.values())


@given(networks(), hosts(), attachments())
def test_the_agent_never_refuses_a_set_by_itself(
    found: list[Network], everybody: list[HostRow], chosen: list[Attachment]
) -> None:
    """What the host's own rules say about a set, without looking at the host."""
    for host in everybody:
        wanted = model.desired(host, found, chosen, neighbours(host, everybody))
        network_plan.check_set(wanted.networks)
        for network in wanted.networks:
            network_plan.check(network)


@given(networks(), hosts(), attachments(), st.randoms())
def test_the_order_of_what_is_read_doesn_t_matter(
    found: list[Network], everybody: list[HostRow], chosen: list[Attachment], chance: random.Random
) -> None:
    host = everybody[0]
    around = neighbours(host, everybody)
    first = model.desired(host, found, chosen, around)
    for some in (found, chosen, around):
        chance.shuffle(some)
    again = model.desired(host, found, chosen, around)
    assert (again, again.digest) == (first, first.digest)


@given(networks(), hosts())
def test_tunnels_have_two_ends(found: list[Network], everybody: list[HostRow]) -> None:
    for network in found:
        if network.kind is not NetworkKind.VXLAN:
            continue
        ends = [
            host
            for host in everybody
            if model.belongs(network, host)
            and model.is_address(host.address)
            and host.status not in model.NEVER_UP
        ]
        seen = {host.address: set(model.peers(network, host, neighbours(host, everybody))) for host in ends}
        for address, peers in seen.items():
            assert address not in peers
            assert all(
                ipaddress.ip_address(p).version == ipaddress.ip_address(address).version for p in peers
            )
            for peer in peers:
                assert address in seen[peer]


@given(st.lists(st.integers(0, 2**32), max_size=300), st.integers(0, 2**32))
def test_picked_subnets_never_overlap(seeds: list[int], first: int) -> None:
    taken: list[str] = ["10.64.0.0/16"]
    for seed in [first, *seeds[:40]]:
        picked = model.pick_subnet("10.64.0.0/14", taken, random.Random(seed))
        subnet = ipaddress.IPv4Network(picked)
        assert not any(subnet.overlaps(ipaddress.IPv4Network(other)) for other in taken)
        assert model.checked_subnet(picked) == picked
        taken.append(picked)


@given(st.uuids(), st.from_regex(r"\A[a-z0-9]{0,5}\Z"))
def test_bridge_names_fit(value: object, suffix: str) -> None:
    name = model.bridge_name(str(value), suffix)
    assert len(name) <= 14
    assert network_plan.DEVICE_NAME.fullmatch(name)
    assert name.endswith(suffix)


def test_a_vxlan_leaves_room_for_its_header() -> None:
    ask = CreateNetwork(name="n", data_center_id=network_id(1), kind=NetworkKind.VXLAN)
    assert model.checked(ask).mtu == 1450
