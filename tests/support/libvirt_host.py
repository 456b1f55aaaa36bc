"""A libvirt daemon of its own for tests: own network, mount, PID and cgroup namespaces, reached by a unix socket.

Nothing of it is visible on the machine: killing its init ends its libvirtd and every guest at once.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path

CONTROLLERS = ("cpu", "cpuacct", "cpuset", "memory", "blkio", "devices", "freezer", "pids")
PLACES = {
    "run": "/run/libvirt",
    "lib": "/var/lib/libvirt",
    "etc": "/etc/libvirt",
    "log": "/var/log/libvirt",
    "cache": "/var/cache/libvirt",
}
DAEMON_CONF = """
host_uuid = "{host_uuid}"
listen_tls = 0
auth_unix_rw = "none"
unix_sock_group = "root"
log_outputs = "2:file:/var/log/libvirt/libvirtd.log"
"""
QEMU_CONF = 'user="root"\ngroup="root"\nsecurity_driver="none"\nstdio_handler="file"\n'
INIT = """
mount --make-rprivate /
umount -R /sys/fs/cgroup 2>/dev/null; mount -t tmpfs cg /sys/fs/cgroup
for c in $CONTROLLERS; do mkdir /sys/fs/cgroup/$c; mount -t cgroup -o $c cg /sys/fs/cgroup/$c; done
for d in $PLACES; do mkdir -p ${d#*:}; mount --bind $BASE/${d%%:*} ${d#*:}; done
mount -t tmpfs lock /run/lock  # libvirtd locks consoles there by process id, which is this namespace's
ip link set lo up
echo ready > $BASE/ready
while :; do sleep 1000 & wait; done
"""


@dataclass
class LibvirtHost:
    """`uri` is for the agent under test; `path` holds its files, and is removed by `stop`."""

    path: Path
    init: subprocess.Popen[bytes] | None = None
    name: str = field(default_factory=lambda: f"vt{uuid.uuid4().hex[:8]}")

    @property
    def uri(self) -> str:
        return f"qemu+unix:///system?socket={self.path}/run/libvirt-sock"

    def start(self) -> None:
        for place in PLACES:
            (self.path / place).mkdir(parents=True, exist_ok=True)
        etc = self.path / "etc"
        shutil.copytree("/etc/libvirt", etc, dirs_exist_ok=True)
        shutil.rmtree(etc / "qemu/networks/autostart", ignore_errors=True)
        (etc / "libvirtd.conf").write_text(DAEMON_CONF.format(host_uuid=uuid.uuid4()))
        (etc / "qemu.conf").write_text(QEMU_CONF)
        groups = self._groups()
        environment = os.environ | {
            "BASE": str(self.path),
            "INIT": INIT,
            "CONTROLLERS": " ".join(CONTROLLERS),
            "PLACES": " ".join(f"{k}:{v}" for k, v in PLACES.items()),
        }
        join = "".join(f"echo $$ > {g}/cgroup.procs; " for g in groups)
        namespaces = "unshare -n -m -u -i -C -p --fork --kill-child --mount-proc"
        self.init = subprocess.Popen(
            ["bash", "-c", f'{join} exec {namespaces} bash -c "$INIT"'],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=(self.path / "init.log").open("wb"),
            start_new_session=True,
        )
        wait_for(lambda: (self.path / "ready").exists(), 10, "the namespaces")
        self.start_daemon()

    def start_daemon(self) -> None:
        """Start libvirtd (again); returns when it answers. Guests of a former one are taken over."""
        self.run("libvirtd", "-d", "-p", "/run/libvirt/libvirtd.pid")
        wait_for(
            lambda: (
                subprocess.run(["virsh", "-q", "-c", self.uri, "version"], capture_output=True).returncode
                == 0
            ),
            30,
            "libvirtd",
        )

    def kill_daemon(self, sign: signal.Signals = signal.SIGKILL) -> None:
        os.kill(self.processes("libvirtd")[0], sign)
        if sign == signal.SIGKILL:
            wait_for(lambda: not self.processes("libvirtd"), 5, "libvirtd's end")

    def processes(self, comm: str, argument: str = "") -> list[int]:
        """Process ids, as this machine sees them, of the host's processes of that name."""
        assert self.init is not None
        space = os.readlink(f"/proc/{self.init_pid}/ns/pid")
        found = []
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            try:
                if (
                    os.readlink(entry / "ns/pid") == space
                    and (entry / "comm").read_text().strip().startswith(comm)
                    and argument in (entry / "cmdline").read_text()
                    and (entry / "stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
                ):
                    found.append(int(entry.name))
            except (FileNotFoundError, ProcessLookupError, PermissionError):
                continue
        return found

    def qemu(self, vm_id: str) -> int:
        """The process id of this VM's QEMU."""
        found = self.processes("qemu-system", vm_id)
        assert len(found) == 1, f"{len(found)} QEMU processes for {vm_id}"
        return found[0]

    @property
    def init_pid(self) -> int:
        assert self.init is not None
        children = Path(f"/proc/{self.init.pid}/task/{self.init.pid}/children").read_text().split()
        return int(children[0])

    def run(self, *command: str) -> str:
        """A command on this host."""
        done = subprocess.run(
            ["nsenter", "-t", str(self.init_pid), "-a", *command], capture_output=True, text=True
        )
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def iscsi_target(self, iqn: str, user: str, password: str, lun_bytes: int, port: int = 3260) -> str:
        """A tgtd on this host with one target and one LUN (number 1); returns its portal. Ends with the host."""
        socket = self.path / f"tgtd-{port}.sock"
        image, control = self.path / f"lun1-{port}.img", f"TGT_IPC_SOCKET={socket}"
        with image.open("wb") as file:
            file.truncate(lun_bytes)
        portal = f"127.0.0.1:{port}"
        self.run("env", control, "tgtd", "--iscsi", f"portal={portal}")
        wait_for(lambda: socket.with_name(f"{socket.name}.0").exists(), 10, "tgtd")

        def admin(mode: str, op: str, *arguments: str) -> None:
            self.run("env", control, "tgtadm", "--lld", "iscsi", "--mode", mode, "--op", op, *arguments)

        admin("target", "new", "--tid", "1", "-T", iqn)
        admin("logicalunit", "new", "--tid", "1", "--lun", "1", "-b", str(image))
        admin("account", "new", "--user", user, "--password", password)
        admin("account", "bind", "--tid", "1", "--user", user)
        admin("target", "bind", "--tid", "1", "-I", "ALL")
        return portal

    def cable(self) -> str:
        """A wire between this host and the machine: the machine's address on it. Ends with the host."""
        number = uuid.uuid4().int % 16384
        net = f"198.18.{number // 64}.{number % 64 * 4}".rsplit(".", 1)
        ours, theirs = (f"{net[0]}.{int(net[1]) + last}" for last in (1, 2))
        for command in (
            ["link", "add", self.name, "type", "veth", "peer", "name", "wire", "netns", str(self.init_pid)],
            ["addr", "add", f"{ours}/30", "dev", self.name],
            ["link", "set", self.name, "up"],
        ):
            subprocess.run(["ip", *command], check=True)
        self.run("ip", "addr", "add", f"{theirs}/30", "dev", "wire")
        self.run("ip", "link", "set", "wire", "up")
        return ours

    def hanging_file(self, size_bytes: int) -> tuple[Path, int]:
        """A raw image on a mount that hangs while the process, whose id is returned too, is stopped."""
        backing, mounted = self.path / "backing.raw", self.path / "mounted.raw"
        mounted.touch()
        with backing.open("wb") as file:
            file.truncate(size_bytes)
        self.run(
            "qemu-storage-daemon",
            "--daemonize",
            "--blockdev",
            f"driver=file,node-name=image,filename={backing}",
            "--export",
            f"type=fuse,id=export,node-name=image,mountpoint={mounted},writable=on,allow-other=off",
        )
        return mounted, self.processes("qemu-storage-d")[0]

    def stop(self) -> None:
        if self.init is not None:
            os.kill(self.init_pid, signal.SIGKILL)
            self.init.wait(10)
        for group in self._groups(make=False):
            _remove_group(group)
        shutil.rmtree(self.path, ignore_errors=True)

    def _groups(self, *, make: bool = True) -> list[Path]:
        groups = []
        for controller in CONTROLLERS:
            group = Path("/sys/fs/cgroup") / controller / self.name
            groups.append(group)
            if make:
                group.mkdir(exist_ok=True)
                if controller == "cpuset":
                    for name in ("cpuset.cpus", "cpuset.mems"):
                        (group / name).write_text((group.parent / name).read_text())
                    (group / "cgroup.clone_children").write_text("1")
        return groups


def join_networks(first: LibvirtHost, second: LibvirtHost) -> tuple[str, str]:
    """A cable between two hosts; returns their addresses."""
    ends = (first.init_pid, second.init_pid)
    subprocess.run(
        [
            "ip",
            "link",
            "add",
            "cable0",
            "netns",
            str(ends[0]),
            "type",
            "veth",
            "peer",
            "name",
            "cable0",
            "netns",
            str(ends[1]),
        ],
        check=True,
    )
    addresses = ("192.168.66.1", "192.168.66.2")
    for host, address in zip((first, second), addresses, strict=True):
        host.run("ip", "addr", "add", f"{address}/24", "dev", "cable0")
        host.run("ip", "link", "set", "cable0", "up")
    return addresses


def new_host() -> LibvirtHost:
    host = LibvirtHost(Path(tempfile.mkdtemp(prefix="volery-domains-")))
    try:
        host.start()
    except BaseException:
        host.stop()
        raise
    return host


def wait_for(condition: object, seconds: float, what: str) -> None:
    """Poll until the condition holds: only for processes that announce nothing."""
    assert callable(condition)
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"{what} took more than {seconds} s"
        time.sleep(0.02)


def _remove_group(group: Path) -> None:
    if not group.exists():
        return
    for child in sorted((p for p in group.rglob("*") if p.is_dir()), reverse=True):
        child.rmdir()
    for _ in range(50):
        try:
            group.rmdir()
            return
        except OSError:
            time.sleep(0.02)
