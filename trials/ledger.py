"""The ledger: a disk on which the small guest itself writes, so that the disk alone says who wrote, and when.

512-byte sectors. Sector 0 is the header, which is no text, so that it may be uploaded as a disk; sector N is `N BOOT UPTIME`, with the guest's boot id and its seconds
of uptime, padded with blanks, ended by a newline; what was never written is zeros (guest_files/init.sh).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

SECTOR = 512
SECTORS = 16384
SIZE = SECTOR * SECTORS
"""8 MiB: an hour at four sectors a second."""
HEADER = b"volery-ledger"


@dataclass(frozen=True, slots=True)
class Boot:
    """One boot's records: they stand together, `first` to `last`."""

    id: str
    first: int
    last: int


class Torn(Exception):
    """The ledger shows two writers, or lost a write."""


def blank() -> bytes:
    """A new ledger."""
    return (HEADER.ljust(SECTOR - 1, b"\0") + b"\n").ljust(SIZE, b"\0")


def read(content: bytes) -> list[Boot]:
    """The boots that wrote, in order. Raises Torn when a boot wrote after another had begun, when a sector is not
    what its writer put there, or when one between two records is missing."""
    if not content.startswith(HEADER):
        raise Torn("the ledger's header is gone")
    boots: list[Boot] = []
    ended = 0
    for number in range(1, len(content) // SECTOR):
        sector = content[number * SECTOR : (number + 1) * SECTOR]
        if not sector.strip(b"\0"):
            ended = ended or number
            continue
        if ended:
            raise Torn(f"sector {ended} is empty, but sector {number} is written")
        said, boot = _record(number, sector)
        if said != number:
            raise Torn(f"sector {number} says that it is {said}: two boots counted differently")
        if boots and boots[-1].id == boot:
            boots[-1] = Boot(boot, boots[-1].first, number)
        elif any(known.id == boot for known in boots):
            raise Torn(f"boot {boot} wrote sector {number} after {boots[-1].id} had begun")
        else:
            boots.append(Boot(boot, number, number))
    return boots


def _record(number: int, sector: bytes) -> tuple[int, str]:
    words = sector.decode("ascii", "replace").split()
    if len(words) != 3 or not words[0].isdigit() or sector[-1:] != b"\n":
        raise Torn(f"sector {number} is no record: {sector[:60]!r}")
    return int(words[0]), words[1]


def boots_of(path: Path) -> list[Boot]:
    """Of a raw volume's file, as it is now. Raises Torn."""
    return read(path.read_bytes())
