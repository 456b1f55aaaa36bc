"""Plans for the host's network, on a model of a kernel: they converge, and undone they leave no trace."""

from __future__ import annotations

import uuid
from collections.abc import Iterable
from functools import reduce
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from host_agent import network_plan
from host_agent.netlink import (
    OPPOSITES,
    Address,
    Drop,
    Enslave,
    Kernel,
    Link,
    Make,
    Move,
    NatDown,
    NatUp,
    Route,
    SetMac,
    SetMtu,
    SetPeers,
    SetUp,
    Step,
    opposite,
)
from host_agent.network_plan import Seen
from volery.contracts.errors import Refused
from volery.contracts.network_orders import HostNetwork, NetworkKind

replace = msgspec.structs.replace
IDS = [str(uuid.UUID(int=number + (1 << 100))) for number in range(1, 6)]
NICS = ("eth0", "eth1", "eth2")


def nic(number: int) -> Link:
    return Link(name=NICS[number], index=number + 1, mac=f"52:54:00:00:00:0{number}", up=True)


HOST = Kernel(
    links=(Link(name="lo", index=9, loopback=True, up=True), nic(0), nic(1), nic(2)),
    addresses=(
        Address(link="eth0", address="10.0.0.1", prefix=24, family=2),
        Address(link="eth1", address="10.0.1.1", prefix=24, family=2),
    ),
    routes=(Route(link="eth0", family=2, gateway="10.0.0.254"),),
)


def seen(kernel: Kernel = HOST, nats: dict[str, str] | None = None) -> Seen:
    return Seen(kernel, nats or {}, "test01")


def network(number: int = 0, **fields: Any) -> HostNetwork:
    defaults = {
        "network_id": IDS[number],
        "name": f"net{number}",
        "kind": NetworkKind.BRIDGE,
        "bridge": f"br{number}",
    }
    return HostNetwork(**{**defaults, **fields})


class Model:
    """What the kernel does with a step, as far as plans look at it."""

    def __init__(self, state: Seen) -> None:
        self.links = {link.name: link for link in state.kernel.links}
        self.addresses = set(state.kernel.addresses)
        self.routes = set(state.kernel.routes)
        self.nats = dict(state.nats)

    def seen(self) -> Seen:
        kernel = Kernel(
            links=tuple(sorted(self.links.values(), key=lambda link: link.name)),
            addresses=tuple(sorted(self.addresses, key=repr)),
            routes=tuple(sorted(self.routes, key=repr)),
        )
        return seen(kernel, dict(sorted(self.nats.items())))

    def change(self, name: str, **fields: Any) -> None:
        if name in self.links:
            self.links[name] = replace(self.links[name], **fields)

    def perform(self, step: Step) -> Model:
        match step:
            case Make(link):
                assert not link.parent or link.parent in self.links
                self.links.setdefault(link.name, replace(link, index=link.index or 99, up=False, master=""))
            case Drop(link):
                if link.name in self.links and self.links[link.name].alias in ("", link.alias):
                    del self.links[link.name]
                    assert not [a for a in self.addresses if a.link == link.name], "they went with their link"
                    assert not [p for p in self.links.values() if p.master == link.name]
            case Enslave(name, master):
                assert not master or master in self.links
                self.change(name, master=master)
            case SetMtu(name, mtu):
                self.change(name, mtu=mtu)
            case SetMac(name, mac):
                self.change(name, mac=mac)
            case SetUp(name, up):
                self.change(name, up=up)
            case SetPeers(name, peers):
                self.change(name, peers=peers)
            case Move(source, target, addresses, routes):
                self.addresses -= {replace(a, link=source) for a in addresses}
                self.routes -= {replace(r, link=source) for r in routes}
                if target:
                    assert target in self.links
                    self.addresses |= {replace(a, link=target) for a in addresses}
                    self.routes |= {replace(r, link=target) for r in routes}
            case NatUp(name, xml):
                self.nats[name] = xml
            case NatDown(name):
                self.nats.pop(name, None)
        return self


def after(state: Seen, steps: Iterable[Step]) -> Seen:
    return reduce(Model.perform, steps, Model(state)).seen()


def bridges() -> st.SearchStrategy[tuple[HostNetwork, ...]]:
    """Sets of networks that one host can have together: their bridges, devices and VNIs differ."""

    @st.composite
    def build(draw: st.DrawFn) -> tuple[HostNetwork, ...]:
        numbers = draw(st.permutations(range(5)))[: draw(st.integers(0, 4))]
        names = draw(st.permutations([f"br{n}" for n in range(5)]))
        carriers = draw(st.permutations([(name, vlan) for name in NICS for vlan in (0, 7)]))
        made = []
        for place, number in enumerate(numbers):
            common = {"bridge": names[place], "mtu": draw(st.sampled_from([1400, 1500, 9000]))}
            kind = draw(st.sampled_from(["nothing", "nic", "vxlan", "nat"]))
            if kind == "nic":
                common |= {"nic": carriers[place][0], "vlan": carriers[place][1]}
            elif kind == "vxlan":
                peers = draw(st.lists(st.sampled_from(["10.0.0.1", "10.0.0.2", "10.0.0.3"]), unique=True))
                common |= {"kind": NetworkKind.VXLAN, "vni": 100 + place, "peers": tuple(peers)}
            elif kind == "nat":
                common |= {"kind": NetworkKind.NAT, "subnet": f"10.5.{number}.0/24"}
            made.append(network(number, **common))
        return tuple(made)

    return build()


