"""What the tier is for: once each, on real systemd, kernels and NFS, with figures."""

from __future__ import annotations

import time
from collections.abc import Callable

from vm_tier import show_nfs3, show_panic, show_sanlock
from vm_tier.guests import GUEST_SECONDS, Figures, running, stop
from vm_tier.site import AGENT, EXPORT, SHARED, Site
from volery.client import api
from volery.client.transport import Client
from volery.contracts.vm import HighAvailability, VmStatus

RESTART_SECONDS = 600.0
DOWN_SECONDS = 300.0
SILENT_SECONDS = 60.0


def service(site: Site, client: Client) -> Figures:
    """The agent is a service of systemd's, and a VM that was started through REST runs there under `kvm`."""
    first = site.machines[0]
    manager = first.ssh(f"ps -o comm= -p 1; systemctl is-active {AGENT}; systemd-detect-virt").split()
    boot = first.ssh("systemd-analyze time | head -1").strip()
    host = site.host(client, first)
    guest = running(site, client, "shown", first)
    vm, seconds = guest.vm, guest.agent_seconds
    domain = first.ssh(
        "virsh -q list --name | head -1 | xargs virsh dumpxml | grep -o \"domain type='[a-z]*'\""
    )
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
    protected = HighAvailability(enabled=True)
    vm = running(site, client, "moved", lost, high_availability=protected, lease="").vm
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
    site.until(
        lambda: client.send(api.VMS.get(vm.id)).guest.agent_connected, GUEST_SECONDS, "its guest's agent"
    )
    answers = time.monotonic()
    attempts = [r for r in client.list(api.RESTARTS) if r.vm_id == vm.id]
    files = server.ssh(f"ls {EXPORT}").split()
    stop(client, vm)
    return {
        "mount": mount,
        "the server's lock time (nfsv4leasetime), s": lease,
        "from the plug to silent and confirmed, s": round(confirmed - killed, 1),
        "from the confirmation until QEMU runs on the other host, s": round(runs - confirmed, 1),
        "from the plug until then, s": round(runs - killed, 1),
        "from then until its guest's agent answers, s": round(answers - runs, 1),
        "restarts that count": attempts[0].attempts if attempts else 0,
        "refused meanwhile, and after how many seconds": said,
        "files": files,
    }


def shutdown(site: Site, client: Client) -> Figures:
    """`systemctl poweroff` by its administrator: guests get ACPI, and the agent says that the host leaves."""
    last = site.machines[-1]
    vm = running(site, client, "asked", last).vm
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


SHOWS: dict[str, Callable[[Site, Client], Figures]] = {
    "service": service,
    "nfs": nfs,
    "nfs3": show_nfs3.show,
    "sanlock": show_sanlock.show,
    "panic": show_panic.show,
    "shutdown": shutdown,
}
