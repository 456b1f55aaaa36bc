"""A host panics, and its crash kernel writes a dump: what ha hears, says, and waits for."""

from __future__ import annotations

import contextlib
import secrets
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from lab.bmc import make_certificate
from lab.board import Board
from lab.errors import LabError
from lab.redfish import RedfishServer
from vm_tier.guests import Figures, running, stop
from vm_tier.machine import Machine
from vm_tier.qmp import monitor
from vm_tier.site import Site
from volery.client import api
from volery.client.request import Request, body_of
from volery.client.transport import Client
from volery.contracts.base import Done
from volery.contracts.host import Host
from volery.contracts.power import Fencing, Identity, NewFenceDevice, PowerManagement, SetPowerManagement
from volery.contracts.vm import HighAvailability, Vm, VmStatus

PORT = 7410
BMC_PORT = 18443
DUMP_SECONDS = 1800.0
SENDER = """[Unit]
Description=Tells Volery that this machine writes a dump
DefaultDependencies=no
ConditionPathExists=/proc/vmcore
Wants=systemd-networkd.service network-online.target
After=network-online.target
Before=kdump-tools-dump.service

[Service]
ExecStart=/usr/libexec/fence-agents/fence_kdump_send -p {port} -i 5 {address}

[Install]
WantedBy=kdump-tools-dump.service
"""
"""docs/power-management.md has it."""


@dataclass
class Seen:
    """What ha hears and says after a panic; times are seconds after it."""

    client: Client
    host: Host
    vm: Vm
    panicked: float
    heard: int
    first: float = 0.0
    last: float = 0.0
    ran: float = 0.0
    said: dict[str, float] = field(default_factory=dict)

    def look(self) -> bool:
        """Whether the VM runs again, and the crash kernel was heard."""
        after = round(time.time() - self.panicked, 1)
        heard, liveness = messages(self.client), self.client.send(api.LIVENESS.get(self.host.id))
        if heard > self.heard:
            self.first, self.last, self.heard = self.first or after, after, heard
        self.said.setdefault(f"{liveness.state}: {liveness.fencing}", after)
        now = self.client.send(api.VMS.get(self.vm.id))
        if not self.ran and now.status is VmStatus.UP and now.epoch > self.vm.epoch:
            self.ran = after
        return bool(self.ran and (self.first or self._was_switched()))

    def _was_switched(self) -> bool:
        return any(
            record.host_id == self.host.id and record.created_at.timestamp() > self.panicked
            for record in self.client.list(api.FENCE_RECORDS)
        )


def show(site: Site, client: Client) -> Figures:
    """`hv2`, with a running VM, a BMC and a crash kernel, panics: power waits for the dump, the VM for a proof."""
    other, lost = site.both
    if lost.pid is None:
        site.up()
    prepare(site, lost)
    with bmc(site, lost) as device, monitor(lost.monitor) as qemu:
        host = manage_power(client, site.host(client, lost), lost, device)
        protected = HighAvailability(enabled=True)
        vm = running(site, client, "dumped", lost, high_availability=protected, lease="").vm
        heard = messages(client)
        seen = Seen(client, host, vm, panic(lost), heard)
        site.until(seen.look, DUMP_SECONDS, f"{vm.name} to run again and the crash kernel to be heard")
        rebooted = 0.0
        with contextlib.suppress(LabError):  # it was switched off
            rebooted = qemu.event("RESET", DUMP_SECONDS) - seen.panicked
        proof = client.send(api.LIVENESS.get(host.id)).proof
        site.up()
        power = [record for record in client.list(api.FENCE_RECORDS) if record.host_id == host.id]
        where = client.send(api.VMS.get(vm.id)).host_id
        stop(client, vm)
        client.send(Request("DELETE", f"hosts/{host.id}/power-management", Done))  # its BMC ends with this
    switched = [record for record in power if record.created_at.timestamp() > seen.panicked]
    return {
        "from the panic until ha heard the first message, s": seen.first or "switched off before",
        "messages heard": seen.heard - heard,
        "from the panic until the dump was written and the host rebooted, s": round(rebooted, 1)
        or "not seen",
        "what ha said, and from when (s after the panic)": seen.said,
        "power was switched": [step.step for record in switched for step in record.steps] or "no",
        "proof": f"{proof.kind}: {proof.details}" if proof else "none",
        "from the panic until the proof, s": round(proof.at.timestamp() - seen.panicked, 1) if proof else "",
        "from the panic until the VM runs again, s": seen.ran,
        "it runs on": "the other host" if where == site.host(client, other).id else "its own host",
        "dump": lost.ssh("cd /var/crash && du -h --apparent-size */* | tail -2").split(),
    }


def messages(client: Client) -> int:
    """How many messages of crash kernels ha has heard."""
    listener = client.send(Request("GET", "fencing", Fencing)).kdump
    return listener.heard if listener else 0


def prepare(site: Site, machine: Machine) -> None:
    """What an administrator sets up on a host, once; the crash kernel is loaded after each boot."""
    machine.write(
        "/etc/systemd/system/volery-kdump-send.service", SENDER.format(port=PORT, address=site.address)
    )
    machine.ssh("systemctl daemon-reload; systemctl -q enable volery-kdump-send; sync")
    machine.ssh("systemctl restart kdump-tools", seconds=900)
    if machine.ssh("cat /sys/kernel/kexec_crash_loaded").strip() != "1":
        raise LabError(
            f"{machine.name} has loaded no crash kernel: `journalctl -u kdump-tools` there says why"
        )


def panic(machine: Machine) -> float:
    """When, by this machine's clock."""
    at = time.time()
    with contextlib.suppress(LabError):  # nobody answers
        machine.ssh("sync; echo c > /proc/sysrq-trigger", seconds=5)
    return at


class _Chassis:
    """A host of the tier as its BMC sees it."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine

    @property
    def uuid(self) -> str:
        return str(self.machine.ident)

    def is_on(self) -> bool:
        return self.machine.pid is not None

    def power_on(self) -> None:
        self.machine.power_on()

    def power_off(self) -> None:
        self.machine.kill()


@contextlib.contextmanager
def bmc(site: Site, machine: Machine) -> Iterator[NewFenceDevice]:
    """A Redfish BMC at this machine's address, for as long as this process shows."""
    password, certificate = secrets.token_hex(8), site.directory / "bmc.pem"
    if not certificate.exists():
        make_certificate(certificate)
    board = Board(_Chassis(machine), Path(site.directory / "bmc.fault"))
    server = RedfishServer((site.address, BMC_PORT), board, ("admin", password), certificate)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield NewFenceDevice(
            agent="fence_redfish",
            address=site.address,
            port=BMC_PORT,
            username="admin",
            options={"ssl_insecure": "1"},
            secrets={"password": password},
            timeout_seconds=60.0,
        )
    finally:
        server.shutdown()
        server.server_close()


def manage_power(client: Client, host: Host, machine: Machine, device: NewFenceDevice) -> Host:
    """Volery knows the BMC, and believes it. Raises LabError."""
    path = f"hosts/{host.id}/power-management"
    question = SetPowerManagement(id=host.id, devices=(device,), kdump_addresses=(machine.ip,))
    client.send(Request("PUT", path, PowerManagement, body_of(question)))
    tested = client.send(Request("POST", f"{path}/test", PowerManagement, b"{}"))
    if tested.identity is not Identity.CHECKED:
        raise LabError(f"the BMC of {host.name} was not believed: {tested.test_words}")
    return host
