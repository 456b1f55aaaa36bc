"""What a logical network may be, and which networks a host must have. Pure: no bus, no database, no clock."""

from __future__ import annotations

import base64
import hashlib
import ipaddress
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from random import Random

import msgspec
from msgspec.structs import replace

from services.network.store import HostRow, HostState
from volery.contracts.base import encode
from volery.contracts.errors import Kind, Refused, conflict, invalid
from volery.contracts.host import HostStatus
from volery.contracts.naming import checked_description, checked_id, checked_name, checked_tags
from volery.contracts.network import Attachment, CreateNetwork, Network, UpdateNetwork
from volery.contracts.network_orders import HostNetwork, NetworkKind

MAX_VLAN = 4094
MAX_VNI = 2**24 - 1
FIRST_PICKED_VNI = 4096
"""Lower ones are left to people, who number VXLANs like VLANs."""
MIN_MTU, MAX_MTU = 576, 65535
USUAL_MTU = 1500
VXLAN_OVERHEAD_BYTES = 50
NAT_PREFIX = 24
CAN_APPLY = frozenset({HostStatus.UP, HostStatus.NON_OPERATIONAL})
"""Hosts that may be ordered to change their networks: one is often non-operational because a network is missing."""
NEVER_UP = frozenset({HostStatus.INSTALLING})


SPOKEN_OF = CAN_APPLY | {HostStatus.CONNECTING, HostStatus.PREPARING_FOR_MAINTENANCE}
"""Hosts whose networks are known."""


def checked(ask: CreateNetwork) -> CreateNetwork:
    """The request in its normal form, as far as it can be checked by itself. Raises Refused(invalid)."""
    ask = replace(
        ask,
        name=checked_name("network", ask.name),
        description=checked_description(ask.description),
        tags=checked_tags(ask.tags),
        cluster_ids=tuple(dict.fromkeys(checked_id("cluster", c) for c in ask.cluster_ids)),
    )
    checked_id("data center", ask.data_center_id)
    if ask.mac_pool_id:
        checked_id("MAC pool", ask.mac_pool_id)
    _only(ask)
    checked_mtu(ask.mtu)
    if not 0 <= ask.vlan <= MAX_VLAN:
        raise invalid(f"VLAN {ask.vlan} doesn't exist: 1 to {MAX_VLAN}, or 0 for none", field="vlan")
    if not 0 <= ask.vni <= MAX_VNI:
        raise invalid(f"VNI {ask.vni} doesn't exist: 1 to {MAX_VNI}, or 0 to have one picked", field="vni")
    if ask.kind is NetworkKind.VXLAN and ask.mtu == USUAL_MTU:
        ask = replace(ask, mtu=USUAL_MTU - VXLAN_OVERHEAD_BYTES)
    if ask.subnet:
        ask = replace(ask, subnet=checked_subnet(ask.subnet))
    return ask


FOREIGN: Mapping[NetworkKind, tuple[str, ...]] = {
    NetworkKind.BRIDGE: ("vni", "subnet"),
    NetworkKind.VXLAN: ("vlan", "subnet"),
    NetworkKind.NAT: ("vlan", "vni"),
}


def _only(ask: CreateNetwork) -> None:
    for field in FOREIGN[ask.kind]:
        if getattr(ask, field):
            raise invalid(f"a network of kind {ask.kind} has no {field}: leave it out", field=field)


def checked_mtu(mtu: int) -> None:
    if not MIN_MTU <= mtu <= MAX_MTU:
        raise invalid(f"an MTU of {mtu} isn't possible: {MIN_MTU} to {MAX_MTU}", field="mtu")


def checked_subnet(text: str) -> str:
    """The subnet in its usual form. Raises Refused(invalid) unless it is a private IPv4 network of /8 to /29."""
    try:
        subnet = ipaddress.IPv4Network(text)
    except ValueError:
        raise invalid(
            f"{text[:60]!r} isn't an IPv4 subnet: write it as in 10.88.4.0/24, without host bits",
            field="subnet",
        ) from None
    if not 8 <= subnet.prefixlen <= 29:
        raise invalid(f"subnet {subnet} must be a /8 to /29", field="subnet")
    if not subnet.is_private or subnet.is_loopback or subnet.is_link_local:
        raise invalid(
            f"subnet {subnet} isn't private: take one from 10.0.0.0/8, 172.16.0.0/12 or 192.168.0.0/16",
            field="subnet",
        )
    return str(subnet)


