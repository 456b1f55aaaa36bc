"""The rule about devices of hosts: whether a host has those that a VM asks for, and nobody else has them."""

from __future__ import annotations

from services.scheduler.fleet import Bools, Fleet
from services.scheduler.policies.devices import missing
from services.scheduler.policies.request import Request


def has_devices(fleet: Fleet, request: Request) -> Bools:
    asks = request.need.host_devices
    return fleet.among(fleet.devices.having(asks)) if asks else fleet.everyone


def lacks_devices(fleet: Fleet, request: Request, row: int) -> tuple[str, str]:
    name, host_id = fleet.names[row], fleet.ids[row]
    devices = fleet.devices
    told = list(missing(devices.state_of(host_id), devices.held(host_id), request.need.host_devices))
    wanted = ", ".join(ask.text for ask in request.need.host_devices)
    return (
        f"{request.vm} wants {wanted} of its host, which {name} can't give: {'; '.join(why for why, _ in told)}",
        "; ".join(dict.fromkeys(f"{change} on {name}" for _, change in told)),
    )
