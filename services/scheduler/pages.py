"""Huge pages: how many of each size a VM takes of its host, and how they are kept. Pure.

Memory in huge pages is set aside on a host and serves nothing else, so it is counted by itself: a host's memory is what it
has besides its huge pages, and a VM that is backed by huge pages takes these and of the host's memory only QEMU's overhead.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from volery.contracts.agent import NumaCell
from volery.contracts.vm import PAGE_SIZES_KIB

KIB = 1024
SIZES = tuple(size * KIB for size in PAGE_SIZES_KIB)
"""In bytes, in the order of `Pages`."""
NAMES = ("2 MiB", "1 GiB")
PAGES = ("pages_2m", "pages_1g")
PAGES_USED = tuple(f"{name}_used" for name in PAGES)
"""Columns of the fleet and of the tables: how many there are, and how many claims hold."""


class Pages(NamedTuple):
    """How many huge pages of each size that x86-64 has."""

    small: int = 0
    large: int = 0

    @property
    def memory_bytes(self) -> int:
        return sum(count * size for count, size in zip(self, SIZES, strict=True))

    @property
    def page_kib(self) -> int:
        """The size that a VM with these is backed by; 0: it has none."""
        return next((size // KIB for count, size in zip(self, SIZES, strict=True) if count), 0)

    def times(self, factor: int) -> Pages:
        """-1 times gives back."""
        return Pages(*(count * factor for count in self))


NO_PAGES = Pages()


def total(several: Iterable[Pages]) -> Pages:
    """Of several VMs together."""
    return Pages(*(sum(counts) for counts in zip(*several, NO_PAGES, strict=True)))


def too_many(wanted: Pages, left: Pages) -> bool:
    """Whether a host that has these left lacks some of those; what isn't asked for isn't lacked."""
    return any(0 < count > rest for count, rest in zip(wanted, left, strict=True))


def pages_taken(memory_bytes: int, hugepage_kib: int) -> Pages:
    """By a VM with this much memory, backed by pages of this size; 0 is no huge pages."""
    if not hugepage_kib:
        return NO_PAGES
    return Pages(*(-(-memory_bytes // size) if size == hugepage_kib * KIB else 0 for size in SIZES))


def pages_of(cells: Iterable[NumaCell]) -> Pages:
    """What a host reports of its NUMA cells."""
    counts = dict.fromkeys(SIZES, 0)
    for cell in cells:
        for found in cell.huge_pages:
            if found.page_kib * KIB in counts:
                counts[found.page_kib * KIB] += found.count
    return Pages(*counts.values())