def pick_subnet(within: str, taken: Iterable[str], random: Random) -> str:
    """A /24 that overlaps none of these. Raises Refused(exhausted)."""
    space = ipaddress.IPv4Network(within)
    others = [ipaddress.IPv4Network(text) for text in taken]
    step = 2 ** (32 - NAT_PREFIX)
    count = space.num_addresses // step
    start = random.randrange(count)
    for offset in range(min(count, 4096)):
        first = int(space.network_address) + (start + offset) % count * step
        subnet = ipaddress.IPv4Network((first, NAT_PREFIX))
        if not any(subnet.overlaps(other) for other in others):
            return str(subnet)
    raise Refused(
        Kind.EXHAUSTED,
        f"no /{NAT_PREFIX} of {within} is free for a NAT network: name a subnet, or remove NAT networks",
        rule="subnet",
    )


def pick_vni(random: Random) -> int:
    return random.randint(FIRST_PICKED_VNI, MAX_VNI)


def bridge_name(network_id: str, suffix: str) -> str:
    """`v`, eight characters of the network's own, and the installation's suffix: at most 14, and VLAN devices fit."""
    digest = base64.b32encode(hashlib.sha256(network_id.encode()).digest()).decode().lower()
    return f"v{digest[:8]}{suffix}"


def edited(network: Network, ask: UpdateNetwork) -> Network:
    """The network after an edit. Raises Refused(invalid)."""
    given = {
        name: value
        for name in ("name", "description", "tags", "mtu", "cluster_ids", "required")
        if (value := getattr(ask, name)) is not msgspec.UNSET
    }
    new = replace(network, **given)
    checked_mtu(new.mtu)
    return replace(
        new,
        name=checked_name("network", new.name),
        description=checked_description(new.description),
        tags=checked_tags(new.tags),
        cluster_ids=tuple(dict.fromkeys(checked_id("cluster", c) for c in new.cluster_ids)),
    )


def belongs(network: Network, host: HostRow) -> bool:
    """Whether the host is to have the network."""
    return network.data_center_id == host.data_center_id and (
        not network.cluster_ids or host.cluster_id in network.cluster_ids
    )


def standing(
    network: Network, hosts: Iterable[HostRow], states: Mapping[str, HostState]
) -> tuple[frozenset[str], dict[str, str]]:
    """(hosts that have the network, host → why it hasn't), of those that are to have it and can be asked."""
    has, lacks = set[str](), dict[str, str]()
    for host in hosts:
        state = states.get(host.id)
        if host.status not in SPOKEN_OF or state is None or not belongs(network, host):
            continue
        if network.id not in state.ready:
            lacks[host.id] = state.problems.get(network.id, "it isn't there, and the host doesn't say why")
        elif severed := state.severed.get(network.id, ""):
            lacks[host.id] = severed
        else:
            has.add(host.id)
    return frozenset(has), lacks


@dataclass(frozen=True, slots=True)
class Desired:
    """The set for one host, and why some networks can't be in it."""

    networks: tuple[HostNetwork, ...]
    problems: Mapping[str, str]

    @property
    def digest(self) -> str:
        """The same for the same set."""
        return hashlib.sha256(encode(self.networks)).hexdigest()[:16]


def desired(
    host: HostRow,
    networks: Iterable[Network],
    attachments: Iterable[Attachment],
    hosts: Iterable[HostRow],
) -> Desired:
    """What this host must have: every network that belongs to it, on the NIC that was chosen for it.

    `hosts` are all hosts of the data center; they count where a network is a VXLAN. A host that is only silent stays a VXLAN peer, since its VMs may run.
    """
    nics = {a.network_id: a.nic for a in attachments if a.host_id == host.id}
    everybody = tuple(hosts)
    found: list[HostNetwork] = []
    problems: dict[str, str] = {}
    carried: dict[tuple[str, int], str] = {}
    for network in sorted(networks, key=lambda n: n.id):
        if not belongs(network, host):
            continue
        nic = nics.get(network.id, "") if network.kind is NetworkKind.BRIDGE else ""
        problem = _why_not(network, host, nic, carried)
        if problem:
            problems[network.id] = problem
            continue
        if nic:
            carried[nic, network.vlan] = network.name
        found.append(_for_host(network, host, nic, everybody))
    return Desired(tuple(found), problems)


