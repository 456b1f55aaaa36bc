"""Process 1 of a lab host: builds the machine around itself, runs its units and reaps what ends.

Started as `python -S -m lab.init STATE NAME NUMBER` by `lab.host`. The first process joins the host's
control group, leaves every namespace and forks; the fork is the host, and kill -9 of it is a power cut.
Only the standard library is imported, so that a boot costs tens of milliseconds.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import select
import signal
import stat
import subprocess
import sys
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

from lab import cgroups, kernel, sanlock, watchdog
from lab.layout import STORAGE_OCTET, HostLayout, LabLayout, address

EXIT_ALREADY_ON = 3
RESTART_DELAY_SECONDS = 0.5  # what systemd's RestartSec is usually set to
READY = b"up"

NAMESPACES = (
    kernel.CLONE_NEWNS
    | kernel.CLONE_NEWUTS
    | kernel.CLONE_NEWIPC
    | kernel.CLONE_NEWCGROUP
    | kernel.CLONE_NEWPID
    | kernel.CLONE_NEWNET
)

# /dev/kvm is not among them: a lab must behave the same where KVM opens but doesn't work.
DEVICES = ("null", "zero", "full", "random", "urandom", "tty", "net/tun", "vhost-net", "fuse")

ENVIRONMENT = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "HOME": "/root",
    "LANG": "C.UTF-8",
}


def main(arguments: list[str]) -> int:
    """Returns 0 when the host's mounts stand, EXIT_ALREADY_ON when it was running, else 1."""
    state, name, number = arguments
    host = LabLayout(Path(state), name).host(int(number))
    record = json.loads(host.lab.record.read_text())
    lock = os.open(host.power_lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return EXIT_ALREADY_ON
    supervisor = watchdog.start(host)
    assert supervisor.stdin is not None
    cgroups.join(host.cgroup)
    os.setsid()
    kernel.unshare(NAMESPACES)
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        os.close(supervisor.stdin.fileno())
        _live(host, record["subnet"], record["kvm"], writer)
    supervisor.stdin.write(f"{pid}\n".encode())
    supervisor.stdin.close()
    os.close(writer)
    os.close(lock)  # the fork keeps it locked
    return 0 if os.read(reader, len(READY)) == READY else 1


def _live(host: HostLayout, subnet: str, kvm: bool, ready: int) -> None:
    """The life of the host. Doesn't return."""
    wake_reader, wake_writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    for number in (signal.SIGCHLD, signal.SIGHUP):
        signal.signal(number, lambda *_: None)
    signal.set_wakeup_fd(wake_writer, warn_on_full_buffer=False)
    try:
        boot(host, subnet, kvm)
    except (OSError, subprocess.CalledProcessError) as error:
        print(error, file=sys.stderr, flush=True)
        os._exit(1)
    os.write(ready, READY)
    os.close(ready)
    run_units(host, wake_reader)


def boot(host: HostLayout, subnet: str, kvm: bool) -> None:
    """Network, mounts and identity of the host; then its boot record. Raises OSError."""
    pid = int(os.readlink("/proc/self"))  # /proc is still the machine's, so this is its pid there
    start_ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    boot_id = str(uuid.uuid4())
    (host.directory / "boot_id").write_text(boot_id + "\n")
    # As a slave it follows the machine's unmounts, so that a lab keeps no file system of it busy.
    kernel.mount("none", "/", flags=kernel.MS_REC | kernel.MS_SLAVE)
    kernel.set_hostname(host.name)
    _plug_cable(host, subnet)
    os.chdir(host.directory)
    _mount_system(kvm)
    for source, target in _binds(host):
        if Path(target).exists():  # not every machine has a DMI
            kernel.bind(str(source), target)
    Path("/proc/sys/net/ipv4/ip_forward").write_text("1")
    record = {"pid": pid, "start_ticks": start_ticks, "boot_id": boot_id}
    Path("boot.json.new").write_text(json.dumps(record))
    os.rename("boot.json.new", host.boot_record.name)


def _plug_cable(host: HostLayout, subnet: str) -> None:
    """eth0 in here, its other end on the lab's switch; down there while the cable is cut."""
    switch = host.lab.switch
    # The default route leads to the switch, which forwards nothing. The machine might, whenever some
    # libvirt on it has turned forwarding on, and then this lab would reach others.
    router = address(subnet, STORAGE_OCTET)
    # What a killed predecessor left: the kernel removes a dead network namespace a little later.
    subprocess.run(["ip", "-n", switch, "link", "del", host.name], capture_output=True, check=False)
    for command in (
        f"link add eth0 address {host.mac_address} type veth peer name {host.name} netns {switch}",
        f"address add {address(subnet, host.number)}/24 dev eth0",
        "link set lo up",
        "link set eth0 up",
        f"route add default via {router}",
        f"-n {switch} link set {host.name} master br0",
        f"-n {switch} link set {host.name} {'down' if host.cut_mark.exists() else 'up'}",
    ):
        subprocess.run(["ip", *command.split()], check=True)


def _binds(host: HostLayout) -> list[tuple[Path, str]]:
    """What this host has for itself (or shares with the lab's others) at well-known paths."""
    directory = host.directory
    return [
        (directory / "etc-libvirt", "/etc/libvirt"),
        (directory / "lib-libvirt", "/var/lib/libvirt"),
        (directory / "cache-libvirt", "/var/cache/libvirt"),
        (directory / "log", "/var/log/libvirt"),
        (directory / "home", str(host.inner_home)),
        (host.lab.shared, str(host.lab.mounts / "shared")),
        (directory / "hostname", "/etc/hostname"),
        (directory / "machine-id", "/etc/machine-id"),
        (host.lab.hosts_file, "/etc/hosts"),
        (directory / "boot_id", "/proc/sys/kernel/random/boot_id"),
        (directory / "product_uuid", "/sys/class/dmi/id/product_uuid"),
    ]


def _mount_system(kvm: bool) -> None:
    """/dev, /run, /sys with the control groups, and /proc as a machine of its own would have them."""
    trees = cgroups.hierarchies()
    _mount_devices([*DEVICES, "kvm"] if kvm else list(DEVICES))
    _clear("/run")
    kernel.mount("tmpfs", "/run", "tmpfs", kernel.MS_NOSUID | kernel.MS_NODEV, "mode=755")
    for directory in ("/run/lock", "/run/libvirt", *sanlock.DIRECTORIES):
        os.mkdir(directory)
    _clear("/sys")
    kernel.mount("sysfs", "/sys", "sysfs")
    if trees[0].unified:
        kernel.mount("cgroup2", "/sys/fs/cgroup", "cgroup2")
        _leave_root_group(Path("/sys/fs/cgroup"))
    else:
        kernel.mount("tmpfs", "/sys/fs/cgroup", "tmpfs", options="mode=755")
        for tree in trees:
            target = Path("/sys/fs/cgroup") / tree.mount_point.name
            target.mkdir()
            kernel.mount("cgroup", str(target), "cgroup", options=tree.options)
    _clear("/proc")
    kernel.mount("proc", "/proc", "proc")


def _clear(top: str) -> None:
    """Takes the machine's mounts at and below `top` out of here. Copies would keep them busy for it,

    and libvirt reads /proc/mounts, where a hidden mount looks like one that it can use.
    """
    lines = Path("/proc/self/mounts").read_text().splitlines()
    for target in reversed([line.split()[1] for line in lines]):
        if target == top or target.startswith(f"{top}/"):
            with contextlib.suppress(OSError):  # under another mount, so already gone with it
                kernel.detach(target)


def _leave_root_group(root: Path) -> None:
    """A v2 group with processes can't hand controllers down, and libvirt needs them below the root."""
    (root / "system").mkdir(exist_ok=True)
    (root / "system" / "cgroup.procs").write_text("0")


def _mount_devices(names: list[str]) -> None:
    found = {}
    for name in names:
        path = Path("/dev", name)
        if path.exists() and stat.S_ISCHR(path.stat().st_mode):
            found[name] = path.stat().st_rdev
    _clear("/dev")
    kernel.mount("tmpfs", "/dev", "tmpfs", kernel.MS_NOSUID, "mode=755")
    for directory in ("pts", "shm", "net", "mqueue"):
        Path("/dev", directory).mkdir()
    for name, device in found.items():
        os.mknod(f"/dev/{name}", stat.S_IFCHR | 0o666, device)
        os.chmod(f"/dev/{name}", 0o666)  # noqa: S103 (mknod's mode is subject to the umask)
    kernel.mount("devpts", "/dev/pts", "devpts", options="newinstance,ptmxmode=0666,mode=620")
    kernel.mount("tmpfs", "/dev/shm", "tmpfs", kernel.MS_NOSUID | kernel.MS_NODEV)  # noqa: S108
    links = {"ptmx": "pts/ptmx", "fd": "/proc/self/fd", "stdin": "/proc/self/fd/0",
             "stdout": "/proc/self/fd/1", "stderr": "/proc/self/fd/2"}  # fmt: skip
    for name, target in links.items():
        os.symlink(target, f"/dev/{name}")


@dataclass
class Unit:
    """A program that runs whenever it isn't marked down, started again after it ended."""

    name: str
    pid: int | None = None
    not_before: float = 0.0  # monotonic seconds


def run_units(host: HostLayout, wake: int) -> None:
    """Level-triggered: after every signal each unit is made to be what its files say. Never returns."""
    units = [Unit(name) for name in (*sanlock.UNITS, "libvirtd", "agent")]
    while True:
        waits = [_reconcile(unit, host) for unit in units]
        timeout = min((wait for wait in waits if wait is not None), default=None)
        if select.select([wake], [], [], timeout)[0]:
            os.read(wake, 4096)
        for pid in _reap():
            for unit in units:
                if unit.pid == pid:
                    once = unit.name in sanlock.UNITS
                    delay = float("inf") if once else RESTART_DELAY_SECONDS
                    unit.pid, unit.not_before = None, time.monotonic() + delay
                    Path("units", f"{unit.name}.pid").unlink(missing_ok=True)


def _reap() -> list[int]:
    ended: list[int] = []
    while True:
        try:
            pid, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return ended
        if pid == 0:
            return ended
        ended.append(pid)


def _reconcile(unit: Unit, host: HostLayout) -> float | None:
    """Starts the unit if it is due. Returns the seconds until it is, or None if there's no such time."""
    if unit.pid is not None:
        return None
    if Path("units", f"{unit.name}.down").exists():
        unit.not_before = 0.0  # started by hand, it starts at once
        return None
    command = _command(host, unit.name)
    if command is None:
        return None
    wait = unit.not_before - time.monotonic()
    if wait > 0:
        return None if unit.not_before == float("inf") else wait
    unit.pid = _spawn(command, ENVIRONMENT | _environment(host, unit.name), f"log/{unit.name}.out")
    for kind in ("pid", "last"):
        Path("units", f"{unit.name}.new").write_text(str(unit.pid))
        os.rename(f"units/{unit.name}.new", f"units/{unit.name}.{kind}")
    return None


def _command(host: HostLayout, name: str) -> list[str] | None:
    if name in sanlock.UNITS:
        return sanlock.command(host, name, watchdog=not Path("units", "wdmd.down").exists())
    if name == "libvirtd":
        return ["libvirtd", "--listen", "--pid-file", "/run/libvirtd.pid"]
    try:
        return [str(argument) for argument in json.loads(Path("agent.command").read_text())]
    except FileNotFoundError:
        return None


def _environment(host: HostLayout, unit: str) -> dict[str, str]:
    if unit in sanlock.UNITS:
        return sanlock.environment(host)
    return _agent_environment(host) if unit == "agent" else {}


def _agent_environment(host: HostLayout) -> dict[str, str]:
    environment = {"VOLERY_HOME": str(host.inner_home)}
    try:
        lines = Path("agent.env").read_text().splitlines()
    except FileNotFoundError:
        return environment
    for line in lines:
        key, separator, value = line.partition("=")
        if separator and not key.lstrip().startswith("#"):
            environment[key.strip()] = value.strip()
    return environment


def _spawn(command: list[str], environment: dict[str, str], log: str) -> int:
    """Starts a program in a session of its own, at `/`, its output appended to `log`.

    Returns when the pid is the program's, or has failed to become it: until exec it is a copy of us.
    """
    executed, waiting = os.pipe2(os.O_CLOEXEC)  # exec closes the fork's end
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    pid = os.fork()
    if pid:
        os.close(output)
        os.close(waiting)
        os.read(executed, 1)
        os.close(executed)
        return pid
    try:
        os.setsid()
        for number in (signal.SIGPIPE, signal.SIGXFSZ, signal.SIGCHLD, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)  # Python ignores the first two
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.chdir("/")
        os.execvpe(command[0], command, environment)  # noqa: S606 - by argument list, no shell
    except OSError as error:
        os.write(output, f"{command[0]} did not start: {error}\n".encode())
    finally:
        os._exit(127)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
