"""How long a guest with a lease is away when its host loses its power, in a lab of two hosts; each trial's timeline.

`sudo .venv/bin/python -m bench.lost_host [--io-timeout 10] [--loses power|both|nothing] [--trials 1]`. The host loses its
power, and its BMC proves that; or both together, and only the lease that isn't renewed any more can prove it; or nothing: it
stands still until its watchdog, or ha, has ended it.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from lab import plane
from lab.board import Fault
from lab.lab import Lab
from volery.client import api
from volery.client.request import Request, body_of
from volery.client.transport import Client
from volery.contracts.leases import MARGIN_SECONDS, dead_seconds
from volery.contracts.liveness import LivenessState
from volery.contracts.operation import Operation
from volery.contracts.power import NewFenceDevice, PowerManagement, SetPowerManagement
from volery.contracts.storage import StorageDomain
from volery.contracts.vm import CreateVm, HighAvailability, NewDisk, Vm, VmStatus
from volery.setup.console import Output
from volery.setup.down import down

MEMORY_BYTES = 160 << 20
HURRIED = {"VOLERY_HA_START_HOLD_SECONDS": "5", "VOLERY_HA_SWITCH_QUIET_SECONDS": "1"}


def until(holds: Callable[[], bool], seconds: float, what: str) -> float:
    """When it was so, by the monotonic clock."""
    deadline = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > deadline:
            raise TimeoutError(f"within {seconds:.0f} s: {what}")
        time.sleep(0.1)
    return time.monotonic()


def prepare(lab: Lab, client: Client, io_timeout: int) -> StorageDomain:
    """BMCs that were tested, and leases by which an expired one proves the host's end."""
    for host in lab.hosts:
        bmc = lab.bmc(host.number)
        user, password = bmc.login
        device = NewFenceDevice(
            agent="fence_redfish",
            address=bmc.address,
            username=user,
            options={"ssl_insecure": "1"},
            secrets={"password": password},
        )
        ident = client.find(api.HOSTS, host.name).id
        path = f"hosts/{ident}/power-management"
        question = SetPowerManagement(id=ident, devices=(device,))
        client.send(Request("PUT", path, PowerManagement, body_of(question)))
        client.send(Request("POST", f"{path}/test", PowerManagement, b"{}"))
    shared = client.find(api.STORAGE_DOMAINS, "shared")
    client.send(api.STORAGE_DOMAINS.update(shared.id, {"leases": False}, 0))
    until(lambda: not client.send(api.STORAGE_DOMAINS.get(shared.id)).lease_host_ids, 120, "hosts have left")
    fields = {"leases": True, "lease_io_timeout_seconds": io_timeout, "reset_hosts": True}
    client.send(api.STORAGE_DOMAINS.update(shared.id, fields, 0))
    return joined(client, shared.id)


def joined(client: Client, domain_id: str) -> StorageDomain:
    until(
        lambda: len(client.send(api.STORAGE_DOMAINS.get(domain_id)).lease_host_ids) == 2,
        240,
        "both hosts have joined the lockspace",
    )
    return client.send(api.STORAGE_DOMAINS.get(domain_id))


def guest(client: Client, shared: StorageDomain) -> Vm:
    image = client.find(api.DISKS, plane.IMAGE)
    ask = CreateVm(
        name=f"lost-{time.monotonic_ns()}",
        cluster_id=client.find(api.CLUSTERS, plane.NAME).id,
        memory_bytes=MEMORY_BYTES,
        disks=(NewDisk(storage_domain_id=image.storage_domain_id, copy_of=image.id),),
        high_availability=HighAvailability(enabled=True),
        lease=shared.id,
    )
    vm_id = client.wait(client.send(api.VMS.create(ask, Operation))).object_id
    client.wait(client.send(api.VMS.act(vm_id, "start", Operation)))
    until(lambda: client.send(api.VMS.get(vm_id)).guest.agent_connected, 120, "the guest answers")
    return client.send(api.VMS.get(vm_id))


def trial(lab: Lab, client: Client, shared: StorageDomain, loses: str) -> float:
    """Seconds from the loss to the guest that runs elsewhere."""
    vm = guest(client, shared)
    number = int(client.send(api.HOSTS.get(vm.host_id)).name.removeprefix("h"))
    host, bmc = lab.host(number), lab.bmc(number)
    longest = dead_seconds(shared.lease_io_timeout_seconds) + 120.0
    if loses == "both":
        bmc.set_fault(Fault.UNREACHABLE)
    if loses == "nothing":
        host.freeze()
    else:
        host.power_off()
    off = time.monotonic()

    def now() -> Vm:
        return client.send(api.VMS.get(vm.id))

    dead = until(
        lambda: client.send(api.LIVENESS.get(vm.host_id)).state is LivenessState.DEAD,
        longest,
        "the host is dead",
    )
    proof = client.send(api.LIVENESS.get(vm.host_id)).proof
    ordered = until(lambda: now().epoch > vm.epoch, 60, "its restart was ordered")
    back = until(
        lambda: now().status is VmStatus.UP and now().host_id != vm.host_id, 120, "it runs elsewhere"
    )
    answers = until(lambda: now().guest.agent_connected, 120, "the guest answers")
    print(
        f"proven {dead - off:.1f} s ({proof.kind if proof else '?'}), restart ordered {ordered - off:.1f} s, "
        f"runs elsewhere {back - off:.1f} s, answers {answers - off:.1f} s",
        flush=True,
    )
    bmc.set_fault(Fault.NONE)
    host.power_on()  # one that stood still may have been ended by its watchdog: then nobody else switches it on
    until(lambda: client.send(api.HOSTS.get(vm.host_id)).status == "up", 120, "the host is up again")
    joined(client, shared.id)
    client.wait(client.send(api.VMS.act(vm.id, "stop", Operation, {"force": True})))
    client.wait(client.send(api.VMS.delete(vm.id, Operation)))
    return back - off


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__)
    asked.add_argument("--io-timeout", type=int, default=10)
    asked.add_argument("--loses", choices=("power", "both", "nothing"), default="both")
    asked.add_argument("--trials", type=int, default=1)
    options = asked.parse_args()
    state = Path(tempfile.mkdtemp(prefix="volery-lost-", dir="/tmp"))
    state.chmod(0o755)  # PostgreSQL's own user passes through
    lab, output = Lab(state), Output(Console(quiet=True))
    try:
        lab.up(2)
        plane.home_of(lab).create()
        plane.home_of(lab).change_settings(HURRIED)
        client = plane.connect(lab, output)
        shared = prepare(lab, client, options.io_timeout)
        print(
            f"io_timeout {options.io_timeout} s: sanlock gives a lost lease to others after "
            f"{dead_seconds(options.io_timeout)} s, ha believes it after "
            f"{dead_seconds(options.io_timeout) + MARGIN_SECONDS} s"
        )
        took = [trial(lab, client, shared, options.loses) for _ in range(options.trials)]
        print(f"runs elsewhere: median {statistics.median(took):.1f} s, max {max(took):.1f} s")
        client.http.close()
    finally:
        down(plane.home_of(lab), output)
        lab.down()
        shutil.rmtree(state, ignore_errors=True)


if __name__ == "__main__":
    main()
