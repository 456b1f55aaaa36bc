"""The kernel's links, addresses and routes: read as plain values, changed in steps that can each be undone.

Every step may be done twice, and its opposite undoes it, also when it was done half or not at all: that is what
lets a change of the host's network be rolled back after a crash in its middle.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import msgspec
from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from volery.contracts.errors import Kind, Refused

T = TypeVar("T")

IFF_UP, IFF_LOOPBACK = 0x1, 0x8
FLOOD_MAC = "00:00:00:00:00:00"
VXLAN_PORT = 4789
RTPROT_KERNEL, RTPROT_RA = 2, 9
RTN_UNICAST = 1
RT_TABLE_LOCAL = 255
RTNH_F_ONLINK = 4
IFA_F_NODAD, IFA_F_PERMANENT, IFA_F_NOPREFIXROUTE = 0x02, 0x80, 0x200
SCOPE_LINK = 253


class Link(msgspec.Struct, frozen=True, kw_only=True):
    """One network device."""

    name: str
    index: int = 0
    kind: str = ""
    """bridge, vxlan, vlan, tun, veth, …; "" for a physical one."""
    mac: str = ""
    mtu: int = 1500
    up: bool = False
    carrier: bool = True
    """Whether the other end is there: a cable, a switch's port, a bond's members."""
    loopback: bool = False
    master: str = ""
    alias: str = ""
    """IFLA_IFALIAS: how Volery knows what it made."""
    vni: int = 0
    vlan: int = 0
    parent: str = ""
    local: str = ""
    port: int = 0
    peers: tuple[str, ...] = ()


class Address(msgspec.Struct, frozen=True, kw_only=True):
    link: str
    address: str
    prefix: int
    family: int
    scope: int = 0
    broadcast: str = ""
    flags: int = 0


class Route(msgspec.Struct, frozen=True, kw_only=True):
    """A unicast route out of one link. `destination` "" is the default route."""

    link: str
    family: int
    destination: str = ""
    prefix: int = 0
    gateway: str = ""
    table: int = 254
    metric: int = 0
    source: str = ""
    scope: int = 0
    proto: int = 4
    onlink: bool = False


class Kernel(msgspec.Struct, frozen=True, kw_only=True):
    """The host's network as it is now."""

    links: tuple[Link, ...]
    addresses: tuple[Address, ...] = ()
    routes: tuple[Route, ...] = ()
    """Those that a link's move must carry along: unicast, made by a person or a program, not by the kernel."""
    multipath: tuple[str, ...] = ()
    """Links that a route with several next hops uses: such a route can't be moved."""

    def link(self, name: str) -> Link | None:
        return next((link for link in self.links if link.name == name), None)


# Steps


class Make(msgspec.Struct, frozen=True, tag=True):
    link: Link


class Drop(msgspec.Struct, frozen=True, tag=True):
    link: Link


class Enslave(msgspec.Struct, frozen=True, tag=True):
    name: str
    master: str
    was: str


class SetMtu(msgspec.Struct, frozen=True, tag=True):
    name: str
    mtu: int
    was: int


class SetMac(msgspec.Struct, frozen=True, tag=True):
    name: str
    mac: str
    was: str


class SetUp(msgspec.Struct, frozen=True, tag=True):
    name: str
    up: bool
    was: bool


class SetPeers(msgspec.Struct, frozen=True, tag=True):
    name: str
    peers: tuple[str, ...]
    was: tuple[str, ...]


class Move(msgspec.Struct, frozen=True, tag=True):
    """Addresses and routes from one link to another; "" as a link takes them away, or brings them back."""

    source: str
    target: str
    addresses: tuple[Address, ...]
    routes: tuple[Route, ...]


class NatUp(msgspec.Struct, frozen=True, tag=True):
    """A libvirt network; done by the hypervisor, not here."""

    name: str
    xml: str


class NatDown(msgspec.Struct, frozen=True, tag=True):
    name: str
    xml: str


