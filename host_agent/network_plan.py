"""Which steps lead from the host's network as it is to the one it must have. Pure: nothing is read or changed here.

Volery's own devices carry its mark; anything else is left alone, or the reason why it is in the way is said.
"""

from __future__ import annotations

import ipaddress
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import msgspec

from host_agent import nat
from host_agent.netlink import (
    SCOPE_LINK,
    VXLAN_PORT,
    Drop,
    Enslave,
    Kernel,
    Link,
    Make,
    Move,
    NatDown,
    NatUp,
    SetMac,
    SetMtu,
    SetPeers,
    SetUp,
    Step,
)
from volery.contracts.errors import Kind, Refused, conflict, invalid
from volery.contracts.network_orders import HostNetwork, NetworkKind

DEVICE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,14}")
GUEST_PORTS = frozenset({"tun", "macvtap"})
"""Kinds of device that a running VM has in a bridge."""
VXLAN_OVERHEAD = 50


_with = msgspec.structs.replace


@dataclass(frozen=True, slots=True)
class Seen:
    """What a plan is made from."""

    kernel: Kernel
    nats: dict[str, str]
    """libvirt's networks: name and XML."""
    installation: str

    def mark(self, network_id: str) -> str:
        return f"volery:{self.installation}:{network_id}" if self.installation else f"volery:{network_id}"

    def owns(self, link: Link) -> bool:
        prefix = self.mark("")
        return link.alias.startswith(prefix) and len(link.alias) == len(prefix) + 36

    def ports(self, bridge: str) -> list[Link]:
        return [link for link in self.kernel.links if link.master == bridge]


def plan(seen: Seen, desired: Sequence[HostNetwork]) -> list[Step]:
    """All steps, what goes away first. Raises Refused with the network's name and what is in its way."""
    check_set(desired)
    for network in desired:
        check(network)
    steps = removals(seen, desired)
    after = _after(seen, steps)
    freed = [step for network in desired for step in releases(after, network)]
    after = _after(after, freed)
    steps += freed
    for network in desired:
        needed = changes(after, network)
        after = _after(after, needed)
        steps += needed
    return steps


def check_set(desired: Sequence[HostNetwork]) -> None:
    """What the networks must not have in common. Raises Refused(invalid)."""
    uses: tuple[tuple[str, Callable[[HostNetwork], object]], ...] = (
        ("network", lambda n: n.network_id),
        ("bridge", lambda n: n.bridge),
        ("host device", lambda n: (n.nic, n.vlan) if n.nic else None),
        ("VNI", lambda n: n.vni if n.kind is NetworkKind.VXLAN else None),
    )
    for what, key in uses:
        counted = Counter(key(network) for network in desired)
        for value, count in counted.items():
            if value is not None and count > 1:
                names = ", ".join(n.name for n in desired if key(n) == value)
                raise invalid(f"networks {names} can't share {what} {value} on one host")


def check(network: HostNetwork) -> None:
    """What is wrong with one network whatever the host. Raises Refused(invalid)."""
    vxlan = network.kind is NetworkKind.VXLAN
    rules: tuple[tuple[bool, str], ...] = (
        (not DEVICE_NAME.fullmatch(network.bridge), f"{network.bridge!r} can't be a bridge's name: 1 to 15 letters, digits, . _ -"),
        (not 576 <= network.mtu <= 65535, f"an MTU of {network.mtu} isn't possible: 576 to 65535"),
        (not 0 <= network.vlan <= 4094, f"VLAN {network.vlan} doesn't exist: 1 to 4094, or 0 for none"),
        (bool(network.vlan) and not network.nic, f"VLAN {network.vlan} needs a host device that carries it"),
        (bool(network.nic) and network.kind is not NetworkKind.BRIDGE, f"a {network.kind} network takes no host device"),
        (vxlan and not 0 < network.vni < 2**24, f"VNI {network.vni} doesn't exist: 1 to 16777215"),
        (vxlan and not _addresses_fit(network), "its tunnel addresses must be IP addresses of one family"),
    )  # fmt: skip
    for refuses, sentence in rules:
        if refuses:
            raise invalid(f"network {network.name}: {sentence}", network_id=network.network_id)


