"""One host of a lab: power, cable, daemons, and what runs on it. All state is in files and the kernel."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lab import cgroups, network, processes, sanlock, stalls
from lab.commands import MODULE_ENVIRONMENT, python_module, run
from lab.errors import LabError
from lab.init import EXIT_ALREADY_ON
from lab.layout import LIBVIRT_PORT, HostLayout, address
from lab.processes import ProcessId
from lab.record import LabRecord, write_atomically

UNITS = (*sanlock.UNITS, "libvirtd", "agent")

LIBVIRTD_CONF = """\
host_uuid = "{uuid}"
listen_tls = 0
listen_tcp = 1
auth_tcp = "none"
auth_unix_rw = "none"
log_outputs = "2:file:/var/log/libvirt/libvirtd.log"
"""
# remember_owner keeps notes in extended attributes, per host, which two hosts on one file mix up.
QEMU_CONF = """\
user = "root"
group = "root"
security_driver = "none"
stdio_handler = "file"
vnc_listen = "0.0.0.0"
remember_owner = 0
lock_manager = "sanlock"
"""
QEMU_SANLOCK_CONF = """\
auto_disk_leases = 0
require_lease_for_disks = 0
user = "root"
group = "root"
"""


@dataclass(frozen=True)
class Boot:
    """One life of a host, between power on and power off."""

    init: ProcessId
    boot_id: str


@dataclass(frozen=True)
class HostStatus:
    """What `python -m lab status` shows of one host."""

    number: int
    ip: str
    power: str  # on, off, frozen
    cable: str  # joined, cut
    boot_id: str | None
    libvirtd: list[int]
    agent: list[int]
    guests: int


class Host:
    """A host by its number. Methods are synchronous and take milliseconds to seconds."""

    def __init__(self, layout: HostLayout, record: LabRecord) -> None:
        self.layout = layout
        self._record = record

    @property
    def number(self) -> int:
        return self.layout.number

    @property
    def name(self) -> str:
        """Its host name, which every host of the lab resolves."""
        return self.layout.name

    @property
    def ip(self) -> str:
        return address(self._record.subnet, self.number)

    @property
    def libvirt_uri(self) -> str:
        """libvirtd over the lab's network, from the machine and from other hosts: no login needed."""
        return f"qemu+tcp://{self.ip}:{LIBVIRT_PORT}/system"

    @property
    def local_libvirt_uri(self) -> str:
        """libvirtd's own socket, from the machine: works while the host is cut. Changes with a boot."""
        return f"qemu:///system?socket=/proc/{self._on().init.pid}/root/run/libvirt/libvirt-sock"

    @property
    def shared(self) -> Path:
        """The shared directory's path on the host, the same on every host."""
        return self.layout.lab.mounts / "shared"

    @property
    def home(self) -> Path:
        """The agent's VOLERY_HOME on the host: the same path on every host, its own content."""
        return self.layout.inner_home

    @property
    def boot(self) -> Boot | None:
        """The life it is in; None when it's off."""
        try:
            raw = json.loads(self.layout.boot_record.read_text())
        except FileNotFoundError:
            return None
        init = ProcessId(raw["pid"], raw["start_ticks"])
        return Boot(init, raw["boot_id"]) if processes.is_alive(init) else None

    def _on(self) -> Boot:
        boot = self.boot
        if boot is None:
            raise LabError(
                f"Host {self.number} of lab {self.layout.lab.name} is off: power it on with "
                f"`power-on {self.number}`."
            )
        return boot

    # --- what runs on it

    def exec(
        self,
        command: Sequence[str],
        *,
        timeout_seconds: float = 60.0,
        check: bool = True,
        environment: Mapping[str, str] | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Runs a program on the host, at `/`. Raises LabError when it fails and `check` is true."""
        return run_on_host(
            self.enter(command),
            f"`{' '.join(command)}` on host {self.number}",
            timeout_seconds,
            check,
            environment,
        )

    def enter(self, command: Sequence[str]) -> list[str]:
        """The arguments that run `command` on the host, for callers that start it themselves."""
        return ["nsenter", "--target", str(self._on().init.pid), "--all", "--", *command]

    def pids(self, name: str | None = None) -> list[int]:
        """The machine's pids of the host's processes: all, one unit's, or a program's by its name."""
        boot = self.boot
        if boot is None:
            return []
        found = processes.pids_in_namespace("pid", boot.init.pid)
        if name is None:
            return found
        if name in UNITS:
            unit = self._unit_pid(name)
            return [pid for pid in found if unit is not None and processes.inner_pid(pid) == unit]
        return [pid for pid in found if processes.is_program(pid, name)]

    def _unit_pid(self, unit: str, kind: str = "pid") -> int | None:
        try:
            return int((self.layout.units / f"{unit}.{kind}").read_text())
        except FileNotFoundError:
            return None

    def status(self) -> HostStatus:
        boot = self.boot
        state = processes.read_state(boot.init.pid) if boot else None
        power = "off" if state is None else "frozen" if state.state in "Tt" else "on"
        return HostStatus(
            number=self.number,
            ip=self.ip,
            power=power,
            cable="cut" if self.layout.cut_mark.exists() else "joined",
            boot_id=boot.boot_id if boot else None,
            libvirtd=self.pids("libvirtd"),
            agent=self.pids("agent"),
            guests=len(self.pids("qemu-system-x86_64")),
        )

    # --- power

    def power_on(self, *, hold: Sequence[str] = (), wait: bool = True) -> None:
        """Boots it unless it is on. `hold`: units that must not start.

        `wait`: until libvirtd answers, unless it is held or was told to stay down.

        Raises LabError with the end of the boot's log when it doesn't come up.
        """
        with self._action():
            if self.boot is None:
                self._sweep()
                self._prepare(hold)
                try:
                    self._start_init()
                except LabError:
                    self._sweep()
                    raise
        if wait and not (self.layout.units / "libvirtd.down").exists():
            self.wait_for_libvirtd()

    def power_off(self) -> None:
        """Pulls the plug: kill -9 of its pid 1, and with it of every process on it."""
        with self._action():
            boot = self.boot
            if boot is not None:
                processes.kill_and_wait(boot.init, lambda: stalls.end(self.layout.cgroup))
            self._sweep()

    def power_down(self, timeout_seconds: float = 60.0) -> None:
        """Shuts it down as its administrator does: the agent is ended first, and knows why; then the plug."""
        self._on()
        self.layout.shutdown_mark.touch()
        self._mark_down("agent", True)
        deadline = time.monotonic() + timeout_seconds
        for pid in self.pids("agent"):
            processes.send(pid, signal.SIGTERM)
        while self.pids("agent") and time.monotonic() < deadline:  # systemd, too, gives up after its time
            time.sleep(0.05)  # other processes' ends have no event that reaches us here
        self.power_off()

    def _sweep(self) -> None:
        """Removes what a dead host leaves in the kernel, also one killed in the middle of its boot."""
        stalls.end(self.layout.cgroup)
        cgroups.remove(self.layout.cgroup)
        network.unplug(self.layout)
        self.layout.boot_record.unlink(missing_ok=True)

    def _prepare(self, hold: Sequence[str]) -> None:
        directory = self.layout.directory
        self.layout.shutdown_mark.unlink(missing_ok=True)
        for name in ("lib-libvirt", "cache-libvirt", "home", "log", "units"):
            (directory / name).mkdir(parents=True, exist_ok=True)
        for unit in UNITS:
            for kind in ("pid", "last"):
                (self.layout.units / f"{unit}.{kind}").unlink(missing_ok=True)
            self._mark_down(unit, unit in hold)
        self._configure_libvirt(directory / "etc-libvirt")
        texts = {
            "hostname": self.name,
            "machine-id": self.layout.machine_uuid.hex,
            "product_uuid": str(self.layout.machine_uuid),
        }
        for file, text in texts.items():
            (directory / file).write_text(f"{text}\n")
        seed = self.layout.lab.capabilities_seed
        cache = directory / "cache-libvirt" / "qemu" / "capabilities"
        if seed.is_dir() and not cache.exists():
            shutil.copytree(seed, cache)
        command = self._record.agent_command
        if command is not None and not self.layout.agent_command.exists():
            write_atomically(self.layout.agent_command, json.dumps(command))
        cgroups.create(self.layout.cgroup)

    def _configure_libvirt(self, etc: Path) -> None:
        if not etc.exists():
            new = etc.with_name("etc-libvirt.new")
            shutil.rmtree(new, ignore_errors=True)
            shutil.copytree("/etc/libvirt", new, ignore=shutil.ignore_patterns("autostart"))
            new.rename(etc)
        (etc / "libvirtd.conf").write_text(LIBVIRTD_CONF.format(uuid=self.layout.machine_uuid))
        (etc / "qemu.conf").write_text(QEMU_CONF)
        (etc / "qemu-sanlock.conf").write_text(QEMU_SANLOCK_CONF)

    def _start_init(self) -> None:
        lab = self.layout.lab
        log = self.layout.log / "init.log"
        with log.open("ab") as output:
            done = subprocess.run(
                python_module("lab.init", str(lab.state), lab.name, str(self.number)),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env={**os.environ, **MODULE_ENVIRONMENT},
                check=False,
            )
        if done.returncode not in (0, EXIT_ALREADY_ON):
            raise LabError(
                f"Host {self.number} of lab {lab.name} did not boot: {_tail(log)} (the whole log is "
                f"{log}). `up` makes again what the host needs from its lab."
            )
        deadline = time.monotonic() + 10
        while self.boot is None:  # only when a killed tool's boot was still on its way
            if time.monotonic() > deadline:
                raise LabError(f"Host {self.number} of lab {lab.name} did not boot: see {log}.")
            time.sleep(0.01)

    def wait_for_libvirtd(self, timeout_seconds: float = 60.0) -> None:
        """Returns when libvirtd answers a call. Raises LabError after the time."""
        deadline = time.monotonic() + timeout_seconds
        root = Path(f"/proc/{self._on().init.pid}/root")
        wanted = [root / "run/libvirt/libvirt-sock"]
        if not (self.layout.units / "sanlock.down").exists():
            wanted.append(root / sanlock.SOCKET)  # guests don't start before it is there
        for path in wanted:
            while not _listens(str(path)):  # a daemon announces its socket to nobody
                if time.monotonic() > deadline:
                    self._libvirtd_is_silent(timeout_seconds, f"nothing listens on {path.name}.")
                time.sleep(0.01)
        try:
            # Answered only once its drivers are up.
            run(
                ["virsh", "--connect", self.local_libvirt_uri, "version"],
                timeout_seconds=max(1.0, deadline - time.monotonic()),
            )
        except LabError as error:
            self._libvirtd_is_silent(timeout_seconds, str(error))

    def _libvirtd_is_silent(self, timeout_seconds: float, reason: str) -> None:
        raise LabError(
            f"libvirtd of host {self.number} did not answer within {timeout_seconds:g} s: {reason} "
            f"See {self.layout.log / 'libvirtd.out'}."
        )

    # --- cable

    def cut(self) -> None:
        """Pulls the network cable. It stays pulled over a power cycle, until `join`."""
        self.layout.directory.mkdir(parents=True, exist_ok=True)
        self.layout.cut_mark.touch()
        network.set_cable(self.layout, connected=False)

    def join(self) -> None:
        """Plugs the cable in again."""
        self.layout.cut_mark.unlink(missing_ok=True)
        network.set_cable(self.layout, connected=True)

    def cut_storage(self) -> None:
        """The iSCSI portal answers this host no more; connections stay open. It stays so until `join_storage`."""
        network.set_storage(self.layout, self._record.subnet, connected=False)

    def join_storage(self) -> None:
        network.set_storage(self.layout, self._record.subnet, connected=True)

    # --- daemons

    def kill_libvirtd(self, *, stay_down: bool = True) -> None:
        """kill -9. Down until `start_libvirtd` or the next boot; else pid 1 restarts it in 0.5 s."""
        self._kill_unit("libvirtd", stay_down)

    def start_libvirtd(self) -> None:
        """Starts libvirtd unless it runs; returns when it answers."""
        self._start_unit("libvirtd")
        self.wait_for_libvirtd()

    def kill_agent(self, *, stay_down: bool = False) -> None:
        """kill -9 of the agent's own process, not of its children; pid 1 restarts it in 0.5 s."""
        self._kill_unit("agent", stay_down)

    def start_agent(self) -> None:
        """Starts the agent unless it runs; returns when its process exists."""
        if not self.layout.agent_command.exists():
            raise LabError(
                f"Host {self.number} has no agent: give its command with `install_agent` or "
                "`up --agent-command`."
            )
        self._start_unit("agent")

    def install_agent(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        """Sets what the agent is, and starts it: at once if the host is on, and at every boot.

        `environment` is added to VOLERY_HOME, PATH and HOME. A running agent is left as it is.
        """
        self.layout.directory.mkdir(parents=True, exist_ok=True)
        lines = (f"{key}={value}\n" for key, value in environment.items())
        write_atomically(self.layout.agent_environment, "".join(lines))
        write_atomically(self.layout.agent_command, json.dumps(list(command)))
        if self.boot is not None:
            self._start_unit("agent")

    def _mark_down(self, unit: str, down: bool) -> None:
        mark = self.layout.units / f"{unit}.down"
        if down:
            mark.touch()
        else:
            mark.unlink(missing_ok=True)

    def _kill_unit(self, unit: str, stay_down: bool) -> None:
        self._on()
        if stay_down:
            self._mark_down(unit, True)  # first, or pid 1 would start it between the two
        for pid in self.pids(unit):
            process = processes.identify(pid)
            if process is not None:
                processes.kill_and_wait(process)

    def _start_unit(self, unit: str) -> None:
        boot = self._on()
        last = self._unit_pid(unit, "last")
        self._mark_down(unit, False)
        processes.send(boot.init.pid, signal.SIGHUP)
        deadline = time.monotonic() + 10
        # It may have ended already; then pid 1 tries again, and its log says why.
        while not self.pids(unit) and self._unit_pid(unit, "last") == last:
            if time.monotonic() > deadline:
                raise LabError(
                    f"{unit} of host {self.number} did not start: see {self.layout.log / f'{unit}.out'}."
                )
            time.sleep(0.01)

    # --- time

    def freeze(self, timeout_seconds: float = 10.0) -> None:
        """SIGSTOP to every process on it: nothing runs, connections stay open. Returns when all stand."""
        boot = self._on()
        deadline = time.monotonic() + timeout_seconds
        while running := self._running(boot):  # again: forks race, and a stop takes its time
            for pid in running:
                processes.send(pid, signal.SIGSTOP)
            if time.monotonic() > deadline:
                raise LabError(
                    f"Host {self.number} did not stand still within {timeout_seconds:g} s: processes "
                    f"{running} are probably in I/O that doesn't return. Try again, or power it off."
                )
            time.sleep(0.002)

    def _running(self, boot: Boot) -> list[int]:
        """Its processes that SIGSTOP hasn't reached yet."""
        found = processes.pids_in_namespace("pid", boot.init.pid)
        states = ((pid, processes.read_state(pid)) for pid in found)
        return [pid for pid, state in states if state is not None and state.state not in "TtZX"]

    def thaw(self) -> None:
        for pid in processes.pids_in_namespace("pid", self._on().init.pid):
            processes.send(pid, signal.SIGCONT)

    @contextlib.contextmanager
    def _action(self) -> Iterator[None]:
        """One power action at a time on this host, whoever asks."""
        self.layout.directory.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.layout.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)


def run_on_host(
    command: Sequence[str],
    what: str,
    timeout_seconds: float,
    check: bool,
    environment: Mapping[str, str] | None,
) -> subprocess.CompletedProcess[str]:
    """Runs nsenter with its child in one session, so that a time-out ends both. Raises LabError."""
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=None if environment is None else {**os.environ, **environment},
    )
    with process:
        try:
            out, err = process.communicate(timeout=timeout_seconds)
        except subprocess.TimeoutExpired as error:
            os.killpg(process.pid, signal.SIGKILL)
            raise LabError(f"{what} did not end within {timeout_seconds:g} s.") from error
    if check and process.returncode != 0:
        raise LabError(f"{what} failed with {process.returncode}: {(err or out).strip()}")
    return subprocess.CompletedProcess(list(command), process.returncode, out, err)


def _listens(path: str) -> bool:
    """Whether a daemon accepts connections there; a killed one leaves its socket's file behind."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        try:
            client.connect(path)
        except (FileNotFoundError, ConnectionRefusedError):
            return False
        return True


def _tail(log: Path, lines: int = 2) -> str:
    try:
        return " / ".join(log.read_text(errors="replace").splitlines()[-lines:])
    except FileNotFoundError:
        return "it wrote no log."