Step = Make | Drop | Enslave | SetMtu | SetMac | SetUp | SetPeers | Move | NatUp | NatDown

OPPOSITES: dict[type[Any], Callable[[Any], Step]] = {
    Make: lambda s: Drop(s.link),
    Drop: lambda s: Make(s.link),
    Enslave: lambda s: Enslave(s.name, s.was, s.master),
    SetMtu: lambda s: SetMtu(s.name, s.was, s.mtu),
    SetMac: lambda s: SetMac(s.name, s.was, s.mac),
    SetUp: lambda s: SetUp(s.name, s.was, s.up),
    SetPeers: lambda s: SetPeers(s.name, s.was, s.peers),
    Move: lambda s: Move(s.target, s.source, s.addresses, s.routes),
    NatUp: lambda s: NatDown(s.name, s.xml),
    NatDown: lambda s: NatUp(s.name, s.xml),
}


def opposite(step: Step) -> Step:
    return OPPOSITES[type(step)](step)


# Reading


def read() -> Kernel:
    """The network of this process's namespace. Blocks for some milliseconds: call it in a thread."""
    with IPRoute() as ip:
        raw = list(ip.get_links())
        names = {message["index"]: message.get_attr("IFLA_IFNAME") for message in raw}
        links = tuple(_link(ip, message, names) for message in raw)
        addresses = tuple(_addresses(ip.get_addr(), names))
        routes: list[Route] = []
        multipath: set[str] = set()
        for family in (socket.AF_INET, socket.AF_INET6):
            for message in ip.get_routes(family=family):
                multipath |= {names.get(h["oif"], "") for h in message.get_attr("RTA_MULTIPATH") or ()}
                if route := _route(message, names):
                    routes.append(route)
    return Kernel(links=links, addresses=addresses, routes=tuple(routes), multipath=tuple(sorted(multipath)))


def _link(ip: Any, message: Any, names: dict[int, str]) -> Link:
    info = message.get_attr("IFLA_LINKINFO")
    kind = info.get_attr("IFLA_INFO_KIND") if info else ""
    data = info.get_attr("IFLA_INFO_DATA") if info else None
    get = data.get_attr if kind in ("vxlan", "vlan") and data else lambda name: None
    link = Link(
        name=message.get_attr("IFLA_IFNAME"),
        index=message["index"],
        kind=kind or "",
        mac=message.get_attr("IFLA_ADDRESS") or "",
        mtu=message.get_attr("IFLA_MTU") or 0,
        up=bool(message["flags"] & IFF_UP),
        carrier=message.get_attr("IFLA_CARRIER") != 0,
        loopback=bool(message["flags"] & IFF_LOOPBACK),
        master=names.get(message.get_attr("IFLA_MASTER") or 0, ""),
        alias=message.get_attr("IFLA_IFALIAS") or "",
        vni=get("IFLA_VXLAN_ID") or 0,
        vlan=get("IFLA_VLAN_ID") or 0,
        parent=names.get(message.get_attr("IFLA_LINK") or 0, "") if kind == "vlan" else "",
        local=get("IFLA_VXLAN_LOCAL") or get("IFLA_VXLAN_LOCAL6") or "",
        port=get("IFLA_VXLAN_PORT") or 0,
    )
    return msgspec.structs.replace(link, peers=_peers(ip, link.index)) if kind == "vxlan" else link


def _peers(ip: Any, index: int) -> tuple[str, ...]:
    """Where a VXLAN device floods to."""
    entries = [e for e in ip.fdb("dump", ifindex=index) if e.get_attr("NDA_LLADDR") == FLOOD_MAC]
    return tuple(sorted(e.get_attr("NDA_DST") for e in entries if e.get_attr("NDA_DST")))


