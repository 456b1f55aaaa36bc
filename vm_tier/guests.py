"""Virtual machines of what is shown."""

from __future__ import annotations

import time
from dataclasses import dataclass

from lab.errors import LabError
from vm_tier.machine import Machine
from vm_tier.site import Site
from volery.client import api
from volery.client.transport import Client
from volery.contracts.operation import Operation
from volery.contracts.vm import Vm, VmStatus

GUEST_SECONDS = 900.0

Figures = dict[str, object]


@dataclass(frozen=True)
class Guest:
    vm: Vm
    agent_seconds: float
    """From the order to start until its guest's agent answered; 0: it ran already."""


def running(site: Site, client: Client, name: str, on: Machine, **fields: object) -> Guest:
    """The VM on this host, its guest's agent answering. The host is switched on if it is off."""
    if on.pid is None:
        site.up()
    vm, seconds = site.guest(client, name, on, **fields), 0.0
    if vm.status is not VmStatus.UP:
        began = time.monotonic()
        body = {"host_id": site.host(client, on).id}
        client.wait(client.send(api.VMS.act(vm.id, "start", Operation, body)))
        site.until(
            lambda: client.send(api.VMS.get(vm.id)).guest.agent_connected,
            GUEST_SECONDS,
            f"the agent in {name} to answer; `virsh console` on {on.name} shows its console",
        )
        seconds = time.monotonic() - began
    found = client.send(api.VMS.get(vm.id))
    if found.host_id != site.host(client, on).id:
        raise LabError(f"{name} runs on another host than {on.name}: stop it, then show this again")
    return Guest(found, seconds)


def stop(client: Client, vm: Vm) -> None:
    """It has been shown: it makes room, and the next time starts anew."""
    client.wait(client.send(api.VMS.act(vm.id, "stop", Operation, {"force": True})))
