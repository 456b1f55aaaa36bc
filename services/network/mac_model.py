"""MAC addresses and the ranges they are taken from. Pure: no bus, no database, no chance but what is passed in."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from random import Random

from volery.contracts.errors import Kind, Refused, conflict, invalid

MAC = re.compile(r"[0-9a-f]{2}([:-][0-9a-f]{2}){5}", re.IGNORECASE)
MULTICAST = 1 << 40
LAST = (1 << 48) - 1
MAX_RANGES = 100
MAX_SIZE = 1 << 32
GUESSES = 16
"""Addresses tried at random before the lowest free one is looked for."""


@dataclass(frozen=True, slots=True, order=True)
class Range:
    """Addresses from `first` to `last`, both included, as numbers."""

    first: int
    last: int

    @property
    def size(self) -> int:
        return self.last - self.first + 1

    def text(self) -> str:
        return f"{mac_text(self.first)}-{mac_text(self.last)}"


def mac_number(mac: str) -> int:
    """48 bits. Raises Refused(invalid) for what isn't an address that a NIC can have."""
    if not MAC.fullmatch(mac):
        raise invalid(
            f"{mac[:40]!r} isn't a MAC address: write six pairs of hexadecimal digits, e.g. 56:6f:1a:00:00:01",
            field="mac",
        )
    number = int(mac.replace(":", "").replace("-", ""), 16)
    if number & MULTICAST or number == 0:
        raise invalid(
            f"{mac} can't be the address of a NIC: it is {'a multicast address' if number else 'empty'}; "
            "the second digit must be even",
            field="mac",
        )
    return number


def mac_text(number: int) -> str:
    digits = f"{number:012x}"
    return ":".join(digits[i : i + 2] for i in range(0, 12, 2))


def ranges(texts: Sequence[str]) -> tuple[Range, ...]:
    """The ranges of a pool in ascending order. Raises Refused(invalid)."""
    if not 1 <= len(texts) <= MAX_RANGES:
        raise invalid(f"a MAC pool has 1 to {MAX_RANGES} ranges, not {len(texts)}", field="ranges")
    found = sorted(_range(text) for text in texts)
    for before, after in pairwise(found):
        if after.first <= before.last:
            raise invalid(f"ranges {before.text()} and {after.text()} overlap", field="ranges")
    if sum(r.size for r in found) > MAX_SIZE:
        raise invalid(f"a MAC pool has at most {MAX_SIZE} addresses", field="ranges")
    return tuple(found)


def _range(text: str) -> Range:
    first_text, dash, last_text = text.strip().partition("-") if ":" in text else ("", "", "")
    if not dash:
        raise invalid(
            f"{text[:80]!r} isn't a range of MAC addresses: write first-last, e.g. "
            "56:6f:1a:00:00:00-56:6f:1a:00:ff:ff",
            field="ranges",
        )
    first, last = mac_number(first_text.strip()), mac_number(last_text.strip())
    if first > last:
        raise invalid(f"range {text} ends before it begins: swap its ends", field="ranges")
    if first >> 40 != last >> 40:
        raise invalid(
            f"range {text} would hold multicast addresses: its ends must share the first two digits",
            field="ranges",
        )
    return Range(first, last)


def size(pool: Sequence[Range]) -> int:
    return sum(r.size for r in pool)


def at(pool: Sequence[Range], index: int) -> int:
    """The address at this place of the pool, from 0."""
    for r in pool:
        if index < r.size:
            return r.first + index
        index -= r.size
    raise IndexError(index)


def holds(pool: Sequence[Range], number: int) -> bool:
    return any(r.first <= number <= r.last for r in pool)


def guesses(pool: Sequence[Range], random: Random) -> Iterator[int]:
    """Addresses to try first: spread at random, so that those who ask at once seldom meet, and an address that
    was given back is not given to somebody else at once (switches and neighbours remember it)."""
    total = size(pool)
    for _ in range(GUESSES):
        yield at(pool, random.randrange(total))


def default_range(random: Random) -> Range:
    """65,536 addresses of an installation's own: oVirt's prefix 56:6f, then 16 bits by chance."""
    first = 0x566F << 32 | random.randrange(1 << 16) << 16
    return Range(first, first | 0xFFFF)


def exhausted(name: str, total: int) -> Refused:
    return Refused(
        Kind.EXHAUSTED,
        f"MAC pool {name} has no free address: all {total} are in use; add a range to it, or remove NICs",
        rule="mac_pool",
        size=total,
    )


def refuse_taken(mac: str, pool_name: str, vm_name: str) -> Refused:
    return conflict(
        f"MAC address {mac} is in use by VM {vm_name}: choose another one, leave it out to get a free one, or let "
        f"MAC pool {pool_name} allow duplicates",
        mac=mac,
    )
