"""The tier: hosts on a bridge, the first one an NFS server too, and a control plane on this machine that knows both."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lab import plane
from lab.commands import run
from lab.errors import LabError
from vm_tier.container import Container
from vm_tier.image import Image
from vm_tier.machine import Machine
from volery.client import api
from volery.client.request import Request, body_of
from volery.client.transport import Client
from volery.contracts.cluster import Cluster
from volery.contracts.host import CreateHost, Host, HostStatus, HostToken
from volery.contracts.liveness import HostLiveness
from volery.contracts.operation import Operation
from volery.contracts.power import ConfirmHostRebooted
from volery.contracts.storage import CreateDisk, CreateStorageDomain, DomainKind
from volery.contracts.vm import CreateVm, NewDisk, Vm
from volery.setup import guest_image
from volery.setup.console import Output
from volery.setup.down import down
from volery.setup.home import Home
from volery.setup.up import up

MIB = 1024 * 1024
EXPORT, SHARED = "/srv/export", "/srv/shared"
DOMAIN, IMAGE = "nfs", "volery-guest"
HOST_SECONDS = 600.0
AGENT = "volery-agent.service"


@dataclass
class Site:
    directory: Path
    subnet: str
    image: Image
    output: Output
    hosts: int = 2
    containers: bool = False
    """Hosts are containers (`vm_tier/container.py`), not machines."""
    nice: int = 19

    @property
    def bridge(self) -> str:
        return "vvc" if self.containers else "vvt"

    @property
    def home(self) -> Home:
        return Home(self.directory / "plane")

    @property
    def machines(self) -> list[Machine]:
        if self.containers:
            shared = self.directory / "shared"
            return [
                Container(
                    10 + number, self.directory, self.image, self.subnet, self.bridge, self.nice, shared
                )
                for number in range(1, self.hosts + 1)
            ]
        return [
            Machine(number, self.directory, self.image, self.subnet, self.bridge, self.nice)
            for number in range(1, self.hosts + 1)
        ]

    @property
    def both(self) -> tuple[Machine, Machine]:
        """The NFS server and its client. Raises LabError."""
        if self.hosts != 2 or self.containers:
            raise LabError("this needs two hosts that are machines: leave --hosts and --containers out")
        return self.machines[0], self.machines[1]

    @property
    def address(self) -> str:
        """Of this machine, where the control plane listens."""
        return f"{self.subnet}.254"

    def up(self) -> Client:
        """Everything that is missing of it. Raises LabError, SetupError."""
        self.directory.mkdir(parents=True, exist_ok=True)
        self._switch()
        for machine in self.machines:
            machine.power_on()
        client = self._plane()
        for machine in self.machines:
            with self.output.step(f"{machine.name} answers") as step:
                step.result = f"after {machine.answers():.0f} s"
        if not self.containers:
            with self.output.step("NFS"):
                self._nfs()
        cluster = plane.make_cluster(client)
        for machine in self.machines:
            with self.output.step(f"{machine.name} is enrolled, its agent a unit of systemd"):
                self.enrol(client, machine, cluster)
        with self.output.step("Storage and guest image"):
            self._storage(client, cluster)
        return client

    def _switch(self) -> None:
        if not Path(f"/sys/class/net/{self.bridge}").exists():
            run(["ip", "link", "add", self.bridge, "type", "bridge"])
        run(["ip", "address", "replace", f"{self.address}/24", "dev", self.bridge])
        run(["ip", "link", "set", self.bridge, "up"])

    def _plane(self) -> Client:
        self.home.create()
        self.home.change_settings(
            {
                "VOLERY_SETUP_LOCAL_HOST": "no",
                "VOLERY_SETUP_PUBLIC_ADDRESS": self.address,
                "VOLERY_SETUP_NAMES": self.address,
                "VOLERY_HA_KDUMP_PORT": "7410",
                # An emulated crash kernel takes so long to its first message.
                "VOLERY_HA_SILENCE_BEFORE_FENCE_SECONDS": "300",
            }
        )
        running = up(self.home, self.output)
        return plane.log_in(self.home, running.gateway_url)

    def _nfs(self) -> None:
        """NFSv4.2 only. The server mounts its own export, too, so that the path is the same on both."""
        server = self.machines[0]
        server.write(
            "/etc/exports", f"{EXPORT} {self.subnet}.0/24(rw,sync,no_root_squash,no_subtree_check,fsid=1)\n"
        )
        server.ssh(f"mkdir -p {EXPORT} && systemctl start nfs-server && exportfs -ra")
        for machine in self.machines:
            source = f"{server.ip}:{EXPORT}"
            mount = f"mount -t nfs4 -o vers=4.2 {source} {SHARED}"
            if machine is not server:  # mounted at boot, too: it is reset, and comes back
                machine.write("/etc/fstab", f"{source} {SHARED} nfs4 vers=4.2,_netdev,nofail 0 0\n")
            machine.ssh(f"mkdir -p {SHARED}; mountpoint -q {SHARED} || {mount}")

    def enrol(self, client: Client, machine: Machine, cluster: Cluster) -> None:
        found = plane.find(client, api.HOSTS, machine.name)
        if found is None:
            made = client.send(
                api.HOSTS.create(CreateHost(name=machine.name, cluster_id=cluster.id), HostToken)
            )
            settings = {
                "VOLERY_AGENT_ENROLMENT_TOKEN": made.enrolment_token,
                "VOLERY_AGENT_DATA_ADDRESS": f"{machine.ip}:0",
                "VOLERY_AGENT_HYPERVISOR": "qemu" if self.containers else "kvm",
                "VOLERY_AGENT_INSTALLATION": self.home.installation,
            }
            text = "".join(f"{name}={value}\n" for name, value in settings.items())
            machine.write("/etc/volery/agent.env", text, "0600")
            machine.ssh(f"systemctl enable --now {AGENT}", seconds=300)
        self.until_up(client, machine)

    def until_up(self, client: Client, machine: Machine) -> None:
        """Raises LabError."""
        self.until(
            lambda: self.host(client, machine).status in (HostStatus.UP, HostStatus.MAINTENANCE),
            HOST_SECONDS,
            f"{machine.name} to be up; `journalctl -u {AGENT}` there says why it isn't",
        )

    def _storage(self, client: Client, cluster: Cluster) -> None:
        from volery.cli.storage import image_size, send_image

        if plane.find(client, api.STORAGE_DOMAINS, DOMAIN) is None:
            ask = CreateStorageDomain(
                name=DOMAIN, kind=DomainKind.DIRECTORY, data_center_id=cluster.data_center_id, path=SHARED
            )
            client.wait(client.send(api.STORAGE_DOMAINS.create(ask, Operation)))
        found = plane.find(client, api.DISKS, IMAGE)
        if found is None:
            built = guest_image.build(self.home)
            domain = client.find(api.STORAGE_DOMAINS, DOMAIN)
            size = image_size(built.disk)
            new = CreateDisk(name=IMAGE, storage_domain_id=domain.id, size_bytes=size)
            client.wait(client.send(api.DISKS.create(new, Operation)))
            send_image(client, client.find(api.DISKS, IMAGE).id, Path(built.disk))

    def host(self, client: Client, machine: Machine) -> Host:
        return client.find(api.HOSTS, machine.name)

    def guest(self, client: Client, name: str, machine: Machine, **fields: Any) -> Vm:
        """A VM with a disk of its own that has been started on this host, or is being."""
        found = plane.find(client, api.VMS, name)
        if found is None:
            cluster = client.find(api.CLUSTERS, plane.NAME)
            disk = client.find(api.DISKS, IMAGE)
            ask = CreateVm(
                name=name,
                cluster_id=cluster.id,
                memory_bytes=160 * MIB,
                disks=(NewDisk(storage_domain_id=disk.storage_domain_id, copy_of=disk.id),),
                **fields,
            )
            done = client.wait(client.send(api.VMS.create(ask, Operation)))
            found = client.send(api.VMS.get(done.object_id))
        return found

    def confirm(self, client: Client, machine: Machine) -> HostLiveness:
        """A person's word that it is off."""
        host = self.host(client, machine)
        ask = ConfirmHostRebooted(id=host.id, confirm=host.name)
        return client.send(Request("POST", f"hosts/{host.id}/confirm-rebooted", HostLiveness, body_of(ask)))

    @staticmethod
    def until(look: Callable[[], object], seconds: float, what: str) -> float:
        """How long it took, in seconds. Raises LabError."""
        began = time.monotonic()
        while not look():
            if time.monotonic() - began > seconds:
                raise LabError(f"waited {seconds:.0f} s for {what}")
            time.sleep(0.25)  # REST and another machine's shell are asked alike: nothing announces both
        return time.monotonic() - began

    def down(self) -> None:
        """Ends it all; the image stays."""
        for machine in self.machines:
            machine.kill()
            machine.forget()
        if self.home.path.exists():
            down(self.home, self.output)
        run(["sh", "-c", f"ip link delete {self.bridge} 2>/dev/null || :"])
        run(["rm", "-rf", str(self.directory)])