def _addresses_fit(network: HostNetwork) -> bool:
    try:
        every = [ipaddress.ip_address(a) for a in (*network.peers, network.local_address) if a]
    except ValueError:
        return False
    return len({a.version for a in every}) <= 1


# What goes away


def removals(seen: Seen, desired: Sequence[HostNetwork]) -> list[Step]:
    """Steps that take away what Volery made and isn't wanted, or not so. Raises Refused(conflict) if VMs use it."""
    wanted = {device.name: device for network in desired for device in devices(seen, network)}
    going = [
        link
        for link in seen.kernel.links
        if seen.owns(link) and not _same_device(link, wanted.get(link.name))
    ]
    steps: list[Step] = []
    for link in sorted(going, key=lambda one: one.kind != "bridge"):
        if link.kind == "bridge":
            steps += _empty(seen, link)
        elif link.master and link.master not in {bridge.name for bridge in going}:
            steps.append(Enslave(link.name, "", link.master))
        if link.up:  # so that undoing it brings it up before its routes come back
            steps.append(SetUp(link.name, False, True))
        steps.append(Drop(link))
    kept = {nat.network_name(seen.installation, n.network_id) for n in desired if n.kind is NetworkKind.NAT}
    for name, xml in seen.nats.items():
        if nat.is_own(name, seen.installation) and name not in kept:
            refuse_guests(seen, nat.described(xml)[0])
            steps.append(NatDown(name, xml))
    return steps


def _same_device(link: Link, wanted: Link | None) -> bool:
    if wanted is None:
        return False
    identity = ("kind", "alias", "vni", "local", "vlan", "parent")
    return all(getattr(link, field) == getattr(wanted, field) for field in identity)


def refuse_guests(seen: Seen, bridge: str) -> None:
    guests = [link.name for link in seen.ports(bridge) if link.kind in GUEST_PORTS]
    if guests:
        raise conflict(
            f"bridge {bridge} is still used by VMs ({', '.join(guests)}): unplug their NICs or move them first",
            bridge=bridge,
            devices=guests,
        )


def _empty(seen: Seen, bridge: Link) -> Iterable[Step]:
    """The bridge's addresses back to the host's device, and its ports out of it."""
    refuse_guests(seen, bridge.name)
    ports = seen.ports(bridge.name)
    nics = [port for port in ports if not seen.owns(port)]
    yield from _moved(seen.kernel, bridge.name, nics[0].name if nics else "")
    for port in ports:
        yield Enslave(port.name, "", bridge.name)


def _moved(kernel: Kernel, source: str, target: str) -> Iterable[Step]:
    if source in kernel.multipath:
        raise conflict(
            f"{source} carries a route with several next hops, which can't be moved: remove that route first"
        )
    addresses = tuple(
        a for a in kernel.addresses if a.link == source and not (":" in a.address and a.scope == SCOPE_LINK)
    )
    routes = tuple(r for r in kernel.routes if r.link == source)
    if addresses or routes:
        yield Move(source, target, addresses, routes)


def _after(seen: Seen, steps: Iterable[Step]) -> Seen:
    """The host's state after some steps, as far as the steps that follow need to know it."""
    state = {link.name: link for link in seen.kernel.links}
    addresses, routes = list(seen.kernel.addresses), list(seen.kernel.routes)
    nats = dict(seen.nats)
    for step in steps:
        if isinstance(step, Drop):
            state.pop(step.link.name, None)
        elif isinstance(step, NatDown):
            nats.pop(step.name, None)
            state.pop(nat.described(step.xml)[0], None)
        elif isinstance(step, Make):
            state[step.link.name] = step.link
        elif isinstance(step, Enslave) and step.name in state:
            state[step.name] = _with(state[step.name], master=step.master)
        elif isinstance(step, Move):
            addresses = [_with(a, link=step.target) if a.link == step.source else a for a in addresses]
            routes = [_with(r, link=step.target) if r.link == step.source else r for r in routes]
    kernel = _with(seen.kernel, links=tuple(state.values()), addresses=tuple(addresses), routes=tuple(routes))
    return Seen(kernel, nats, seen.installation)