@settings(max_examples=150, deadline=None)
@given(first=bridges(), second=bridges())
def test_a_plan_converges_and_can_be_undone(
    first: tuple[HostNetwork, ...], second: tuple[HostNetwork, ...]
) -> None:
    begin = Model(seen()).seen()
    steps = network_plan.plan(begin, first)
    one = after(begin, steps)
    assert network_plan.plan(one, first) == []
    more = network_plan.plan(one, second)
    two = after(one, more)
    assert network_plan.plan(two, second) == []
    assert len(two.kernel.addresses) == len(HOST.addresses)
    assert after(two, [opposite(step) for step in reversed(more)]) == one
    nothing = after(two, network_plan.plan(two, ()))
    mtus = {link.name: link.mtu for link in nothing.kernel.links}
    restored = tuple(replace(link, mtu=mtus[link.name]) for link in begin.kernel.links)
    assert nothing == seen(replace(begin.kernel, links=restored)), "only a device's larger MTU may stay"


@settings(max_examples=100, deadline=None)
@given(first=bridges(), second=bridges(), data=st.data())
def test_a_plan_that_was_done_in_part_can_be_undone(
    first: tuple[HostNetwork, ...], second: tuple[HostNetwork, ...], data: st.DataObject
) -> None:
    begin = after(Model(seen()).seen(), network_plan.plan(Model(seen()).seen(), first))
    steps = network_plan.plan(begin, second)
    done = data.draw(st.integers(0, len(steps)))
    middle = after(begin, steps[:done])
    undone = after(middle, [opposite(step) for step in reversed(steps[:done])])
    assert undone == begin
    # a second agent that died while it undid: the same again changes nothing
    again = data.draw(st.integers(0, done))
    backwards = [opposite(step) for step in reversed(steps[:done])]
    assert after(after(middle, backwards[:again]), backwards) == begin


@pytest.mark.parametrize("kind", list(OPPOSITES))
def test_the_opposite_of_the_opposite_is_the_step(kind: type[Any]) -> None:
    link = Link(name="x", kind="bridge")
    examples: dict[type[Any], Step] = {
        Make: Make(link),
        Drop: Drop(link),
        Enslave: Enslave("a", "b", "c"),
        SetMtu: SetMtu("a", 1, 2),
        SetMac: SetMac("a", "m", "n"),
        SetUp: SetUp("a", True, False),
        SetPeers: SetPeers("a", ("p",), ()),
        Move: Move("a", "b", HOST.addresses, HOST.routes),
        NatUp: NatUp("n", "<x/>"),
        NatDown: NatDown("n", "<x/>"),
    }
    assert opposite(opposite(examples[kind])) == examples[kind]


def test_a_vlan_gets_a_device_of_its_own_and_leaves_the_nic_alone() -> None:
    steps = network_plan.plan(seen(), [network(nic="eth0", vlan=100, mtu=9000)])
    made = [step.link for step in steps if isinstance(step, Make)]
    assert [(m.kind, m.parent, m.vlan) for m in made] == [("bridge", "", 0), ("vlan", "eth0", 100)]
    assert SetMtu("eth0", 9000, 1500) in steps
    assert not [s for s in steps if isinstance(s, Move) or (isinstance(s, Enslave) and s.name == "eth0")]


@pytest.mark.parametrize(
    ("links", "wanted", "reason"),
    [
        ((Link(name="eth0.7", kind="vlan", parent="eth0", vlan=7),), network(nic="eth0", vlan=7), "already on this host as eth0.7"),
        ((Link(name="br0", kind="bridge"),), network(), "isn't Volery's"),
        ((Link(name="br0", kind="bridge", alias=f"volery:other1:{IDS[0]}"),), network(), "isn't Volery's"),
        ((), network(nic="eth7"), "no network device eth7; it has eth0, eth1, eth2"),
        ((Link(name="tap", kind="tun"),), network(nic="tap"), "can carry a network"),
        ((Link(name="vnat", kind="bridge"),), network(kind=NetworkKind.NAT, bridge="vnat"), "already has a device"),
    ],
)  # fmt: skip
def test_what_is_in_the_way_is_said(links: tuple[Link, ...], wanted: HostNetwork, reason: str) -> None:
    state = seen(replace(HOST, links=(*HOST.links, *links)))
    with pytest.raises(Refused, match=reason):
        network_plan.plan(state, [wanted])


def test_a_multipath_route_is_not_lost() -> None:
    state = seen(replace(HOST, multipath=("eth0",)))
    with pytest.raises(Refused, match="several next hops"):
        network_plan.plan(state, [network(nic="eth0")])
    assert network_plan.plan(state, [network(nic="eth1")])


def test_another_installations_networks_stay() -> None:
    alias = f"volery:other1:{IDS[3]}"
    state = seen(replace(HOST, links=(*HOST.links, Link(name="brx", kind="bridge", alias=alias))))
    assert network_plan.plan(state, []) == []
    unnamed = Seen(state.kernel, {}, "")
    assert network_plan.plan(unnamed, []) == []


def test_fragments_are_advised_against() -> None:
    wanted = network(kind=NetworkKind.VXLAN, vni=5, local_address="10.0.0.1", mtu=1500)
    assert "use at most 1450" in network_plan.advice(HOST, wanted)
    assert network_plan.advice(HOST, replace(wanted, mtu=1450)) == ""
