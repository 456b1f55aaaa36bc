"""What is read of devices of hosts: what hosts have, and what claims hold of it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from services.scheduler.policies.devices import NOTHING, Held
from services.scheduler.store import Pool
from volery.contracts.host_devices import DeviceKind, GivenDevice


class Listed(NamedTuple):
    """A host's devices as the tables have them."""

    devices: str
    held: Held


_SELECT = """select l.host_id, l.devices, l.uses, c.device, c.mdev_type, c.number, c.vm_id, c.vm_name
             from host_device_list l left join claim_device c on c.host_id = l.host_id"""
_ORDER = "order by l.host_id, c.device, c.mdev_type, c.claim_id, c.number"


async def uses(pool: Pool) -> dict[str, int]:
    """Host → how often devices of it were given or taken back."""
    records = await pool.fetch("select host_id, uses from host_device_list")
    return {r["host_id"]: r["uses"] for r in records}


async def listed(pool: Pool, host_ids: Collection[str] | None = None) -> dict[str, Listed]:
    """What these hosts have, or all, each as of one moment."""
    if host_ids is None:
        records = await pool.fetch(f"{_SELECT} {_ORDER}")
    else:
        records = await pool.fetch(f"{_SELECT} where l.host_id = any($1::text[]) {_ORDER}", list(host_ids))
    found: dict[str, Listed] = {}
    for record in records:
        host_id = record["host_id"]
        now = found.get(host_id, Listed(record["devices"], NOTHING))
        held = now.held if record["device"] is None else _with(now.held, dict(record))
        found[host_id] = Listed(now.devices, replace(held, uses=record["uses"]))
    return found


def _with(held: Held, record: Mapping[str, Any]) -> Held:
    kind = DeviceKind.MDEV if record["mdev_type"] else DeviceKind.PCI
    device = GivenDevice(name=record["device"], kind=kind, mdev_type=record["mdev_type"])
    return held.with_more([device], record["vm_id"], record["vm_name"])


async def correct(pool: Pool) -> None:
    """Without what claims and hosts left that are no more: a replica of the previous release knows nothing of devices."""
    left = await pool.fetch(
        """delete from claim_device c where not exists (select 1 from claim where id = c.claim_id)
           returning host_id"""
    )
    if left:
        await pool.execute(
            "update host_device_list set uses = uses + 1 where host_id = any($1::text[])",
            sorted({record["host_id"] for record in left}),
        )
    await pool.execute(
        "delete from host_device_list l where not exists (select 1 from host_capacity where id = l.host_id)"
    )