# What must be there


def devices(seen: Seen, network: HostNetwork) -> list[Link]:
    """The devices of Volery's own that a network needs; the bridge comes first."""
    mark = seen.mark(network.network_id)
    short = network.network_id.replace("-", "")[-10:]
    if network.kind is NetworkKind.NAT:
        return []
    made = [Link(name=network.bridge, kind="bridge", mtu=network.mtu, alias=mark)]
    if network.kind is NetworkKind.VXLAN:
        made.append(
            Link(
                name=f"vx{short}",
                kind="vxlan",
                mtu=network.mtu,
                alias=mark,
                vni=network.vni,
                local=network.local_address,
                port=VXLAN_PORT,
                peers=tuple(sorted(set(network.peers) - {network.local_address})),
            )
        )
    if network.vlan:
        made.append(
            Link(
                name=f"vl{short}",
                kind="vlan",
                mtu=network.mtu,
                alias=mark,
                vlan=network.vlan,
                parent=network.nic,
            )
        )
    return made


def changes(seen: Seen, network: HostNetwork) -> list[Step]:
    """Steps that make one network right. Raises Refused with what is in its way."""
    if network.kind is NetworkKind.NAT:
        return _nat_changes(seen, network)
    kernel = seen.kernel
    nic = _nic(seen, network)
    bridge, *carriers = devices(seen, network)
    if nic is not None and not network.vlan:
        bridge = _with(bridge, mac=nic.mac)
    steps = list(releases(seen, network))
    if nic is not None and nic.mtu < network.mtu:
        steps.append(SetMtu(nic.name, network.mtu, nic.mtu))
    if nic is not None and network.vlan and not nic.up:
        steps.append(SetUp(nic.name, True, False))
    steps += _device(seen, network, bridge)
    for carrier in carriers:
        steps += _device(seen, network, carrier)
        steps += _plugged(kernel.link(carrier.name) or carrier, network.bridge)
    if nic is not None and not network.vlan:
        steps += _plugged(nic, network.bridge)
        steps += _moved(kernel, nic.name, network.bridge)
    return steps


def releases(seen: Seen, network: HostNetwork) -> Iterable[Step]:
    """The host's devices that are in the network's bridge and shouldn't be, with their addresses back on them."""
    bridge = seen.kernel.link(network.bridge)
    if bridge is None or not seen.owns(bridge):
        return
    wanted = "" if network.vlan else network.nic
    for port in seen.ports(network.bridge):
        if not seen.owns(port) and port.kind not in GUEST_PORTS and port.name != wanted:
            yield from _moved(seen.kernel, network.bridge, port.name)
            yield Enslave(port.name, "", network.bridge)


def _device(seen: Seen, network: HostNetwork, wanted: Link) -> Iterable[Step]:
    found = seen.kernel.link(wanted.name)
    if found is None:
        _refuse_clash(seen, network, wanted)
        yield Make(wanted)
        yield SetUp(wanted.name, True, False)
        return
    if found.alias != wanted.alias:
        raise conflict(
            f"network {network.name}: this host already has a device {wanted.name} that isn't Volery's: "
            "rename or remove it, or give the network another bridge",
            device=wanted.name,
        )
    if found.mtu != wanted.mtu:
        yield SetMtu(wanted.name, wanted.mtu, found.mtu)
    if wanted.mac and found.mac != wanted.mac:
        yield SetMac(wanted.name, wanted.mac, found.mac)
    if not found.up:
        yield SetUp(wanted.name, True, False)
    if wanted.kind == "vxlan" and found.peers != wanted.peers:
        yield SetPeers(wanted.name, wanted.peers, found.peers)


