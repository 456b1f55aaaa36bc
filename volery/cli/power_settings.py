"""What `volery host power-management set` asks for: what there is, but for what its line or file names. Pure."""

from __future__ import annotations

from typing import Any

import msgspec
from msgspec.structs import replace

from volery.contracts.power import NewFenceDevice, PowerManagement, SetPowerManagement

NONE = "none"
"""As the value of an option that may be given several times: there is to be none of it."""


class Unclear(Exception):
    """What can't be meant. `str` says what to name."""


def kept(host_id: str, known: PowerManagement | None) -> SetPowerManagement:
    """All as it is. Devices keep their secrets, since none are named."""
    if known is None:
        return SetPowerManagement(id=host_id, devices=())
    return SetPowerManagement(
        id=host_id,
        devices=tuple(msgspec.convert(msgspec.to_builtins(d), NewFenceDevice) for d in known.devices),
        if_revision=known.revision,
        enabled=known.enabled,
        together=known.together,
        kdump_addresses=known.kdump_addresses,
        kdump_proves=known.kdump_proves,
    )


def device(known: tuple[NewFenceDevice, ...], named: dict[str, Any]) -> NewFenceDevice:
    """The one device that there is to be, with these fields of it named. Raises Unclear."""
    if {"agent", "address"} <= named.keys() and len(known) != 1:
        return NewFenceDevice(**named)
    if not known:
        raise Unclear("name --agent and --address, or a --file with the devices")
    if len(known) > 1:
        raise Unclear(
            f"it has {len(known)} devices: change them with a --file that has all of them, or replace them with one by"
            " naming its --agent and --address"
        )
    (only,) = known
    if named.get("agent", only.agent) != only.agent:  # another agent's options and ports mean nothing to it
        only = NewFenceDevice(agent=only.agent, address=only.address, username=only.username)
    return replace(only, **named)


def from_file(before: SetPowerManagement, given: dict[str, Any]) -> SetPowerManagement:
    """`given` is the body of the PUT, or a part of it. Raises Unclear, msgspec.DecodeError."""
    after = msgspec.convert(msgspec.to_builtins(before) | given | {"id": before.id}, SetPowerManagement)
    return vouched(before, after, named="kdump_proves" in given)


def vouched(before: SetPowerManagement, after: SetPowerManagement, *, named: bool) -> SetPowerManagement:
    """That no guest can send was said of the addresses of then: of others it must be `named` anew. Raises Unclear."""
    if named or not after.kdump_proves:
        return after
    if not after.kdump_addresses:
        return replace(after, kdump_proves=False)
    if set(after.kdump_addresses) != set(before.kdump_addresses):
        raise Unclear(
            "its dumps prove its death, since no guest can send from the addresses that it has now: say of the new ones,"
            " too, with --kdump-proves or --no-kdump-proves (`kdump_proves` in a file)"
        )
    return after
