"""What libvirt tells about a host and its guests, in types of our own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class GuestInfo:
    """What a guest's agent told about its guest."""

    hostname: str = ""
    ip_addresses: tuple[str, ...] = ()
    os: str = ""


@dataclass(frozen=True, slots=True)
class NodeInfo:
    memory_bytes: int
    cpus: int
    numa_cells: int
    sockets: int
    cores_per_socket: int
    threads_per_core: int


@dataclass(frozen=True, slots=True)
class Versions:
    """libvirt's numbers: major * 1,000,000 + minor * 1,000 + release."""

    libvirt: int
    hypervisor: int


@dataclass(frozen=True, slots=True)
class NetworkState:
    name: str
    active: bool
    bridge: str
    xml: str


def guest_of(info: Mapping[str, Any]) -> GuestInfo:
    """What virDomainGetGuestInfo says; loopback and link-local addresses are left out."""
    addresses = []
    for i in range(info.get("if.count", 0)):
        for j in range(info.get(f"if.{i}.addr.count", 0)):
            address = info.get(f"if.{i}.addr.{j}.addr", "")
            if address and not address.startswith(("127.", "169.254.", "fe80:")) and address != "::1":
                addresses.append(address)
    return GuestInfo(info.get("hostname", ""), tuple(addresses), info.get("os.pretty-name", ""))
