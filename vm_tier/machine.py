"""One host of the tier: a QEMU process without KVM, whose CPU emulates SVM so that its guests are `kvm`."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lab.commands import run
from lab.errors import LabError
from vm_tier.image import Image

MEMORY_MIB = 1536
BOOT_SECONDS = 1800.0
SSH_SECONDS = 300.0
NAMESPACE = uuid.UUID("5a3e53c6-4b83-4b02-b7d8-7a2a3a6c1d11")


@dataclass(frozen=True)
class Machine:
    """Number 1 is hv1 at .1 of the subnet."""

    number: int
    directory: Path
    image: Image
    subnet: str
    """Its first three bytes."""
    bridge: str
    nice: int = 19
    """Of its QEMU: 19 gives way to everything else on this machine, and is slow where there is much else."""

    @property
    def name(self) -> str:
        return f"hv{self.number}"

    @property
    def ip(self) -> str:
        return f"{self.subnet}.{self.number}"

    @property
    def ident(self) -> uuid.UUID:
        """The machine's own: the same id on two would give their bridges one MAC."""
        return uuid.uuid5(NAMESPACE, f"{self.directory} {self.number}")

    @property
    def console(self) -> Path:
        return self.directory / f"{self.name}.log"

    @property
    def monitor(self) -> Path:
        """Its QEMU's QMP socket (`vm_tier.qmp`)."""
        return self.directory / f"{self.name}.qmp"

    @property
    def pid_file(self) -> Path:
        return self.directory / f"{self.name}.pid"

    @property
    def pid(self) -> int | None:
        """Of its QEMU; None: it is off."""
        try:
            pid = int(self.pid_file.read_text())
            return pid if self.name in Path(f"/proc/{pid}/cmdline").read_text().split("\0") else None
        except (OSError, ValueError):
            return None

    def power_on(self) -> None:
        """Returns once QEMU runs; `answers` says when the host does."""
        if self.pid is not None:
            return
        disk = self.directory / f"{self.name}.qcow2"
        if not disk.exists():
            run(
                [
                    "qemu-img",
                    "create",
                    "-q",
                    "-f",
                    "qcow2",
                    "-F",
                    "qcow2",
                    "-b",
                    str(self.image.disk),
                    str(disk),
                ]
            )
        self._tap()
        run(self.command(disk), timeout_seconds=60)

    def _tap(self) -> None:
        if not Path(f"/sys/class/net/{self.link}").exists():
            run(["ip", "tuntap", "add", self.link, "mode", "tap"])
        run(["ip", "link", "set", self.link, "master", self.bridge, "up"])

    @property
    def link(self) -> str:
        return f"{self.bridge}-{self.number}"

    def command(self, disk: Path) -> list[str]:
        ident = self.ident
        mac = f"52:54:00:{ident.bytes[:2].hex(':')}:{self.number:02x}"
        address = f"ip={self.ip}::{self.subnet}.254:255.255.255.0:{self.name}:eth0:none"
        kernel = (
            f"root=/dev/vda rw console=ttyS0 quiet net.ifnames=0 crashkernel=192M {address} "
            f"systemd.hostname={self.name} systemd.machine_id={ident.hex} systemd.mask=systemd-udev-settle.service "
            # Emulated: what waits here waits long.
            "systemd.default_timeout_start_sec=900 rcupdate.rcu_cpu_stall_suppress=1"
        )
        return [
            "nice", "-n", str(self.nice), "qemu-system-x86_64", "-name", self.name, "-machine", "q35", "-accel", "tcg,thread=multi",
            "-cpu", "max", "-smp", "1", "-m", str(MEMORY_MIB), "-uuid", str(ident), "-nodefaults", "-display", "none",
            "-daemonize", "-pidfile", str(self.pid_file), "-serial", f"file:{self.console}",
            "-kernel", str(self.image.kernel), "-initrd", str(self.image.initrd), "-append", kernel,
            "-drive", f"file={disk},if=virtio,cache=unsafe",
            "-netdev", f"tap,id=n,ifname={self.link},script=no,downscript=no",
            "-device", f"virtio-net-pci,netdev=n,mac={mac},romfile=",
            "-object", "rng-random,id=r,filename=/dev/urandom", "-device", "virtio-rng-pci,rng=r",
            "-device", "i6300esb", "-action", "watchdog=reset", "-qmp", f"unix:{self.monitor},server=on,wait=off",
        ]  # fmt: skip

    def kill(self) -> None:
        """The plug is pulled."""
        pid = self.pid
        if pid is None:
            return
        os.kill(pid, signal.SIGKILL)
        while self.pid is not None:
            time.sleep(0.01)  # no child of ours, so there is no end to wait for

    def cable(self, state: Literal["up", "down"]) -> None:
        """Pulls its network cable, or puts it back."""
        run(["ip", "link", "set", self.link, state])

    def forget(self) -> None:
        """What is left of it on this machine when it is off."""
        run(["sh", "-c", f"ip link delete {self.link} 2>/dev/null || :"])

    def ssh(self, command: str, *, given: str | None = None, seconds: float = SSH_SECONDS) -> str:
        """What a shell of root's prints there. Raises LabError."""
        asked = [
            "ssh", "-i", str(self.image.key), "-o", "BatchMode=yes", "-o", f"ConnectTimeout={SSH_SECONDS:.0f}",
            "-o", "ControlMaster=auto", "-o", f"ControlPath={self.directory}/{self.name}.ssh", "-o", "ControlPersist=600",
            "-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null", "-o", "LogLevel=ERROR",
            f"root@{self.ip}", command,
        ]  # fmt: skip
        try:
            done = subprocess.run(
                asked, input=given, capture_output=True, text=True, timeout=seconds, check=False,
                stdin=None if given is not None else subprocess.DEVNULL,
            )  # fmt: skip
        except subprocess.TimeoutExpired as error:
            raise LabError(f"{self.name}: {command!r} did not end within {seconds:g} s") from error
        if done.returncode:
            said = (done.stderr or done.stdout).strip()
            raise LabError(f"{self.name}: {command!r} failed with {done.returncode}: {said}")
        return done.stdout

    def write(self, path: str, text: str, mode: str = "0644") -> None:
        place = shlex.quote(path)
        self.ssh(f"mkdir -p $(dirname {place}) && install -m {mode} /dev/stdin {place}", given=text)

    def answers(self, seconds: float = BOOT_SECONDS) -> float:
        """Waits until root can log in. How long that took, in seconds."""
        began = time.monotonic()
        while True:
            try:
                self.ssh("true")
            except LabError as error:
                if self.pid is None:
                    raise LabError(f"{self.name} went off; its console is {self.console}") from error
                if time.monotonic() - began > seconds:
                    raise
                time.sleep(2)  # nothing announces that sshd of another machine listens
            else:
                return time.monotonic() - began
