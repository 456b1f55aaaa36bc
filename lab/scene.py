"""A lab with its control plane as an administrator sees it: guests, hosts and their power, through REST alone."""

from __future__ import annotations

import base64
import contextlib
import json
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from lab import plane
from lab.errors import LabError
from lab.host import Host
from lab.lab import Lab
from volery.client import api
from volery.client.request import Request, body_of
from volery.client.transport import Client
from volery.contracts.cluster import Cluster
from volery.contracts.fencing import PowerState
from volery.contracts.operation import Operation
from volery.contracts.power import Identity, NewFenceDevice, PowerManagement, SetPowerManagement
from volery.contracts.storage import CreateStorageDomain, DomainKind, StorageDomain
from volery.contracts.vm import CreateVm, NewDisk, NewNic, Vm, VmStatus
from volery.setup.console import Output
from volery.setup.down import down
from volery.setup.processes import free_port

MIB = 1024 * 1024
QUIET = Output(Console(quiet=True))


class TooLate(LabError):
    """What was waited for did not come."""


@dataclass
class Scene:
    """`lab` and its control plane. Waiting raises TooLate, REST raises ProblemError and OperationFailed."""

    lab: Lab
    client: Client

    @property
    def cluster(self) -> Cluster:
        return self.client.find(api.CLUSTERS, plane.NAME)

    def guest(self, name: str, *beside: NewDisk, **fields: Any) -> Vm:
        """A new VM from the guest image that runs, and whose agent has answered. `beside` are further disks."""
        image = self.client.find(api.DISKS, plane.IMAGE)
        network = self.client.find(api.NETWORKS, "lab")
        ask = CreateVm(
            name=name,
            cluster_id=self.cluster.id,
            memory_bytes=160 * MIB,
            disks=(NewDisk(storage_domain_id=image.storage_domain_id, copy_of=image.id), *beside),
            nics=(NewNic(network_id=network.id),),
            **fields,
        )
        vm_id = self.client.wait(self.client.send(api.VMS.create(ask, Operation))).object_id
        self.act(vm_id, "start")
        return self.until(vm_id, lambda vm: vm.guest.agent_connected and vm.guest.hostname == name, 120)

    def act(self, vm_id: str, action: str, body: dict[str, Any] | None = None) -> Operation:
        return self.client.wait(self.client.send(api.VMS.act(vm_id, action, Operation, body)))

    def until(self, vm_id: str, holds: Callable[[Vm], bool], seconds: float = 30.0) -> Vm:
        found: list[Vm] = []

        def look() -> bool:
            found[:] = [self.client.send(api.VMS.get(vm_id))]
            return holds(found[0])

        self.wait(look, seconds, lambda: f"a VM that is still {found[0]}")
        return found[0]

    def wait(self, look: Callable[[], bool], seconds: float, what: Callable[[], str]) -> None:
        """Until `look` says yes; `what` is said when it did not."""
        until = time.monotonic() + seconds
        while not look():
            if time.monotonic() > until:
                raise TooLate(f"waited {seconds:.0f} s for {what()}")
            time.sleep(0.1)  # REST, libvirt and a guest's agent are asked alike: nothing announces all three

    def inside(self, vm: Vm, command: str, seconds: float = 20.0) -> str:
        """What a shell in the guest prints, by its agent on the host where it runs."""
        host = self.host(vm.host_id)
        (name,) = self.domains(host, vm)

        def agent(execute: str, **arguments: Any) -> Any:
            question = json.dumps({"execute": execute, "arguments": arguments})
            asked = host.enter(["virsh", "-q", "qemu-agent-command", name, question])
            answer = subprocess.run(asked, capture_output=True, text=True, check=True)
            return json.loads(answer.stdout)["return"]

        pid = agent("guest-exec", path="/bin/sh", arg=["-c", command], **{"capture-output": True})["pid"]
        said: dict[str, Any] = {}

        def ended() -> bool:
            said.update(agent("guest-exec-status", pid=pid))
            return bool(said["exited"])

        self.wait(ended, seconds, lambda: f"{command!r} in {vm.name}")
        return base64.b64decode(said.get("out-data", "")).decode()

    @staticmethod
    def domains(host: Host, vm: Vm | None = None) -> list[str]:
        """A host's domains in libvirt, running or not; the VM's: one or none."""
        asked = host.enter(["virsh", "-q", "list", "--all", "--name"])
        listing = subprocess.run(asked, capture_output=True, text=True, check=True)
        return [name for name in listing.stdout.split() if vm is None or name.endswith(vm.id[-12:])]

    def host(self, host_id: str) -> Host:
        """The lab's host behind Volery's."""
        name = self.client.send(api.HOSTS.get(host_id)).name
        return self.lab.host(int(name.removeprefix("h")))

    def host_is_up(self, host_id: str, seconds: float = 90.0) -> None:
        def look() -> bool:
            return self.client.send(api.HOSTS.get(host_id)).status == "up"

        def what() -> str:
            host = self.client.send(api.HOSTS.get(host_id))
            steps = [
                f"{step.step} {step.words}"
                for record in self.client.list(api.FENCE_RECORDS)
                if record.host_id == host_id
                for step in record.steps
            ]
            return f"host {host.name}, which is {host.status}, to be up; {'; '.join(steps[-8:])}"

        self.wait(look, seconds, what)

    def manage_power(self, number: int) -> None:
        """Tells Volery of the BMC of a host of the lab, and has it tested. Raises LabError."""
        bmc = self.lab.bmc(number)
        user, password = bmc.login
        device = NewFenceDevice(
            agent="fence_redfish",
            address=bmc.address,
            username=user,
            options={"ssl_insecure": "1"},
            secrets={"password": password},
        )
        host = self.client.find(api.HOSTS, f"h{number}")
        path = f"hosts/{host.id}/power-management"
        question = SetPowerManagement(id=host.id, devices=(device,))
        self.client.send(Request("PUT", path, PowerManagement, body_of(question)))
        tested = self.client.send(Request("POST", f"{path}/test", PowerManagement, b"{}"))
        if (tested.identity, tested.power) != (Identity.CHECKED, PowerState.ON):
            raise LabError(f"The BMC of {host.name} was not believed: {tested.test_words}")

    def hold_leases(self, io_timeout_seconds: int) -> StorageDomain:
        """The shared directory holds leases, and every host has joined its lockspace."""
        shared = self.client.find(api.STORAGE_DOMAINS, "shared")
        fields = {"leases": True, "lease_io_timeout_seconds": io_timeout_seconds, "reset_hosts": True}
        self.client.send(api.STORAGE_DOMAINS.update(shared.id, fields, 0))

        def joined() -> bool:
            now = self.client.send(api.STORAGE_DOMAINS.get(shared.id))
            return len(now.lease_host_ids) >= len(self.lab.hosts)

        self.wait(joined, 60 + 12 * io_timeout_seconds, lambda: "all hosts to join the lockspace")
        return self.client.send(api.STORAGE_DOMAINS.get(shared.id))

    def disk_domain(self) -> StorageDomain:
        """The directory on the lab's disk (`staged(with_disk=True)`), which every host has and one can be cut from."""
        path = str(self.lab.layout.disk)
        ask = CreateStorageDomain(
            name="disk",
            kind=DomainKind.DIRECTORY,
            data_center_id=self.cluster.data_center_id,
            path=path,
            leases=False,
        )
        if not any(self.client.list(api.STORAGE_DOMAINS, filter={"name": ask.name})):
            self.client.wait(self.client.send(api.STORAGE_DOMAINS.create(ask, Operation)))
        return self.client.find(api.STORAGE_DOMAINS, ask.name)

    def remove(self, vm: Vm) -> None:
        if self.client.send(api.VMS.get(vm.id)).status is not VmStatus.DOWN:
            self.act(vm.id, "stop", {"force": True})
        self.client.wait(self.client.send(api.VMS.delete(vm.id, Operation)))


def own_ports() -> dict[str, str]:
    """Ports that no other installation prefers: who comes back after ten minutes wants them again."""
    return {name: str(free_port()) for name in ("VOLERY_SETUP_NATS_PORT", "VOLERY_SETUP_GATEWAY_PORT")}


@contextlib.contextmanager
def staged(
    hosts: int, settings: Mapping[str, str], *, image: bool = True, with_disk: bool = False
) -> Iterator[Scene]:
    """A new lab and control plane, with these settings (VOLERY_…), and the guest's `image`; everything of it is gone afterwards."""
    state = Path(tempfile.mkdtemp(prefix="volery-scene-", dir="/tmp"))
    state.chmod(0o755)  # PostgreSQL's own user passes through
    lab = Lab(state)
    try:
        lab.up(hosts, with_disk=with_disk)
        plane.home_of(lab).create()
        plane.home_of(lab).change_settings({**own_ports(), **settings})
        client = plane.connect(lab, QUIET, image=image)
        yield Scene(lab, client)
        client.http.close()
    finally:
        down(plane.home_of(lab), QUIET)
        lab.down()
        shutil.rmtree(state, ignore_errors=True)
