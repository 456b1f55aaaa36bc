"""A lab as a whole: up, down, status. Idempotent, and resumable after the tool itself was killed."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from lab import bmc, cgroups, disk, network, sanlock, stalls
from lab.bmc import Bmc
from lab.errors import LabError
from lab.host import Host
from lab.layout import GATEWAY_OCTET, MAX_HOSTS, NAME, LabLayout, address, default_name
from lab.record import LabRecord, load
from lab.target import IscsiTarget

DEFAULT_NETWORKS = "10.98.0.0/16"
HIDDEN_ON_HOSTS = ("/dev", "/proc", "/run", "/sys", "/etc/libvirt", "/var/lib/libvirt")
REQUIRED_PROGRAMS = {
    "ip": "iproute2",
    "nft": "nftables",
    "nsenter": "util-linux",
    "libvirtd": "libvirt-daemon-system (Debian) or libvirt-daemon (Oracle Linux)",
    "virsh": "libvirt-clients (Debian) or libvirt-client (Oracle Linux)",
    "sanlock": "sanlock",
    "wdmd": "sanlock",
    "gcc": "gcc",
    "tgtd": "tgt (Debian) or scsi-target-utils (Oracle Linux, from EPEL)",
    "tgtadm": "tgt (Debian) or scsi-target-utils (Oracle Linux, from EPEL)",
    "ipmi_sim": "openipmi (Debian) or OpenIPMI-lanserv (Oracle Linux)",
    "openssl": "openssl",
}


class Lab:
    """A lab by its state directory. `name` defaults to six characters derived from the directory."""

    def __init__(self, state: Path | str, name: str | None = None) -> None:
        path = Path(state).absolute()
        recorded = load(path / "lab.json")
        chosen = name or (recorded.name if recorded else default_name(path))
        if not NAME.match(chosen):
            raise LabError(f"{chosen!r} can't be a lab's name: give 1 to 10 lower-case letters and digits.")
        if recorded is not None and recorded.name != chosen:
            raise LabError(
                f"The lab in {path} is called {recorded.name}, not {chosen}: leave the name out, or "
                "choose another state directory."
            )
        hidden = [top for top in HIDDEN_ON_HOSTS if path.resolve().is_relative_to(top)]
        if hidden:
            raise LabError(
                f"A lab's state can't be in {path}: hosts have a {hidden[0]} of their own. Choose "
                "another directory with --state."
            )
        self.layout = LabLayout(path, chosen)
        self._record = recorded

    @property
    def name(self) -> str:
        return self.layout.name

    @property
    def record(self) -> LabRecord:
        """What was decided at the first `up`. Raises LabError before it."""
        if self._record is None:
            self._record = load(self.layout.record)
        if self._record is None:
            raise LabError(
                f"There is no lab in {self.layout.state}: make one with `python -m lab up --state "
                f"{self.layout.state}`."
            )
        return self._record

    @property
    def subnet(self) -> str:
        """The lab's /24; host N has the address that ends in N."""
        return self.record.subnet

    @property
    def gateway(self) -> str:
        """The machine's address in the lab: where a control plane listens for the hosts."""
        return address(self.subnet, GATEWAY_OCTET)

    @property
    def target(self) -> IscsiTarget:
        return IscsiTarget(self.layout, self.record)

    @property
    def shared(self) -> Path:
        """The shared directory seen from the machine; hosts see it at `shared_on_hosts`."""
        return self.layout.shared

    @property
    def shared_on_hosts(self) -> Path:
        return self.layout.mounts / "shared"

    @property
    def hosts(self) -> list[Host]:
        """Every host that was ever made in this lab, in order."""
        return [self.host(number) for number in self.layout.recorded_hosts()]

    def host(self, number: int) -> Host:
        """Raises LabError when the lab has no such host."""
        if number not in self.layout.recorded_hosts():
            known = ", ".join(map(str, self.layout.recorded_hosts())) or "none"
            raise LabError(
                f"Lab {self.name} has no host {number} (it has {known}): add it with `up --hosts {number}`."
            )
        return Host(self.layout.host(number), self.record)

    def bmc(self, number: int) -> Bmc:
        """The BMC of a host. Raises LabError when the lab has no such host."""
        return Bmc(self.host(number).layout, self.record)

    def up(
        self,
        hosts: int = 3,
        *,
        kvm: bool = False,
        agent_command: Sequence[str] | None = None,
        networks: str = DEFAULT_NETWORKS,
        with_disk: bool = False,
    ) -> None:
        """Makes hosts 1 to `hosts` run, with network, storage and shared directory.

        Does only what is missing; hosts beyond the number stay as they are. Raises LabError.
        `kvm`: hosts see /dev/kvm; `agent_command`: what runs as agent on hosts that have none set;
        `networks`: where the lab's /24 is taken from the first time; `with_disk`: hosts that boot now share a disk
        that one of them can be cut from (lab.disk).
        """
        if not 1 <= hosts <= MAX_HOSTS:
            raise LabError(f"A lab of {hosts} hosts can't be made: give 1 to {MAX_HOSTS}.")
        check_machine()
        with self._exclusive():
            self._prepare(kvm, agent_command, networks)
            if with_disk or self.layout.disk_image.exists():
                disk.make(self.layout)
            numbers = range(1, hosts + 1)
            for number in numbers:
                self.layout.host(number).directory.mkdir(parents=True, exist_ok=True)
            self.target.start()
            bmc.ensure_certificate(self.layout)
            for number in numbers:
                self.bmc(number).start()
            self._power_on([self.host(number) for number in numbers])

    def _prepare(self, kvm: bool, agent_command: Sequence[str] | None, networks: str) -> None:
        lab = self.layout
        sanlock.build(lab)
        lab.shared.mkdir(parents=True, exist_ok=True)
        for name in ("shared", "home"):
            (lab.mounts / name).mkdir(parents=True, exist_ok=True)
        recorded = load(lab.record)
        subnet = network.ensure_switch(lab, recorded.subnet if recorded else None, networks)
        record = recorded or LabRecord(name=lab.name, subnet=subnet, kvm=kvm)
        record.subnet = subnet
        record.kvm = record.kvm or kvm
        if agent_command is not None:
            record.agent_command = list(agent_command)
        record.save(lab.record)
        self._record = record
        lines = [f"{address(subnet, number)} h{number}\n" for number in range(1, MAX_HOSTS + 1)]
        lab.hosts_file.write_text(
            f"127.0.0.1 localhost\n{self.gateway} control\n{self.target.host} storage\n" + "".join(lines)
        )

    def _power_on(self, hosts: list[Host]) -> None:
        """The first host alone if libvirt hasn't probed QEMU yet: the others copy what it found."""
        seed = self.layout.capabilities_seed
        if not seed.exists() and hosts:
            hosts[0].power_on()
            self._keep_capabilities(hosts[0])
        with ThreadPoolExecutor(max_workers=8) as pool:
            list(pool.map(Host.power_on, hosts))

    def _keep_capabilities(self, host: Host) -> None:
        cache = host.layout.directory / "cache-libvirt" / "qemu" / "capabilities"
        if cache.is_dir():
            new = self.layout.capabilities_seed.with_suffix(".new")
            shutil.rmtree(new, ignore_errors=True)
            shutil.copytree(cache, new)
            new.rename(self.layout.capabilities_seed)

    def down(self, *, keep: bool = False) -> None:
        """Removes everything of this lab from the kernel, and its files too unless `keep`.

        Works on what the kernel has under the lab's name, so also after a failed `up`.
        """
        with self._exclusive():
            stalls.end(self.layout.cgroup)  # what waits for a disk can't be killed
            cgroups.remove(self.layout.cgroup)  # kills every process of the lab
            network.remove_switch(self.layout)
            disk.remove(self.layout)
            for host in self.layout.recorded_hosts():
                self.layout.host(host).boot_record.unlink(missing_ok=True)
            for directory in (
                self.layout.mounts / "shared",
                self.layout.mounts / "home",
                self.layout.mounts,
            ):
                with contextlib.suppress(FileNotFoundError):
                    directory.rmdir()
            if not keep:
                self._delete_files()

    def _delete_files(self) -> None:
        lab = self.layout
        for directory in (lab.hosts_directory, lab.shared, lab.iscsi, lab.capabilities_seed, lab.disk):
            shutil.rmtree(directory, ignore_errors=True)
        for file in (lab.disk_image, lab.hosts_file, lab.bmc_certificate, lab.record, lab.lock, lab.stand_in):
            file.unlink(missing_ok=True)
        self._record = None
        with contextlib.suppress(OSError):  # somebody keeps other things there
            lab.state.rmdir()

    @contextlib.contextmanager
    def _exclusive(self) -> Iterator[None]:
        """One `up` or `down` at a time."""
        self.layout.state.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.layout.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)


def check_machine() -> None:
    """Raises LabError that says what this machine lacks to run a lab."""
    if os.geteuid() != 0:
        raise LabError("A lab needs root, since it makes namespaces: run the command with sudo.")
    missing = {
        program: package
        for program, package in REQUIRED_PROGRAMS.items()
        if shutil.which(program, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin") is None
    }
    if missing:
        lines = "; ".join(f"{program}: install {package}" for program, package in missing.items())
        raise LabError(f"This machine lacks programs that the lab needs. {lines}.")
