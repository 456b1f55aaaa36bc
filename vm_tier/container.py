"""One host of the quick tier: the same disk's systemd as process 1 of namespaces, on this machine's kernel.

For what needs a real systemd and no kernel of its own: minutes instead of hours where QEMU has little of a processor. Its
guests are emulated, it mounts no NFS, and a panic of it would be this machine's.
"""

from __future__ import annotations

import subprocess
import uuid
from dataclasses import dataclass
from pathlib import Path

from lab.commands import run
from vm_tier.machine import Machine

CGROUPS = "cpu cpuacct cpuset memory blkio devices freezer pids"
DEVICES = "null:1:3 zero:1:5 full:1:7 random:1:8 urandom:1:9 tty:5:0 net/tun:10:200"

BOOT = """
set -e
for group in {cgroups}; do
  own=/sys/fs/cgroup/$group/{link}
  mkdir -p $own
  if [ $group = cpuset ]; then
    for what in cpus mems; do cat /sys/fs/cgroup/cpuset/cpuset.$what > $own/cpuset.$what; done
    echo 1 > $own/cgroup.clone_children
  fi
  echo $$ > $own/cgroup.procs
done
exec ip netns exec {link} unshare -m -u -i -C -p --fork --kill-child --mount-proc sh -c "$0"
"""
INIT = """
set -e
root={directory}/root
mount --make-rprivate /
mount -t overlay -o lowerdir={lower},upperdir={directory}/changes,workdir={directory}/work overlay $root
cd $root
mount -t proc proc proc
mount --bind {directory}/boot_id proc/sys/kernel/random/boot_id
mount -t sysfs sysfs sys
mount -t tmpfs -o mode=755 tmpfs dev
mkdir dev/pts dev/shm dev/net
for device in {devices}; do
  echo $device | (IFS=: read -r name major minor; mknod -m 666 dev/$name c $major $minor)
done
mount -t devpts -o newinstance,ptmxmode=0666,mode=620 devpts dev/pts
ln -s pts/ptmx dev/ptmx
mount -t tmpfs tmpfs dev/shm
ln -s /proc/self/fd dev/fd
mount -t tmpfs tmpfs run
mount -t tmpfs cgroup sys/fs/cgroup
for group in {cgroups}; do
  mkdir sys/fs/cgroup/$group
  mount -t cgroup -o $group cgroup sys/fs/cgroup/$group
done
mkdir sys/fs/cgroup/systemd
mount -t cgroup -o none,name=systemd cgroup sys/fs/cgroup/systemd
mkdir -p srv/shared
mount --bind {shared} srv/shared
# QEMU's own /dev, which libvirt would make from the host's udev.
grep -qx 'namespaces = .*' etc/libvirt/qemu.conf || echo 'namespaces = []' >> etc/libvirt/qemu.conf
hostname {name}
echo {name} > etc/hostname
echo {machine_id} > etc/machine-id
printf '127.0.0.1 localhost\\n{ip} {name}\\n' > etc/hosts
exec env -i container=lxc PATH=/usr/sbin:/usr/bin:/sbin:/bin chroot . /sbin/init
"""


@dataclass(frozen=True)
class Container(Machine):
    shared: Path = Path()
    """A directory that every one of them sees at /srv/shared."""

    @property
    def name(self) -> str:
        return f"hc{self.number}"

    @property
    def pid(self) -> int | None:
        """Of the process whose end takes all of it along; None: it is off."""
        try:
            pid = int(self.pid_file.read_text())
            words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
        except (OSError, ValueError):
            return None
        return pid if self.link in words or f"{self.directory}/{self.name}" in " ".join(words) else None

    def power_on(self) -> None:
        if self.pid is not None:
            return
        own = self.directory / self.name
        for part in ("root", "changes", "work"):
            (own / part).mkdir(parents=True, exist_ok=True)
        self.shared.mkdir(parents=True, exist_ok=True)
        (own / "boot_id").write_text(f"{uuid.uuid4()}\n")
        self._network()
        with self.console.open("ab") as console:
            process = subprocess.Popen(
                ["nice", "-n", str(self.nice), "sh", "-c", *self.scripts()],
                stdin=subprocess.DEVNULL, stdout=console, stderr=console, start_new_session=True,
            )  # fmt: skip
        self.pid_file.write_text(str(process.pid))

    def scripts(self) -> tuple[str, str]:
        """What makes the namespaces, and what is done in them before systemd."""
        about = {
            "cgroups": CGROUPS,
            "devices": DEVICES,
            "link": self.link,
            "directory": self.directory / self.name,
            "lower": self.image.root,
            "shared": self.shared,
            "name": self.name,
            "ip": self.ip,
            "machine_id": self.ident.hex,
        }
        return BOOT.format(**about), INIT.format(**about)

    def _network(self) -> None:
        if Path(f"/run/netns/{self.link}").exists():
            return
        run(["ip", "netns", "add", self.link])
        run(["ip", "link", "add", self.link, "type", "veth", "peer", "name", "eth0", "netns", self.link])
        run(["ip", "link", "set", self.link, "master", self.bridge, "up"])
        for command in (
            "link set lo up",
            "link set eth0 up",
            f"address add {self.ip}/24 dev eth0",
            f"route add default via {self.subnet}.254",
        ):
            run(["ip", "-n", self.link, *command.split()])

    def forget(self) -> None:
        run(["sh", "-c", f"ip netns delete {self.link} 2>/dev/null || :"])
