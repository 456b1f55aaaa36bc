"""The client cursor: one position per owner, in one word that fits an SSE id.

`{history}.i{n}.s{n}.w{n}.h{n}.c{n}.d{n}`: history is six hexadecimal digits of each owner's history id in the
order of the letters (inventory, storage, network, ha, scheduler, dwh); 000000 for one whose stream was not
there yet. A client treats it as opaque.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from volery.contracts.base import Owner
from volery.contracts.errors import Refused, invalid

LETTERS: dict[Owner, str] = {
    Owner.INVENTORY: "i",
    Owner.STORAGE: "s",
    Owner.NETWORK: "w",
    Owner.HA: "h",
    Owner.SCHEDULER: "c",
    Owner.DWH: "d",
}
OWNERS = tuple(LETTERS)
COUNT = len(OWNERS)
DIGITS = 6
NO_HISTORY = "0" * DIGITS
_SHAPE = re.compile(
    rf"([0-9a-f]{{{DIGITS * COUNT}}})" + "".join(rf"\.{letter}(\d{{1,15}})" for letter in LETTERS.values())
)


@dataclass(frozen=True, slots=True)
class Cursor:
    """How far a client has read each owner's log, in the order of `OWNERS`."""

    histories: tuple[str, ...]
    """Six digits each."""
    positions: tuple[int, ...]

    def text(self) -> str:
        numbers = zip(LETTERS.values(), self.positions, strict=True)
        return "".join(self.histories) + "".join(f".{letter}{n}" for letter, n in numbers)


def short(history: str) -> str:
    """What a cursor keeps of an owner's history id."""
    return history[:DIGITS] if history else NO_HISTORY


def parse(text: str) -> Cursor:
    """Raises Refused(invalid) for what was never a cursor."""
    found = _SHAPE.fullmatch(text)
    if found is None:
        raise not_one(text)
    whole = found[1]
    histories = tuple(whole[i * DIGITS : (i + 1) * DIGITS] for i in range(COUNT))
    return Cursor(histories, tuple(int(n) for n in found.groups()[1:]))


def not_one(text: str) -> Refused:
    return invalid(
        f"{text[:80]!r} is not a cursor: take the id of an event you received, or leave it out to begin now",
        field="after",
    )