def _refuse_clash(seen: Seen, network: HostNetwork, wanted: Link) -> None:
    if wanted.kind == "vxlan":
        for other in seen.kernel.links:
            if other.kind == "vxlan" and (other.vni, other.port) == (wanted.vni, wanted.port):
                raise conflict(
                    f"network {network.name}: VNI {wanted.vni} is already used on this host by {other.name}: "
                    "give the network another VNI",
                    device=other.name,
                )
        if wanted.local and wanted.local not in {a.address for a in seen.kernel.addresses}:
            raise invalid(f"network {network.name}: tunnel address {wanted.local} isn't on this host")
    if wanted.kind == "vlan":
        for other in seen.kernel.links:
            if other.kind == "vlan" and (other.parent, other.vlan) == (wanted.parent, wanted.vlan):
                raise conflict(
                    f"network {network.name}: VLAN {wanted.vlan} of {wanted.parent} is already on this host as "
                    f"{other.name}: remove it, or use another VLAN",
                    device=other.name,
                )


def _plugged(port: Link, bridge: str) -> Iterable[Step]:
    if port.master != bridge:
        yield Enslave(port.name, bridge, port.master)
    if port.index and not port.up:  # one that is yet to be made comes up with its making
        yield SetUp(port.name, True, False)


def _nic(seen: Seen, network: HostNetwork) -> Link | None:
    """The host's own device for a network. Raises Refused when there is none, or it serves something else."""
    if not network.nic:
        return None
    nic = seen.kernel.link(network.nic)
    if nic is None:
        have = ", ".join(nics(seen.kernel)) or "none"
        raise Refused(
            Kind.NOT_FOUND,
            f"network {network.name}: this host has no network device {network.nic}; it has {have}",
            nic=network.nic,
        )
    if nic.loopback or seen.owns(nic) or nic.kind in (*GUEST_PORTS, "bridge", "vxlan"):
        raise invalid(f"network {network.name}: {network.nic} isn't a device that can carry a network")
    master = seen.kernel.link(nic.master) if nic.master else None
    if master is not None and master.name != network.bridge and not seen.owns(master):
        raise conflict(
            f"network {network.name}: {network.nic} already belongs to {master.name}, which isn't Volery's: "
            f"take it out of {master.name} first",
            device=master.name,
        )
    return nic


def _nat_changes(seen: Seen, network: HostNetwork) -> list[Step]:
    name = nat.network_name(seen.installation, network.network_id)
    present = seen.nats.get(name)
    bridge, addresses, mtu = nat.described(present) if present else ("", "", 0)
    if present and not network.subnet:
        addresses_wanted = ipaddress.IPv4Network(addresses)
    else:
        addresses_wanted = nat.subnet(network, seen.kernel, bridge)
    if (bridge, addresses, mtu) == (network.bridge, str(addresses_wanted), network.mtu):
        return []
    foreign = seen.kernel.link(network.bridge)
    if foreign is not None and network.bridge != bridge:
        raise conflict(
            f"network {network.name}: this host already has a device {network.bridge}: "
            "give the network another bridge",
            device=network.bridge,
        )
    steps: list[Step] = []
    if present:
        refuse_guests(seen, bridge)
        steps.append(NatDown(name, present))
    return [*steps, NatUp(name, nat.network_xml(network, name, addresses_wanted))]


def link_down(kernel: Kernel, network: HostNetwork) -> str:
    """Why no frame of the network gets out of the host; "" when nothing is known to keep it."""
    nic = kernel.link(network.nic) if network.nic else None
    if nic is None or not nic.up or nic.carrier:
        return ""
    return f"{nic.name} has no link: look at its cable and the switch's port"


def advice(kernel: Kernel, network: HostNetwork) -> str:
    """What works, but not well."""
    if network.kind is not NetworkKind.VXLAN or not network.local_address:
        return ""
    link = next((a.link for a in kernel.addresses if a.address == network.local_address), "")
    under = kernel.link(link)
    if under is None or network.mtu + VXLAN_OVERHEAD <= under.mtu:
        return ""
    return (
        f"its MTU of {network.mtu} doesn't fit through {link}'s {under.mtu}: packets are sent in fragments; "
        f"use at most {under.mtu - VXLAN_OVERHEAD}"
    )


def nics(kernel: Kernel) -> tuple[str, ...]:
    """Devices of the host that could carry a network: physical ones, bonds, and veths of a lab's hosts."""
    carriers = ("", "bond", "veth", "team", "dummy")
    return tuple(sorted(link.name for link in kernel.links if link.kind in carriers and not link.loopback))