def _why_not(network: Network, host: HostRow, nic: str, carried: Mapping[tuple[str, int], str]) -> str:
    """Why the host can't have the network, or ""."""
    if network.kind is NetworkKind.VXLAN and not is_address(host.address):
        return (
            f"host {host.name} has no IP address for its tunnels ({host.address or 'none'}): network {network.name} "
            "needs one"
        )
    if network.vlan and not nic:
        return (
            f"network {network.name} is VLAN {network.vlan} and no NIC of host {host.name} was chosen to carry it: "
            "set up the host's networks"
        )
    if nic and host.nics and nic not in host.nics:
        return f"host {host.name} has no NIC {nic} for network {network.name}: it has {', '.join(host.nics)}"
    if nic and (other := carried.get((nic, network.vlan))):
        what = f"VLAN {network.vlan} on NIC" if network.vlan else "NIC"
        return f"{what} {nic} of host {host.name} carries network {other} already, so {network.name} can't have it"
    return ""


def is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def _for_host(network: Network, host: HostRow, nic: str, hosts: Sequence[HostRow]) -> HostNetwork:
    vxlan = network.kind is NetworkKind.VXLAN
    return HostNetwork(
        network_id=network.id,
        name=network.name,
        kind=network.kind,
        bridge=network.bridge,
        mtu=network.mtu,
        nic=nic,
        vlan=network.vlan if nic else 0,
        vni=network.vni,
        peers=peers(network, host, hosts) if vxlan else (),
        local_address=host.address if vxlan else "",
        subnet=network.subnet,
    )


def peers(network: Network, host: HostRow, hosts: Iterable[HostRow]) -> tuple[str, ...]:
    """Tunnel addresses of the other hosts that have the network, of this host's own IP version."""
    version = ipaddress.ip_address(host.address).version
    found = {
        other.address
        for other in hosts
        if other.id != host.id
        and other.status not in NEVER_UP
        and belongs(network, other)
        and is_address(other.address)
        and ipaddress.ip_address(other.address).version == version
    }
    return tuple(sorted(found - {host.address}, key=ipaddress.ip_address))


def changed_networks(
    applied: Sequence[HostNetwork], wanted: Sequence[HostNetwork]
) -> tuple[list[HostNetwork], list[HostNetwork]]:
    """(new or different ones, ones to go)."""
    before = {network.network_id: network for network in applied}
    after = {network.network_id for network in wanted}
    changed = [network for network in wanted if before.get(network.network_id) != network]
    return changed, [network for network in applied if network.network_id not in after]


def with_network(networks: Sequence[HostNetwork], network: HostNetwork) -> tuple[HostNetwork, ...]:
    """The set with this one in it, in place of its former version."""
    others = [n for n in networks if n.network_id != network.network_id]
    return tuple(sorted((*others, network), key=lambda n: n.network_id))


def without(networks: Sequence[HostNetwork], network_id: str) -> tuple[HostNetwork, ...]:
    return tuple(n for n in networks if n.network_id != network_id)


def checked_nics(host: HostRow, nics: Mapping[str, str], networks: Mapping[str, Network]) -> None:
    """Raises Refused unless these networks can be put on these NICs of the host."""
    if not nics:
        raise invalid("say which network goes onto which NIC", field="nics")
    for network_id, nic in nics.items():
        network = networks.get(network_id)
        if network is None:
            raise Refused(Kind.NOT_FOUND, f"there is no network {network_id}", noun="network", id=network_id)
        if not belongs(network, host):
            raise conflict(
                f"network {network.name} isn't for host {host.name}: it belongs to another data center or other clusters",
                network_id=network_id,
            )
        if network.kind is not NetworkKind.BRIDGE:
            raise invalid(
                f"network {network.name} is of kind {network.kind}, which takes no NIC of the host",
                field="nics",
            )
        if nic and host.nics and nic not in host.nics:
            raise invalid(
                f"host {host.name} has no NIC {nic[:40]!r}: it has {', '.join(host.nics)}", field="nics"
            )
        if len(nic) > 15 or not nic.isprintable() or set(nic) & set(" /"):
            raise invalid(f"{nic[:40]!r} can't be the name of a NIC", field="nics")