def _addresses(messages: Iterable[Any], names: dict[int, str]) -> Iterator[Address]:
    for message in messages:
        flags = message.get_attr("IFA_FLAGS") or message["flags"]
        if message["family"] == socket.AF_INET6 and not flags & IFA_F_PERMANENT:
            continue  # learned from a router: whichever link hears that router learns it again
        yield Address(
            link=names.get(message["index"], ""),
            address=message.get_attr("IFA_LOCAL") or message.get_attr("IFA_ADDRESS"),
            prefix=message["prefixlen"],
            family=message["family"],
            scope=message["scope"],
            broadcast=message.get_attr("IFA_BROADCAST") or "",
            flags=flags & IFA_F_NOPREFIXROUTE,
        )


def _route(message: Any, names: dict[int, str]) -> Route | None:
    link = names.get(message.get_attr("RTA_OIF") or 0, "")
    table = message.get_attr("RTA_TABLE") or message["table"]
    if not link or message["type"] != RTN_UNICAST or table == RT_TABLE_LOCAL:
        return None
    if message["proto"] in (RTPROT_KERNEL, RTPROT_RA):
        return None
    return Route(
        link=link,
        family=message["family"],
        destination=message.get_attr("RTA_DST") or "",
        prefix=message["dst_len"],
        gateway=message.get_attr("RTA_GATEWAY") or "",
        table=table,
        metric=message.get_attr("RTA_PRIORITY") or 0,
        source=message.get_attr("RTA_PREFSRC") or "",
        scope=message["scope"],
        proto=message["proto"],
        onlink=bool(message["flags"] & RTNH_F_ONLINK),
    )


# Changing


def perform(step: Step) -> None:
    """Does one step. Blocks for some milliseconds: call it in a thread. Raises Refused with the kernel's reason."""
    with IPRoute() as ip:
        try:
            _PERFORMERS[type(step)](ip, step)
        except NetlinkError as error:
            raise explained(step, error) from error


def explained(step: Step, error: NetlinkError) -> Refused:
    reason = str(error.args[1]) if len(error.args) > 1 else str(error)
    if isinstance(step, Make) and error.code == errno.EOPNOTSUPP:
        return Refused(
            Kind.UNAVAILABLE,
            f"this host's kernel has no {step.link.kind} devices: load its module, or use a network without",
            feature=step.link.kind,
        )
    if isinstance(step, Enslave) and error.code == errno.EOPNOTSUPP:
        return Refused(Kind.INVALID, f"{step.name} can't be put into a bridge: the kernel says {reason}")
    what = type(step).__name__
    about = (
        getattr(step, "name", "")
        or getattr(getattr(step, "link", None), "name", "")
        or getattr(step, "target", "")
    )
    return Refused(Kind.CONFLICT, f"the kernel refused {what} of {about}: {reason}", errno=error.code)


@contextlib.contextmanager
def _tolerating(*codes: int) -> Iterator[None]:
    try:
        yield
    except NetlinkError as error:
        if error.code not in codes:
            raise


def _index(ip: Any, name: str) -> int | None:
    found = ip.link_lookup(ifname=name)
    return found[0] if found else None


def _make(ip: Any, step: Make) -> None:
    link = step.link
    if _index(ip, link.name) is None:
        settings = _KINDS[link.kind](ip, link) | ({"address": link.mac} if link.mac else {})
        ip.link("add", ifname=link.name, kind=link.kind, mtu=link.mtu, **settings)
    index = _index(ip, link.name)
    ip.link("set", index=index, ifalias=link.alias)
    if link.kind == "vxlan":
        _set_peers(ip, SetPeers(link.name, link.peers, ()))


def _bridge(ip: Any, link: Link) -> dict[str, Any]:
    # An address of its own: else a bridge takes its ports' lowest, and changes it as VMs come and go.
    own = ":".join(f"{byte:02x}" for byte in (2, *os.urandom(5)))
    return {"br_stp_state": 0, "br_forward_delay": 0, "address": own}


