"""Logical networks, MAC pools, and which host has which network."""

from __future__ import annotations

from msgspec import UNSET, UnsetType

from volery.contracts.base import Call, Done, Entity, Fact, Message
from volery.contracts.cluster import DeleteById, GetById
from volery.contracts.network_orders import NetworkKind
from volery.contracts.operation import ListQuery, Operation, Page


class Network(Entity):
    """A logical network of a data center. Which hosts have it is in its attachments."""

    name: str
    data_center_id: str
    kind: NetworkKind
    description: str = ""
    tags: tuple[str, ...] = ()
    vlan: int = 0
    mtu: int = 1500
    vni: int = 0
    """VXLAN: chosen by Volery unless given."""
    subnet: str = ""
    """NAT: IPv4 network in CIDR form."""
    bridge: str = ""
    """The bridge's device name on every host."""
    mac_pool_id: str = ""
    cluster_ids: tuple[str, ...] = ()
    """Clusters whose every host has it; empty: all clusters of the data center. Set per host with attachments
    where a physical NIC must be chosen."""
    required: bool = False
    """A host of these clusters without it is non-operational."""
    ready_host_ids: tuple[str, ...] = ()
    """Hosts on which it is in sync now."""
    problems: dict[str, str] = {}
    """Host → why it isn't there."""
    lost: dict[str, str] = {}
    """Of a required network: host → why it has not had it for a while, though another host of its cluster has. It is
    non-operational until it has had it again for a while."""


class CreateNetwork(Message):
    name: str
    data_center_id: str
    kind: NetworkKind = NetworkKind.BRIDGE
    description: str = ""
    tags: tuple[str, ...] = ()
    vlan: int = 0
    mtu: int = 1500
    vni: int = 0
    subnet: str = ""
    mac_pool_id: str = ""
    cluster_ids: tuple[str, ...] = ()
    required: bool = False


class UpdateNetwork(Message):
    id: str
    if_revision: int = 0
    name: str | UnsetType = UNSET
    description: str | UnsetType = UNSET
    tags: tuple[str, ...] | UnsetType = UNSET
    mtu: int | UnsetType = UNSET
    cluster_ids: tuple[str, ...] | UnsetType = UNSET
    required: bool | UnsetType = UNSET


class MacPool(Entity):
    """Ranges from which no address is ever given twice."""

    name: str
    ranges: tuple[str, ...] = ()
    """`first-last`, e.g. 56:6f:00:00:00:00-56:6f:00:ff:ff:ff"""
    allow_duplicates: bool = False
    """Lets a person give an address by hand that is in use elsewhere."""
    size: int = 0
    used: int = 0


class CreateMacPool(Message):
    name: str
    ranges: tuple[str, ...]
    allow_duplicates: bool = False


class UpdateMacPool(Message):
    id: str
    if_revision: int = 0
    name: str | UnsetType = UNSET
    ranges: tuple[str, ...] | UnsetType = UNSET
    allow_duplicates: bool | UnsetType = UNSET


class Attachment(Entity):
    """A logical network on one host's physical NIC."""

    host_id: str
    network_id: str
    nic: str = ""
    in_sync: bool = False
    problem: str = ""
    busy_with: str = ""


class SetupHostNetworks(Message):
    """Which of the host's NICs carry which networks. Applied by the agent with a check that the control plane is
    still reachable, and rolled back if it isn't."""

    host_id: str
    nics: dict[str, str]
    """network_id → NIC; networks not named keep what they have; "" removes the NIC."""
    check_seconds: float = 20.0


class AllocateNic(Message):
    """A MAC address for a VM's NIC, from the network's pool or the one given. Idempotent per nic_id."""

    nic_id: str
    vm_id: str
    network_id: str
    mac: str = ""


class AllocatedNic(Message):
    nic_id: str
    mac: str


class ReleaseNic(Message):
    """Gives the address back; one that isn't allocated is a success."""

    nic_id: str
    vm_id: str


class PrepareNetworks(Message):
    """The bridges of these networks on this host; applies them first if they aren't there. Refused with the reason."""

    host_id: str
    network_ids: tuple[str, ...]


class NetworkBridge(Message):
    network_id: str
    bridge: str
    mtu: int


class PreparedNetworks(Message):
    bridges: tuple[NetworkBridge, ...]


CREATE_NETWORK = Call("network.network.create", CreateNetwork, Network, mutates=True)
UPDATE_NETWORK = Call("network.network.update", UpdateNetwork, Network, mutates=True)
DELETE_NETWORK = Call("network.network.delete", DeleteById, Done, mutates=True)
GET_NETWORK = Call("network.network.get", GetById, Network)
LIST_NETWORKS = Call("network.network.list", ListQuery, Page)
NETWORK_CHANGED = Fact("fact.network.network.{id}.changed", Network)
NETWORK_DELETED = Fact("fact.network.network.{id}.deleted", Network)

CREATE_MAC_POOL = Call("network.mac_pool.create", CreateMacPool, MacPool, mutates=True)
UPDATE_MAC_POOL = Call("network.mac_pool.update", UpdateMacPool, MacPool, mutates=True)
DELETE_MAC_POOL = Call("network.mac_pool.delete", DeleteById, Done, mutates=True)
GET_MAC_POOL = Call("network.mac_pool.get", GetById, MacPool)
LIST_MAC_POOLS = Call("network.mac_pool.list", ListQuery, Page)
MAC_POOL_CHANGED = Fact("fact.network.mac_pool.{id}.changed", MacPool)
MAC_POOL_DELETED = Fact("fact.network.mac_pool.{id}.deleted", MacPool)

SETUP_HOST_NETWORKS = Call("network.host.setup", SetupHostNetworks, Operation, mutates=True)
LIST_ATTACHMENTS = Call("network.attachment.list", ListQuery, Page)
ATTACHMENT_CHANGED = Fact("fact.network.attachment.{id}.changed", Attachment)
ATTACHMENT_DELETED = Fact("fact.network.attachment.{id}.deleted", Attachment)

ALLOCATE_NIC = Call("network.nic.allocate", AllocateNic, AllocatedNic, mutates=True)
RELEASE_NIC = Call("network.nic.release", ReleaseNic, Done, mutates=True)
PREPARE_NETWORKS = Call("network.host.prepare", PrepareNetworks, PreparedNetworks, timeout_seconds=40)
