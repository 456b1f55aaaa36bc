"""Whom ha asks about a silent host, at which doors, and what their words come to. Pure.

A peer that gets no answer proves nothing. One that gets an answer proves nothing either, but is a reason for a person to
look at the network, and for a cluster whose policy says so to spare the host.
"""

from __future__ import annotations

import ipaddress
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

from volery.contracts.agent import HostCapabilities
from volery.contracts.peers import Door, DoorTried, Reach, Speaks

PEERS = 3
"""How many are asked: one may be at fault itself, and more than these say nothing new."""
FRESH_SECONDS = 30.0
"""An older word spares nobody."""
LIBVIRT_PORTS = {"tls": (Speaks.TLS, 16514), "tcp": (Speaks.LIBVIRT, 16509), "ssh": (Speaks.SSH, 22)}
"""By the transport of a libvirt URI; its own default port."""


@dataclass(frozen=True, slots=True)
class Peer:
    """What one host found when it tried another."""

    at: float
    """When it was asked: what it found was true no earlier."""
    name: str
    reach: Reach
    words: str = ""


def doors_of(capabilities: HostCapabilities) -> tuple[Door, ...]:
    """Where other hosts reach this one, as it says itself. Addresses that are everybody's own are none."""
    found = []
    host, _, port = capabilities.data_address.rpartition(":")
    if port.isdecimal() and _is_elsewhere(host.strip("[]")):
        found.append(Door(name="agent", address=capabilities.data_address, speaks=Speaks.TLS))
    door = _libvirt(capabilities.libvirt_uri)
    return (*found, door) if door is not None else tuple(found)


def _libvirt(uri: str) -> Door | None:
    try:
        parts = urlsplit(uri)
        host, port = parts.hostname or "", parts.port
    except ValueError:
        return None
    spoken = LIBVIRT_PORTS.get(parts.scheme.partition("+")[2])
    if spoken is None or not _is_elsewhere(host):
        return None
    speaks, usual = spoken
    return Door(
        name="libvirt", address=f"{f'[{host}]' if ':' in host else host}:{port or usual}", speaks=speaks
    )


def _is_elsewhere(host: str) -> bool:
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host not in ("", "localhost")
    return not (address.is_loopback or address.is_unspecified)


def choose(target_id: str, peer_ids: Iterable[str]) -> list[str]:
    """Those that are asked about this host: the same as long as they can be asked, others for another host."""
    return sorted(peer_ids, key=lambda peer_id: zlib.crc32(f"{target_id} {peer_id}".encode()))[:PEERS]


def found_by(at: float, name: str, doors: Sequence[DoorTried]) -> Peer:
    """The farthest that it got at any door, and its words about each."""
    order = list(Reach)
    reach = max((door.reach for door in doors), key=order.index, default=Reach.NOTHING)
    return Peer(at, name, reach, ", ".join(f"{door.name}: {door.words or door.reach}" for door in doors))


def answered(peers: Iterable[Peer], now: float) -> int:
    """How many got an answer a short while ago."""
    return sum(peer.reach is Reach.ANSWERS and now - peer.at < FRESH_SECONDS for peer in peers)


def reached(peers: Iterable[Peer]) -> frozenset[tuple[str, Reach]]:
    """What must differ before it is worth telling."""
    return frozenset((peer.name, peer.reach) for peer in peers)


def sentence(peers: Sequence[Peer]) -> str:
    """What they found, for people."""
    return (
        "; ".join(f"{peer.name} tried it: {peer.words}" for peer in peers)
        or "no host of its cluster tried it"
    )
