"""What the tier is for: once each, on real systemd, kernels and NFS, with figures."""

from __future__ import annotations

import time
from collections.abc import Callable

from lab.errors import LabError
from vm_tier.machine import Machine
from vm_tier.site import AGENT, EXPORT, SHARED, Site
from volery.client import api
from volery.client.transport import Client
from volery.contracts.operation import Operation
from volery.contracts.vm import HighAvailability, Vm, VmStatus

GUEST_SECONDS = 900.0
RESTART_SECONDS = 600.0
DOWN_SECONDS = 300.0
SILENT_SECONDS = 60.0

Figures = dict[str, object]


def service(site: Site, client: Client) -> Figures:
    """The agent is a service of systemd's, and a VM that was started through REST runs there under `kvm`."""
    first = site.machines[0]
    manager = first.ssh(f"ps -o comm= -p 1; systemctl is-active {AGENT}; systemd-detect-virt").split()
    boot = first.ssh("systemd-analyze time | head -1").strip()
    host = site.host(client, first)
    vm = _running(site, client, "shown", first)
    domain = first.ssh(
        "virsh -q list --name | head -1 | xargs virsh dumpxml | grep -o \"domain type='[a-z]*'\""
    )
    seconds = _agent_seconds.get(vm.id, 0.0)
    return {
        "process 1": manager[0],
        "agent": manager[1],
        "hypervisor of the host": manager[2],
        "boot": boot,
        "host": f"{host.name} is {host.status}",
        "vm": f"{vm.name} is {vm.status}, {domain.strip()}",
        "start until the guest's agent answered, s": round(seconds, 1),
    }


def nfs(site: Site, client: Client) -> Figures:
    """The client host of a VM on NFSv4.2 loses its power; a person says so; the VM runs on the other."""
    server, lost = site.both
    mount = lost.ssh(f"findmnt -n -o FSTYPE,OPTIONS {SHARED}").strip()
    lease = server.ssh("cat /proc/fs/nfsd/nfsv4leasetime").strip()
    vm = _running(site, client, "moved", lost, high_availability=HighAvailability(enabled=True))
    killed = time.monotonic()
    lost.kill()
    site.until(
        lambda: site.host(client, lost).status == "non_responsive", SILENT_SECONDS, "ha to call it silent"
    )
    site.confirm(client, lost)
    confirmed = time.monotonic()
    said: dict[str, float] = {}

    def runs_elsewhere() -> bool:
        now = client.send(api.VMS.get(vm.id))
        for restart in client.list(api.RESTARTS):
            if restart.vm_id == vm.id and restart.message:
                said.setdefault(restart.message, round(time.monotonic() - confirmed, 1))
        return now.status is VmStatus.UP and now.host_id == site.host(client, server).id

    site.until(runs_elsewhere, RESTART_SECONDS, f"{vm.name} to run on {server.name}")
    runs = time.monotonic()
    attempts = [r for r in client.list(api.RESTARTS) if r.vm_id == vm.id]
    return {
        "mount": mount,
        "the server's lock time (nfsv4leasetime), s": lease,
        "from the plug to silent and confirmed, s": round(confirmed - killed, 1),
        "from the confirmation until QEMU runs on the other host, s": round(runs - confirmed, 1),
        "from the plug until then, s": round(runs - killed, 1),
        "restarts tried": attempts[0].attempts if attempts else 0,
        "refused meanwhile, and after how many seconds": said,
        "files": server.ssh(f"ls {EXPORT}").split(),
    }


def shutdown(site: Site, client: Client) -> Figures:
    """`systemctl poweroff` by its administrator: guests get ACPI, and the agent says that the host leaves."""
    last = site.machines[-1]
    vm = _running(site, client, "asked", last)
    host = site.host(client, last)
    began = time.monotonic()
    last.ssh("systemctl poweroff --no-block")
    site.until(
        lambda: client.send(api.VMS.get(vm.id)).status is VmStatus.DOWN, DOWN_SECONDS, f"{vm.name} to be down"
    )
    ended = time.monotonic()
    site.until(lambda: last.pid is None, DOWN_SECONDS, f"{last.name} to be off")
    off = time.monotonic()
    now = client.send(api.VMS.get(vm.id))
    return {
        "until the VM is down, s": round(ended - began, 1),
        "until the machine is off, s": round(off - began, 1),
        "why the VM ended": now.status_reason,
        "host": f"{host.name} is {site.host(client, last).status}",
    }


SHOWS: dict[str, Callable[[Site, Client], Figures]] = {"service": service, "nfs": nfs, "shutdown": shutdown}

_agent_seconds: dict[str, float] = {}


def _running(site: Site, client: Client, name: str, on: Machine, **fields: object) -> Vm:
    """The VM on this host, its guest's agent answering. The host is switched on if it is off."""
    if on.pid is None:
        site.up()
    vm = site.guest(client, name, on, **fields)
    if vm.status is not VmStatus.UP:
        began = time.monotonic()
        body = {"host_id": site.host(client, on).id}
        client.wait(client.send(api.VMS.act(vm.id, "start", Operation, body)))
        site.until(
            lambda: client.send(api.VMS.get(vm.id)).guest.agent_connected,
            GUEST_SECONDS,
            f"the agent in {name} to answer; `virsh console` on {on.name} shows its console",
        )
        _agent_seconds[vm.id] = time.monotonic() - began
    found = client.send(api.VMS.get(vm.id))
    if found.host_id != site.host(client, on).id:
        raise LabError(f"{name} runs on another host than {on.name}: stop it, then show this again")
    return found
