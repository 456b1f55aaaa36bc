"""libvirt's daemons: running, by systemd where there is one, else started here. Never stopped by us."""

from __future__ import annotations

import shutil
import socket
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from volery.setup.errors import SetupError
from volery.setup.processes import ProcessId

_START_SECONDS = 30.0
_POLL_SECONDS = 0.02
SYSTEMD = Path("/run/systemd/system")


@dataclass(frozen=True)
class Daemon:
    """One of libvirt's daemons on a machine without systemd."""

    name: str
    sockets: tuple[str, ...]
    pid_file: str

    def available(self) -> bool:
        return shutil.which(self.name) is not None

    def process(self) -> ProcessId | None:
        """The running daemon, by its own pid file."""
        try:
            pid = int(Path(self.pid_file).read_text())
            name = Path(f"/proc/{pid}/comm").read_text().strip()
        except (FileNotFoundError, ProcessLookupError, ValueError):
            return None
        return ProcessId.of(pid) if name == self.name[:15] else None

    def ensure(self) -> ProcessId | None:
        """The daemon's process, started when it isn't running; SetupError when it doesn't answer.

        Two installations may do this at once: the daemon locks its pid file, and the second one ends.
        """
        if self.process() is None:
            subprocess.run([self.name, "-d"], capture_output=True, check=False)
        deadline = time.monotonic() + _START_SECONDS
        while not any(answers(Path(path)) for path in self.sockets):
            if time.monotonic() > deadline:
                raise SetupError(
                    f"{self.name} doesn't answer on {self.sockets[0]}. Start it by hand to see why:"
                    f" `{self.name} --verbose`."
                )
            time.sleep(_POLL_SECONDS)
        return self.process()


DAEMONS = (
    Daemon("virtlogd", ("/run/libvirt/virtlogd-sock",), "/run/virtlogd.pid"),
    Daemon("libvirtd", ("/run/libvirt/libvirt-sock",), "/run/libvirtd.pid"),
)

# On systemd: the first alternative whose units exist. Newer systems split libvirtd into one daemon
# for each driver, started by their sockets.
_UNITS = (
    ("virtqemud.socket", "virtlogd.socket", "virtnodedevd.socket", "virtnetworkd.socket"),
    ("libvirtd.socket", "virtlogd.socket"),
    ("libvirtd.service",),
)
ANSWERING = (Path("/run/libvirt/libvirt-sock"), Path("/run/libvirt/virtqemud-sock"))


def ours_to_keep() -> bool:
    """Whether Volery starts and restarts the daemons, because no systemd does."""
    return not SYSTEMD.is_dir()


def ensure() -> str:
    """libvirt answers afterwards; says what was done. SetupError says what is missing."""
    if any(answers(path) for path in ANSWERING):
        return "already running"
    if ours_to_keep():
        daemons = [daemon for daemon in DAEMONS if daemon.available()]
        if not any(daemon.name == "libvirtd" for daemon in daemons):
            raise SetupError("libvirtd is not installed: run `make up`, which installs it.")
        for daemon in daemons:
            daemon.ensure()
        return "started"
    for units in _UNITS:
        if all(_exists(unit) for unit in units):
            done = subprocess.run(
                ["systemctl", "enable", "--now", *units], capture_output=True, text=True, check=False
            )
            if done.returncode:
                raise SetupError(f"systemd can't start {', '.join(units)}: {done.stderr.strip()}")
            return f"enabled {units[0]}"
    raise SetupError("libvirt's services are not installed: run `make up`, which installs them.")


def _exists(unit: str) -> bool:
    return subprocess.run(["systemctl", "cat", unit], capture_output=True, check=False).returncode == 0


def answers(path: Path) -> bool:
    """Whether a daemon accepts connections on this socket."""
    try:
        with socket.socket(socket.AF_UNIX) as probe:
            probe.settimeout(2)
            probe.connect(str(path))
    except OSError:
        return False
    return True
