"""What network may order a host to do: the whole set of logical networks it must have."""

from __future__ import annotations

from enum import StrEnum

from volery.contracts.agent import BridgeReport
from volery.contracts.base import Message, Order


class NetworkKind(StrEnum):
    BRIDGE = "bridge"
    """A Linux bridge, with the host's NIC (or a VLAN on it) in it, or with nothing."""
    VXLAN = "vxlan"
    """A Linux bridge with a VXLAN device that joins the hosts."""
    NAT = "nat"
    """A libvirt network: bridge, NAT and DHCP on this host alone."""


class HostNetwork(Message):
    """One logical network as one host must have it."""

    network_id: str
    name: str
    kind: NetworkKind
    bridge: str
    """The bridge's device name, at most 15 characters."""
    mtu: int = 1500
    nic: str = ""
    """The host's device to put into the bridge; "" for none."""
    vlan: int = 0
    vni: int = 0
    peers: tuple[str, ...] = ()
    """VXLAN: the other hosts' tunnel addresses."""
    local_address: str = ""
    subnet: str = ""
    """NAT: an IPv4 network in CIDR form; the first address is the host's."""


class ApplyNetworks(Message):
    """The whole desired set for this host. What Volery made and isn't listed goes away.

    Applied with a check that the control plane is still reachable; rolled back if it isn't within `check_seconds`.
    """

    host_id: str
    networks: tuple[HostNetwork, ...]
    check_seconds: float = 20.0


class NetworksApplied(Message):
    networks: tuple[BridgeReport, ...]


APPLY_NETWORKS = Order("network.apply", ApplyNetworks, NetworksApplied)
