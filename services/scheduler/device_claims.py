"""What is written of devices of hosts: what hosts have, what claims hold, and the guard that gives each to one VM.

The row of a host's devices is written after the host's own, whose lock orders claims.
"""

from __future__ import annotations

from collections.abc import Iterable

from volery.contracts.base import encode
from volery.contracts.host import Host
from volery.contracts.scheduling import Claim
from volery.runtime.tables import Change, text_columns


def saw_devices(hosts: Iterable[Host]) -> Change:
    """Nothing of a host of which a newer revision is known. Most hosts have no devices, and no row."""
    return Change(
        """insert into host_device_list (host_id, revision, devices)
           select n.id, n.revision::bigint, n.devices
           from unnest({0}::text[], {1}::text[], {2}::text[]) as n(id, revision, devices)
           where n.devices <> '' or exists (select 1 from host_device_list l where l.host_id = n.id)
           on conflict (host_id) do update set revision = excluded.revision, devices = excluded.devices
           where host_device_list.revision <= excluded.revision""",
        text_columns((host.id, host.revision, _text(host)) for host in hosts),
        guarded=False,
    )


def _text(host: Host) -> str:
    devices = host.capabilities.devices
    return encode(devices).decode() if devices else ""


def take(claim: Claim, vm_name: str) -> list[Change]:
    """Fails when devices of the host were given or taken back since these were chosen."""
    if not claim.devices:
        return []
    guard = Change(
        "update host_device_list set uses = uses + 1 where host_id = {0} and uses = {1} returning 1",
        (claim.host_id, claim.devices_revision),
    )
    return [guard, _note(claim, vm_name)]


def force(claim: Claim, vm_name: str) -> list[Change]:
    """For a VM that runs there already. What the table says is another's stays that one's."""
    return [_count(claim.host_id), _note(claim, vm_name)] if claim.devices else []


def give_back(claim: Claim) -> list[Change]:
    if not claim.devices:
        return []
    gone = Change("delete from claim_device where claim_id = {0}", (claim.id,), guarded=False)
    return [_count(claim.host_id), gone]


def _count(host_id: str) -> Change:
    return Change(
        "update host_device_list set uses = uses + 1 where host_id = {0}", (host_id,), guarded=False
    )


def _note(claim: Claim, vm_name: str) -> Change:
    return Change(
        """insert into claim_device (claim_id, host_id, device, mdev_type, number, vm_id, vm_name)
           select {3}, {4}, n.device, n.mdev_type, n.number::integer, {5}, {6}
           from unnest({0}::text[], {1}::text[], {2}::text[]) as n(device, mdev_type, number)
           on conflict do nothing""",
        (
            *text_columns((d.name, d.mdev_type, d.number) for d in claim.devices),
            claim.id,
            claim.host_id,
            claim.vm_id,
            vm_name,
        ),
        guarded=False,
    )
