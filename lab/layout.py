"""Where everything of a lab is: names and paths derived from the state directory and the lab's name.

Only the standard library is imported here, since the hosts' pid 1 uses it too.
"""

from __future__ import annotations

import hashlib
import ipaddress
import re
import uuid
from dataclasses import dataclass
from pathlib import Path

NAME = re.compile(r"^[a-z0-9]{1,10}$")

# A link's name has at most 15 characters: "vl" + 10 + room for a suffix.
MAX_HOSTS = 99
GATEWAY_OCTET = 254  # the machine itself: where a control plane listens
STORAGE_OCTET = 253  # the iSCSI portal
BMC_OCTET = 100  # host 1's BMC is .101
ISCSI_PORT = 3260
LIBVIRT_PORT = 16509
HOST_NUMBER = re.compile(r"^[1-9][0-9]?$")


def default_name(state: Path) -> str:
    """A short name that is the same for the same directory and, in practice, no other."""
    return hashlib.sha256(str(state.resolve()).encode()).hexdigest()[:6]


@dataclass(frozen=True)
class LabLayout:
    """Every path and kernel name of one lab. `state` is absolute, `name` short and lower case."""

    state: Path
    name: str

    @property
    def record(self) -> Path:
        """What was decided when the lab was made: subnet, host options, LUNs (JSON)."""
        return self.state / "lab.json"

    @property
    def lock(self) -> Path:
        return self.state / "lab.lock"

    @property
    def hosts_directory(self) -> Path:
        return self.state / "hosts"

    @property
    def shared(self) -> Path:
        """The machine's side of the directory that every host sees at `mounts / "shared"`."""
        return self.state / "shared"

    @property
    def disk(self) -> Path:
        """Where every host has the lab's disk mounted, if it has one (lab.disk): the same path as on the machine."""
        return self.state / "disk"

    @property
    def disk_image(self) -> Path:
        return self.state / "disk.img"

    @property
    def iscsi(self) -> Path:
        return self.state / "iscsi"

    @property
    def hosts_file(self) -> Path:
        return self.state / "hosts.txt"

    @property
    def capabilities_seed(self) -> Path:
        """libvirt's cache of what QEMU can do: probing takes longer than everything else at boot."""
        return self.state / "qemu-capabilities"

    @property
    def bmc_certificate(self) -> Path:
        """Key and certificate of every BMC of the lab."""
        return self.state / "bmc.pem"

    @property
    def stand_in(self) -> Path:
        """A library for what sanlock and wdmd of the hosts can't have in a lab."""
        return self.state / "stand_in.so"

    @property
    def mounts(self) -> Path:
        """The one directory outside `state`: mount points that must be at one path on every host."""
        return Path("/srv") / f"volery-lab-{self.name}"

    @property
    def switch(self) -> str:
        """The network namespace that holds the lab's bridge, and the machine's link into it."""
        return f"vl{self.name}"

    @property
    def cgroup(self) -> str:
        return f"volery-lab-{self.name}"

    @property
    def target_name(self) -> str:
        return f"iqn.2026-11.lab.volery:{self.name}"

    def host(self, number: int) -> HostLayout:
        return HostLayout(self, number)

    def recorded_hosts(self) -> list[int]:
        """Numbers of the hosts that have a directory, in order."""
        if not self.hosts_directory.is_dir():
            return []
        names = (entry.name for entry in self.hosts_directory.iterdir())
        return sorted(int(name) for name in names if HOST_NUMBER.match(name))


@dataclass(frozen=True)
class HostLayout:
    """Every path and name of one host of a lab."""

    lab: LabLayout
    number: int

    @property
    def name(self) -> str:
        return f"h{self.number}"

    @property
    def directory(self) -> Path:
        return self.lab.hosts_directory / str(self.number)

    @property
    def cgroup(self) -> str:
        return f"{self.lab.cgroup}/{self.name}"

    @property
    def home(self) -> Path:
        """VOLERY_HOME of this host's agent, seen from the machine."""
        return self.directory / "home"

    @property
    def inner_home(self) -> Path:
        """VOLERY_HOME of this host's agent, seen from inside: the same path on every host."""
        return self.lab.mounts / "home"

    @property
    def boot_record(self) -> Path:
        """Written by pid 1 when its mounts stand: pid on the machine, start time, boot id (JSON)."""
        return self.directory / "boot.json"

    @property
    def shutdown_mark(self) -> Path:
        """There while the host is being shut down in order: what systemd would say."""
        return self.directory / "shutdown"

    @property
    def power_lock(self) -> Path:
        """Held by pid 1 for as long as it lives, so that a host never runs twice."""
        return self.directory / "power.lock"

    @property
    def lock(self) -> Path:
        """Held by whoever powers this host on or off."""
        return self.directory / "action.lock"

    @property
    def cut_mark(self) -> Path:
        """The cable is pulled: stays so over a power cycle."""
        return self.directory / "cut"

    @property
    def units(self) -> Path:
        """`<unit>.pid` (pid inside the host) while pid 1 runs it, `<unit>.last` also after it ended,

        and `<unit>.down` for what pid 1 must not run.
        """
        return self.directory / "units"

    @property
    def agent_command(self) -> Path:
        """A JSON list of arguments; without this file the host has no agent."""
        return self.directory / "agent.command"

    @property
    def agent_environment(self) -> Path:
        """KEY=VALUE lines added to the agent's environment."""
        return self.directory / "agent.env"

    @property
    def watchdog(self) -> Path:
        """The FIFO through which the host pets its watchdog."""
        return self.directory / "watchdog"

    @property
    def watchdog_class(self) -> Path:
        """Stands in for the host's /sys/class/watchdog."""
        return self.directory / "watchdog-class"

    @property
    def log(self) -> Path:
        return self.directory / "log"

    @property
    def product_uuid(self) -> Path:
        """What the kernel shows of a real machine's DMI. A machine without a DMI can't show it there on its hosts."""
        return self.directory / "product_uuid"

    @property
    def mac_address(self) -> str:
        """Of eth0: locally administered, different in every lab, the same at every boot."""
        digest = hashlib.sha256(f"{self.lab.state}:{self.lab.name}:{self.number}".encode()).digest()
        return ":".join(["02", *(f"{byte:02x}" for byte in digest[:5])])

    @property
    def machine_uuid(self) -> uuid.UUID:
        """Stands in for the DMI UUID of a real machine, as libvirt's host_uuid."""
        return uuid.uuid5(uuid.NAMESPACE_URL, f"{self.lab.state}#{self.lab.name}/{self.number}")


def address(subnet: str, octet: int) -> str:
    """The address with this last octet in the lab's /24: `10.98.7.0/24`, 3 -> `10.98.7.3`."""
    return str(ipaddress.ip_network(subnet)[octet])
