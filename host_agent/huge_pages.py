"""Huge pages of this host: what the kernel says of them, and whether a domain that they are to back can begin here."""

from __future__ import annotations

from pathlib import Path

from volery.contracts.domain import DomainSpec
from volery.contracts.errors import Kind, Refused
from volery.contracts.metrics import FreePages

KERNEL = Path("/sys/kernel/mm/hugepages")
KIB = 1024


def read(place: Path = KERNEL) -> tuple[FreePages, ...]:
    """Sizes of which the host has some. What is reserved for a program that hasn't touched it yet isn't free."""
    found = []
    for directory in sorted(place.glob("hugepages-*kB")):
        page_kib = int(directory.name.removeprefix("hugepages-").removesuffix("kB"))
        count, free = _number(directory / "nr_hugepages"), _number(directory / "free_hugepages")
        if count:
            left = max(free - _number(directory / "resv_hugepages"), 0)
            found.append(FreePages(page_kib=page_kib, count=count, free=left))
    return tuple(found)


def _number(path: Path) -> int:
    """0 where the kernel has no such file, or no such size any more."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return 0


def check(spec: DomainSpec, place: Path = KERNEL) -> None:
    """Raises Refused(exhausted) for a domain that asks for more than is free: another host may have them. QEMU would say
    only that it can't allocate memory."""
    if not spec.hugepage_kib:
        return
    size, wanted = spec.hugepage_kib, -(-spec.memory_bytes // (spec.hugepage_kib * KIB))
    found = next(
        (pages for pages in read(place) if pages.page_kib == size), FreePages(page_kib=size, count=0, free=0)
    )
    if found.free < wanted:
        raise Refused(
            Kind.EXHAUSTED,
            f"VM {spec.vm_id} needs {wanted} huge pages of {size} KiB, and {found.free} of this host's {found.count} are free:"
            f" end what uses them, or set {wanted - found.free} more aside"
            f" ({KERNEL}/hugepages-{size}kB/nr_hugepages)",
            vm_id=spec.vm_id,
            page_kib=size,
            wanted=wanted,
            free=found.free,
        )
