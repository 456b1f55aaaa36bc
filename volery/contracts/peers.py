"""Hosts that try another host for ha: whether its programs answer them. Evidence of life, never of death.

Not orders: nothing is journaled or repeated, and nothing is changed by it.
"""

from __future__ import annotations

from enum import StrEnum

from volery.contracts.base import Message

TRY_SUBJECT = "host.{host_id}.try"
"""ha asks a host to try another: a NATS request, signed by ha as questions about power are."""


class Speaks(StrEnum):
    """What is said at a door, so that whoever is behind it must answer."""

    TLS = "tls"
    LIBVIRT = "libvirt"
    """libvirt's own protocol without TLS."""
    SSH = "ssh"


class Door(Message):
    """A program of a host that other hosts reach."""

    name: str
    """agent, libvirt."""
    address: str
    """HOST:PORT."""
    speaks: Speaks = Speaks.TLS


class Reach(StrEnum):
    """How far a host got at another's door, the least first."""

    NOTHING = "nothing"
    """No connection in time."""
    TAKEN = "taken"
    """Its kernel took the connection, or refused it, and no program said a word: it may be frozen."""
    ANSWERS = "answers"
    """A program of it spoke: the machine runs."""


class TryHost(Message):
    """ha to a peer of the host that is to be tried."""

    host_id: str
    """The peer."""
    target_host_id: str
    doors: tuple[Door, ...]
    """One to four."""


class DoorTried(Message):
    name: str
    reach: Reach
    words: str = ""
    """For people."""


class HostTried(Message):
    """What a peer found, a door each, in the order of the question."""

    host_id: str
    target_host_id: str
    doors: tuple[DoorTried, ...] = ()
