"""Run by a machine with an IOMMU: a network card of it is given to a VM by the agent's own order, and comes back."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

from host_agent import host_devices
from tests.support.vms import tiny_spec, vm_host
from volery.contracts.errors import Refused
from volery.contracts.host_devices import GivenDevice


def driver(address: str) -> str:
    return (Path("/sys/bus/pci/devices") / address / "driver").resolve().name


async def main() -> None:
    async with vm_host("qemu:///system", Path("/run/agent"), domain_call_seconds=300.0) as vms:
        told = await host_devices.describe(vms.host)
        cards = [device for device in told if device.class_code == "020000"]
        card = next(device for device in cards if not device.in_use)
        given = GivenDevice(name=card.name, kind=card.kind, address=card.address)
        before = driver(card.address)
        spec = tiny_spec(devices=(given,))
        await vms.run(spec)
        during = driver(card.address)
        try:
            await vms.run(tiny_spec(devices=(given,)))
            refused = ""
        except Refused as problem:
            refused = problem.message
        still = next(device for device in await host_devices.describe(vms.host) if device.name == card.name)
        await vms.power_off(spec.vm_id)
        said = {
            "groups": [card.iommu_group for card in cards],
            "in_use": [card.in_use for card in cards],
            "model": card.model,
            "drivers": [before, during, driver(card.address)],
            "meanwhile": [still.driver, still.in_use],
            "refused": refused,
        }
        print("SAID", json.dumps(said), flush=True)


asyncio.run(main())
