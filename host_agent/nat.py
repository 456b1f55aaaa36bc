"""NAT networks: a libvirt network each, with a bridge, DHCP by dnsmasq and a subnet nobody else uses."""

from __future__ import annotations

import ipaddress
import xml.etree.ElementTree as ET

from host_agent.netlink import Kernel
from volery.contracts.errors import conflict, invalid
from volery.contracts.network_orders import HostNetwork

SUBNETS = tuple(
    ipaddress.IPv4Network(f"192.168.{third}.0/24") for third in (*range(130, 250), *range(100, 130))
)
"""Tried in this order where no subnet is given; libvirt's own default network has 192.168.122.0/24."""
PREFIXES = range(8, 30)


def network_name(installation: str, network_id: str) -> str:
    """libvirt's name for the network: says whose it is, so that installations leave each other's alone."""
    return f"volery-{installation}-{network_id}" if installation else f"volery-{network_id}"


def is_own(name: str, installation: str) -> bool:
    prefix = network_name(installation, "")
    return name.startswith(prefix) and len(name) == len(prefix) + 36


def subnet(network: HostNetwork, kernel: Kernel, former_bridge: str = "") -> ipaddress.IPv4Network:
    """The network's subnet, or a free one. Raises Refused when it overlaps with one that the host uses otherwise."""
    used = in_use(kernel, {network.bridge, former_bridge})
    free = next((n for n in SUBNETS if not any(n.overlaps(other) for other in used)), None)
    if not network.subnet:
        if free is None:
            raise conflict(f"network {network.name} finds no free subnet on this host: give it one")
        return free
    try:
        wanted = ipaddress.IPv4Network(network.subnet)
    except ValueError as error:
        raise invalid(f"network {network.name}: {network.subnet!r} isn't an IPv4 network: {error}") from error
    if wanted.prefixlen not in PREFIXES:
        raise invalid(
            f"network {network.name}: {wanted} has no room for guests or is too large: use /8 to /29"
        )
    clash = next((other for other in used if other.overlaps(wanted)), None)
    if clash is not None:
        raise conflict(
            f"network {network.name}: {wanted} overlaps with {clash}, which this host already uses; "
            + (f"{free} is free" if free else "choose another"),
            subnet=str(wanted),
            used=str(clash),
        )
    return wanted


def in_use(kernel: Kernel, own_bridges: set[str]) -> list[ipaddress.IPv4Network]:
    """The IPv4 networks that the host's addresses and routes name, but for the default route."""
    pairs = [(a.address, a.prefix) for a in kernel.addresses if a.link not in own_bridges]
    pairs += [(r.destination, r.prefix) for r in kernel.routes if r.destination and r.link not in own_bridges]
    return [
        ipaddress.IPv4Network(f"{host}/{prefix}", strict=False) for host, prefix in pairs if ":" not in host
    ]


def network_xml(network: HostNetwork, name: str, addresses: ipaddress.IPv4Network) -> str:
    """A libvirt network: its first address is the host's, the others are leased to guests."""
    root = ET.Element("network")
    ET.SubElement(root, "name").text = name
    ET.SubElement(root, "uuid").text = network.network_id
    ET.SubElement(root, "bridge", name=network.bridge, stp="off", delay="0")
    ET.SubElement(root, "forward", mode="nat")
    ET.SubElement(root, "mtu", size=str(network.mtu))
    ip = ET.SubElement(root, "ip", address=str(addresses[1]), netmask=str(addresses.netmask))
    dhcp = ET.SubElement(ip, "dhcp")
    ET.SubElement(dhcp, "range", start=str(addresses[2]), end=str(addresses[-2]))
    return ET.tostring(root, encoding="unicode")


def described(xml: str) -> tuple[str, str, int]:
    """(bridge, subnet, mtu) of a libvirt network's XML."""
    root = ET.fromstring(xml)  # noqa: S314 — libvirt's own answer
    bridge, ip, mtu = root.find("bridge"), root.find("ip"), root.find("mtu")
    addresses = ""
    if ip is not None:
        mask = ip.get("netmask") or ip.get("prefix", "")
        addresses = str(ipaddress.IPv4Network(f"{ip.get('address')}/{mask}", strict=False))
    return (
        bridge.get("name", "") if bridge is not None else "",
        addresses,
        int(mtu.get("size", "1500")) if mtu is not None else 1500,
    )