def _vxlan(ip: Any, link: Link) -> dict[str, Any]:
    local = {"vxlan_local6" if ":" in link.local else "vxlan_local": link.local} if link.local else {}
    return {"vxlan_id": link.vni, "vxlan_port": link.port or VXLAN_PORT, "vxlan_learning": 1, **local}


def _vlan(ip: Any, link: Link) -> dict[str, Any]:
    return {"link": _index(ip, link.parent), "vlan_id": link.vlan}


_KINDS: dict[str, Callable[[Any, Link], dict[str, Any]]] = {"bridge": _bridge, "vxlan": _vxlan, "vlan": _vlan}


def _drop(ip: Any, step: Drop) -> None:
    """Only what carries our mark, or was just made and has none yet."""
    index = _index(ip, step.link.name)
    if index is not None and (ip.get_links(index)[0].get_attr("IFLA_IFALIAS") or "") in ("", step.link.alias):
        ip.link("del", index=index)


def _change(ip: Any, name: str, **settings: Any) -> None:
    index = _index(ip, name)
    if index is not None:
        ip.link("set", index=index, **settings)


def _enslave(ip: Any, step: Enslave) -> None:
    master = _index(ip, step.master) if step.master else 0
    if master is not None:
        _change(ip, step.name, master=master)


def _set_peers(ip: Any, step: SetPeers) -> None:
    index = _index(ip, step.name)
    if index is None:
        return
    present = set(_peers(ip, index))
    for peer in sorted(present - set(step.peers)):
        with _tolerating(errno.ENOENT):
            ip.fdb("del", ifindex=index, lladdr=FLOOD_MAC, dst=peer)
    for peer in sorted(set(step.peers) - present):
        with _tolerating(errno.EEXIST):
            ip.fdb("append", ifindex=index, lladdr=FLOOD_MAC, dst=peer)


def _move(ip: Any, step: Move) -> None:
    source = _index(ip, step.source) if step.source else None
    target = _index(ip, step.target) if step.target else None
    if step.target and target is None:
        return
    for address in step.addresses:
        settings = {"address": address.address, "prefixlen": address.prefix, "family": address.family}
        if source is not None:
            with _tolerating(errno.EADDRNOTAVAIL):
                ip.addr("del", index=source, **settings)
        if target is not None:
            with _tolerating(errno.EEXIST):
                ip.addr("add", index=target, scope=address.scope, **settings, **_address_settings(address))
    for route in sorted(step.routes, key=lambda r: bool(r.gateway)):  # what leads to a gateway comes first
        if target is not None:
            ip.route("replace", **_route_settings(route, target))


def _address_settings(address: Address) -> dict[str, Any]:
    # No duplicate detection: it was this host's a moment ago, and would not be usable for seconds.
    nodad = IFA_F_NODAD if address.family == socket.AF_INET6 else 0
    broadcast = {"broadcast": address.broadcast} if address.broadcast else {}
    return {"flags": address.flags | nodad, **broadcast}


def _route_settings(route: Route, link: int) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "family": route.family,
        "oif": link,
        "dst": f"{route.destination}/{route.prefix}" if route.destination else "default",
        "table": route.table,
        "scope": route.scope,
        "proto": route.proto,
    }
    optional = {"gateway": route.gateway, "priority": route.metric, "prefsrc": route.source}
    settings |= {name: value for name, value in optional.items() if value}
    return settings | ({"flags": ["onlink"]} if route.onlink else {})


_PERFORMERS: dict[type[Any], Callable[[Any, Any], None]] = {
    Make: _make,
    Drop: _drop,
    Enslave: _enslave,
    SetMtu: lambda ip, s: _change(ip, s.name, mtu=s.mtu),
    SetMac: lambda ip, s: _change(ip, s.name, address=s.mac),
    SetUp: lambda ip, s: _change(ip, s.name, state="up" if s.up else "down"),
    SetPeers: _set_peers,
    Move: _move,
}
