"""What a host's crash kernel says while it writes its dump, and what follows from it. Pure.

The messages are those of `fence_kdump_send`: eight bytes, a magic number and a version, in the sender's byte order. They
name no host and are signed by nobody: only the address that they come from says whose they are, and whoever can send from
that address can send them. So they only delay, unless an administrator says that no guest can reach their network.
"""

from __future__ import annotations

import ipaddress
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from services.ha.config import HaConfig
from volery.contracts.errors import invalid

APART_SECONDS = 2.0
"""Two messages are two only so far apart; a host that lives beats four times in between."""
MAGIC = 0x1B302A40
VERSIONS = (1,)
SIZE = 8
MAX_ADDRESSES = 8


class Ignored(StrEnum):
    """Why a message counts for nothing."""

    SIZE = "wrong_size"
    MAGIC = "wrong_magic"
    VERSION = "unknown_version"
    STRANGER = "unknown_address"
    SHARED = "address_of_two_hosts"


@dataclass(frozen=True, slots=True)
class Source:
    """Whose messages come from an address."""

    host_id: str
    trusted: bool
    """The administrator says that no guest can reach the network that they come by."""


@dataclass(frozen=True, slots=True)
class Dump:
    """One dump under way, as far as messages tell."""

    first_at: float
    """Of the first message without a sign of life, another address or a pause since."""
    at: float
    """Of the newest."""
    trusted: bool
    """Of all of them: their network was known to be closed to guests when they came."""
    address: str = ""


def fault_of(data: bytes) -> Ignored | None:
    """None: it is a message."""
    if len(data) != SIZE:
        return Ignored.SIZE
    for order in "<>":
        magic, version = struct.unpack(f"{order}II", data)
        if magic == MAGIC:
            return None if version in VERSIONS else Ignored.VERSION
    return Ignored.MAGIC


def address_of(text: str) -> str:
    """In one spelling, IPv4 also when it comes by an IPv6 socket. Raises ValueError."""
    address = ipaddress.ip_address(text.partition("%")[0])
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return str(mapped or address)


def check_addresses(texts: Sequence[str], *, proves: bool, taken: Mapping[str, str]) -> tuple[str, ...]:
    """As they are kept. `taken` are other hosts' addresses, with the host's name. Raises Refused(invalid)."""
    if len(texts) > MAX_ADDRESSES:
        raise invalid(
            f"kdump_addresses are at most {MAX_ADDRESSES}, not {len(texts)}", rule="kdump_addresses"
        )
    found: list[str] = []
    for text in texts:
        try:
            address = address_of(text.strip())
        except ValueError:
            raise invalid(
                f"kdump_addresses are IP addresses from which the host's crash kernel sends, not {text[:80]!r}",
                rule="kdump_addresses",
            ) from None
        parsed = ipaddress.ip_address(address)
        if parsed.is_unspecified or parsed.is_multicast:
            raise invalid(f"{address} is no host's own address", rule="kdump_addresses")
        if address in taken:
            raise invalid(
                f"messages from {address} are already those of host {taken[address]}: an address tells one host's dump",
                rule="kdump_addresses",
                host=taken[address],
            )
        found.append(address)
    if proves and not found:
        raise invalid(
            "kdump_proves needs kdump_addresses: the addresses from which the host's crash kernel sends",
            rule="kdump_proves",
        )
    return tuple(dict.fromkeys(found))


def heard(old: Dump | None, at: float, address: str, source: Source, since: float, config: HaConfig) -> Dump:
    """With one more message. `since` is the last sign of life: what came before it is about an earlier dump, or was none."""
    goes_on = (
        old is not None
        and old.first_at > since
        and at - old.at < config.kdump_finished_seconds
        and (old.trusted, old.address) == (source.trusted, address)
    )
    return replace(old, at=at) if goes_on and old is not None else Dump(at, at, source.trusted, address)


def words(dump: Dump | None, since: float, now: float, config: HaConfig) -> str:
    """What power waits for; "" when it doesn't: no dump, one that has ended, or one that takes too long."""
    if dump is None or dump.first_at <= since:
        return ""
    over = now - dump.at >= config.kdump_finished_seconds
    if over or now - dump.first_at >= config.kdump_longest_seconds:
        return ""
    return (
        f"it crashed, and its crash kernel at {dump.address} writes a dump: it is switched off "
        f"{config.kdump_finished_seconds:g} s after the last message of it, or {config.kdump_longest_seconds / 60:g} min "
        "after the first"
    )
