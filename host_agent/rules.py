"""Which orders a host obeys. Pure: no bus, no disk, no clock.

Every refusal here is deterministic: epochs, order numbers, leadership and the host's boot clock only grow, so a
late copy of what was refused once is refused again.
"""

from __future__ import annotations

from dataclasses import dataclass

from volery.contracts.agent import OrderEnvelope
from volery.contracts.domain_orders import ADMIT_MIGRATION, FORGET_DOMAIN, RUN_DOMAIN, STOP_DOMAIN
from volery.contracts.errors import Kind, Problem

OPENS = frozenset({RUN_DOMAIN.kind, ADMIT_MIGRATION.kind})
"""Orders that make a domain run here: refused at an epoch that was closed."""
CLOSES = frozenset({STOP_DOMAIN.kind, FORGET_DOMAIN.kind})
"""Orders after whose success nothing of their epoch, or a lower one, may run here again."""

BOOT_SHIFT = 40
"""Beat numbers: milliseconds of the boot clock below this bit (34 years), the boot's ordinal above it."""


@dataclass(frozen=True, slots=True)
class Known:
    """What the journal knows about an order's object and owner before it decides."""

    epoch: int = 0
    order_seq: int = 0
    order_id: str = ""
    closed_epoch: int = 0
    fencing_token: int = 0
    cancelled: bool = False


def judge(order: OrderEnvelope, known: Known) -> Problem | None:
    """Why an order that the journal doesn't have is refused, or None."""
    what = f"order {order.order_id} ({order.kind}) for {order.object_id}"
    if known.cancelled:
        return Problem(kind=Kind.CONFLICT, message=f"{what} was cancelled before it came; nothing was done")
    if order.fencing_token < known.fencing_token:
        return Problem(
            kind=Kind.STALE,
            message=f"{what} comes from a former leader of {order.owner} (token {order.fencing_token}, the host"
            f" has seen {known.fencing_token}): the present leader must send it",
            details={"fencing_token": known.fencing_token},
        )
    if order.epoch < known.epoch:
        return _behind(what, "epoch", order.epoch, known)
    if order.kind in OPENS and order.epoch <= known.closed_epoch:
        return _behind(what, "epoch", order.epoch, known)
    if order.order_seq <= known.order_seq:
        return _behind(what, "order_seq", order.order_seq, known)
    return None


def _behind(what: str, field: str, value: int, known: Known) -> Problem:
    floor = {
        "epoch": max(known.epoch, known.closed_epoch + 1),
        "order_seq": known.order_seq + 1,
    }
    return Problem(
        kind=Kind.CONFLICT,
        message=f"{what} is out of date: its {field} is {value}, and this host has seen later orders for it;"
        f" only {field} {floor[field]} or higher is obeyed",
        details={"rule": field, **floor, "last_order_id": known.order_id},
    )


def stale(order: OrderEnvelope, now_beat: int) -> Problem | None:
    """Why an order is too old to be obeyed, or None. `now_beat` is the number a beat sent now would have."""
    age = too_old(order.beat_seq, order.ttl_ms, now_beat)
    if age is None:
        return None
    return Problem(
        kind=Kind.STALE,
        message=f"order {order.order_id} ({order.kind}) for {order.object_id} {age}:"
        " send it again with the newest beat, or cancel it",
        details={"beat_seq": now_beat},
    )


def too_old(beat_seq: int, ttl_ms: int, now_beat: int) -> str | None:
    """What is wrong with the age of something that names a beat and how long it is good for; None if it is fresh."""
    if beat_seq >> BOOT_SHIFT != now_beat >> BOOT_SHIFT:
        return "names a beat from another boot of this host"
    if beat_seq > now_beat:
        return "names a beat that this host has not sent"
    if (age_ms := now_beat - beat_seq) > ttl_ms:
        return f"is {age_ms} ms old by this host's clock and was good for {ttl_ms} ms"
    return None
