"""Leases by unmodified sanlock and wdmd, on a watchdog that the host can't outlive, over NFS."""

from __future__ import annotations

import re
import time
from datetime import datetime

from lab.errors import LabError
from vm_tier.guests import Figures, running, stop
from vm_tier.machine import Machine
from vm_tier.qmp import monitor
from vm_tier.site import AGENT, DOMAIN, Site
from volery.client import api
from volery.client.transport import Client
from volery.contracts.leases import dead_seconds
from volery.contracts.storage import StorageDomain
from volery.contracts.vm import HighAvailability, VmStatus

IO_TIMEOUT_SECONDS = 10
JOIN_SECONDS = 300.0
WATCHDOG_SECONDS = 300.0
RESTART_SECONDS = 900.0
BACK_SECONDS = 1800.0

FILES = {
    "/etc/modules-load.d/watchdog.conf": "i6300esb\n",
    "/etc/modprobe.d/watchdog.conf": "blacklist iTCO_wdt\n",  # QEMU's chipset has one, and it resets nothing
    "/etc/default/sanlock": 'enabled=1\nsanlock_opts=""\n',
    "/etc/systemd/system/sanlock.service.d/volery.conf": "[Unit]\nAfter=wdmd.service\nRequires=wdmd.service\n",
    "/etc/libvirt/qemu-sanlock.conf": "auto_disk_leases = 0\nrequire_lease_for_disks = 0\n",
}
"""As docs/architecture/leases.md has it for Debian."""
LOOK = "grep -qx 'lock_manager = \"sanlock\"' /etc/libvirt/qemu.conf && systemctl -q is-active sanlock wdmd && echo ready || :"
START = """
set -e
modprobe -r iTCO_wdt 2>/dev/null || :
modprobe i6300esb
grep -qx 'lock_manager = "sanlock"' /etc/libvirt/qemu.conf || echo 'lock_manager = "sanlock"' >> /etc/libvirt/qemu.conf
systemctl daemon-reload
systemctl -q enable wdmd sanlock
systemctl restart wdmd sanlock libvirtd {agent}
"""


def show(site: Site, client: Client) -> Figures:
    """`hv2`, with a VM that holds its lease on NFS, loses its way to it. Its watchdog resets it; then, and not before, the
    VM starts on `hv1`."""
    other, lost = site.both
    for machine in (other, lost):
        if machine.pid is None:
            site.up()
        prepare(site, client, machine)
    domain = join(site, client)
    protected = HighAvailability(enabled=True)
    vm = running(site, client, "leased", lost, high_availability=protected, lease=domain.id).vm
    held = lost.ssh("sanlock client status").splitlines()
    device = lost.ssh("cat /sys/class/watchdog/watchdog0/identity").strip()
    lost.ssh("sync")
    host = site.host(client, lost)

    def runs_elsewhere() -> bool:
        now = client.send(api.VMS.get(vm.id))
        return now.status is VmStatus.UP and now.host_id == site.host(client, other).id

    with monitor(lost.monitor) as qemu:
        renewed = renewal(other, lost, domain)
        lost.cable("down")
        cut = time.time()
        reset = qemu.event("WATCHDOG", WATCHDOG_SECONDS)
        early = client.send(api.VMS.get(vm.id))
        site.until(runs_elsewhere, RESTART_SECONDS, f"{vm.name} to run on {other.name}")
    runs = time.time()
    judged = client.send(api.LIVENESS.get(host.id))
    proof = judged.proof
    lost.cable("up")
    lost.answers(BACK_SECONDS)
    site.up()
    left = lost.ssh("virsh -q list --name").split()
    stop(client, vm)
    return {
        "watchdog": device,
        "held on the host": "; ".join(line for line in held if line.startswith(("s ", "r "))),
        "io_timeout, s": domain.lease_io_timeout_seconds,
        "from the last renewal until others may take it, s": dead_seconds(domain.lease_io_timeout_seconds),
        "last renewal read before the cut": renewed,
        "from the cut until the watchdog reset the host, s": round(reset - cut, 1),
        "the VM then": f"{early.status}, on {'its host' if early.host_id == host.id else 'another host'}",
        "proof": f"{proof.kind}: {proof.details}" if proof else "none",
        "from the cut until the proof, s": round(proof.at.timestamp() - cut, 1) if proof else "",
        "from the cut until QEMU runs on the other host, s": round(runs - cut, 1),
        "VMs on the host that was reset": left,
    }


def prepare(site: Site, client: Client, machine: Machine) -> None:
    """What an administrator sets up on a host, once."""
    if "ready" in machine.ssh(LOOK):
        return
    for path, text in FILES.items():
        machine.write(path, text)
    machine.write("/etc/sanlock/sanlock.conf", f"our_host_name = {machine.ident}\n")
    machine.ssh(START.format(agent=AGENT), seconds=600)
    site.until(
        lambda: site.host(client, machine).status == "up",
        JOIN_SECONDS,
        f"{machine.name} to be up with sanlock",
    )


def join(site: Site, client: Client) -> StorageDomain:
    """The shared directory holds leases, and both hosts have joined its lockspace."""
    domain = client.find(api.STORAGE_DOMAINS, DOMAIN)
    if not domain.leases:
        fields = {"leases": True, "lease_io_timeout_seconds": IO_TIMEOUT_SECONDS, "reset_hosts": True}
        client.send(api.STORAGE_DOMAINS.update(domain.id, fields, 0))

    def now() -> StorageDomain:
        return client.send(api.STORAGE_DOMAINS.get(domain.id))

    try:
        site.until(lambda: len(now().lease_host_ids) == len(site.machines), JOIN_SECONDS, "all hosts to join")
    except LabError as error:
        raise LabError(f"{error}: {now().lease_problems}") from error
    return now()


def renewal(reader: Machine, holder: Machine, domain: StorageDomain) -> str:
    """The line of the holder's host lease, as another host reads it from the storage."""
    path = f"{domain.path}/{domain.id}/leases/lockspace"
    said = reader.ssh(f"sanlock direct dump {path}")
    lines = [line for line in said.splitlines() if str(holder.ident) in line]
    return f"{datetime.now():%H:%M:%S} {re.sub(' +', ' ', lines[0]).strip()}" if lines else "not found"
