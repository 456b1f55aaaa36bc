"""Levers of the rule about devices of hosts; what a lever is says levers.py."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product

import numpy as np
from msgspec.structs import replace

from services.scheduler.fleet import Fleet, Ints
from services.scheduler.policies.devices import Asks, HostState, choose
from services.scheduler.policies.levers import NEVER, Lever
from services.scheduler.policies.request import Request
from volery.contracts.host_devices import AskedDevice
from volery.contracts.scheduling import Change, ChangeKind


def fewer(asks: Asks, most: Sequence[int]) -> Iterator[Asks]:
    """What is left of it with no more than so many of each, the fewest taken out first."""
    left = product(*(range(count, -1, -1) for count in most))
    for counts in sorted(left, key=lambda counts: -sum(counts)):
        yield tuple(replace(ask, count=count) for ask, count in zip(asks, counts, strict=True) if count)


def fitting(host: HostState, asks: Asks) -> Asks:
    """As much of it as the host can give. What it can't give even by itself isn't tried with all of the others: of eight kinds
    that would be thousands of questions for each host."""
    most = [_alone(host, ask) for ask in asks]
    return next(some for some in fewer(asks, most) if choose(host, some) is not None)


def _alone(host: HostState, ask: AskedDevice) -> int:
    """How many the host can give of one kind."""
    counts = range(ask.count, 0, -1)
    return next((n for n in counts if choose(host, (replace(ask, count=n),)) is not None), 0)


def _count(asks: Asks) -> int:
    return sum(ask.count for ask in asks)


def _too_many(fleet: Fleet, request: Request) -> Ints:
    asks = request.need.host_devices
    most = _count(asks)
    amounts = np.full(len(fleet), most if asks else NEVER, np.int64)
    if not asks:
        return amounts
    for host, host_ids in fleet.devices.kinds():
        lacking = most - _count(fitting(host, asks))
        rows = [fleet.rows[host_id] for host_id in host_ids if host_id in fleet.rows]
        amounts[rows] = lacking
    return amounts


def ask_for_fewer(fleet: Fleet, request: Request, row: int, amount: int) -> Change:
    asks = request.need.host_devices
    kept = fitting(fleet.devices.state_of(fleet.ids[row]), asks)
    now, wanted = _text(asks), _text(kept)
    sentence = f"give {request.vm} {wanted or 'no devices'} of its host instead of {now}"
    return Change(
        rules=(), kind=ChangeKind.VM, object_kind="vm", object_id=request.need.vm_id,
        object_name=request.need.name, field="host_devices", current=now, wanted=wanted, amount=amount, unit="devices",
        sentence=sentence,
    )  # fmt: skip


def _text(asks: Asks) -> str:
    return ", ".join(ask.text for ask in asks)


DEVICE_LEVERS = (
    Lever(
        "host_devices",
        ChangeKind.VM,
        "host_devices",
        _too_many,
        ask_for_fewer,
        lambda r: max(_count(r.need.host_devices), 1),
    ),
)
