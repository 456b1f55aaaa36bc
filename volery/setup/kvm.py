"""Does KVM really run guests here? Found out by running one, since /dev/kvm opening proves nothing."""

from __future__ import annotations

import grp
import json
import os
import shutil
import stat
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from volery.setup.home import Home
from volery.setup.processes import boot_id

DEVICE = Path("/dev/kvm")
# Emulation needs 0.1 s for the probe. Hardware that takes many times that (the yardstick is measured
# at the same moment, under the same load) pays milliseconds for each exit and can't carry a guest.
_SLOWER_THAN_EMULATION = 8.0
_SHORTEST_LIMIT_SECONDS = 1.0
_EMULATION_LIMIT_SECONDS = 30.0
_EXIT_PORT = 0xF4
_EXIT_VALUE = 0x2A
# QEMU's debug exit device ends with (value << 1) | 1.
_EXIT_STATUS = _EXIT_VALUE << 1 | 1
# mov dx, port; mov al, value; out dx, al; hlt; jmp back to hlt
_CODE = bytes([0xBA, _EXIT_PORT, 0x00, 0xB0, _EXIT_VALUE, 0xEE, 0xF4, 0xEB, 0xFD])
BOOT_SECTOR = _CODE.ljust(510, b"\0") + b"\x55\xaa"
_EMULATORS = ("qemu-system-x86_64", "/usr/libexec/qemu-kvm", "qemu-kvm")


@dataclass(frozen=True)
class Kvm:
    """Whether guests may use KVM, and if not, why and what to do."""

    works: bool
    reason: str


def probe(home: Home) -> Kvm:
    """Boots a sector that only says that it ran, emulated and then under KVM, and compares.

    The answer is kept for this boot of the machine in run/kvm.json.
    """
    kept = home.run / "kvm.json"
    identity = _identity()
    try:
        known = json.loads(kept.read_text())
        if known["for"] == identity:
            return Kvm(bool(known["works"]), str(known["reason"]))
    except (FileNotFoundError, ValueError, KeyError):
        pass
    found = _probe()
    kept.write_text(json.dumps({"for": identity, "works": found.works, "reason": found.reason}) + "\n")
    return found


def _identity() -> list[str]:
    """What the answer depends on: this boot, and whether the device is there."""
    return [boot_id(), str(DEVICE.exists()), str(emulator() or "")]


def emulator() -> Path | None:
    """QEMU's program on this machine."""
    for name in _EMULATORS:
        found = shutil.which(name)
        if found:
            return Path(found)
    return None


def _probe() -> Kvm:
    program = emulator()
    if program is None:
        return Kvm(False, "QEMU isn't installed: run `make up`, which installs it.")
    if not DEVICE.exists():
        return Kvm(
            False,
            f"{DEVICE} is missing: switch on virtualization (VT-x or AMD-V) in the firmware, or load"
            " the module kvm_intel or kvm_amd. Guests are emulated meanwhile, which is slow.",
        )
    started = time.monotonic()
    boot_sector(program, "tcg", "max", _EMULATION_LIMIT_SECONDS)
    emulated_seconds = time.monotonic() - started
    limit = max(_SHORTEST_LIMIT_SECONDS, _SLOWER_THAN_EMULATION * emulated_seconds)
    return boot_sector(program, "kvm", "host", limit)


def boot_sector(program: Path, accelerator: str, cpu: str, timeout_seconds: float) -> Kvm:
    """Whether a guest's first instructions run under the accelerator within the time."""
    with tempfile.NamedTemporaryFile(suffix=".img") as sector:
        sector.write(BOOT_SECTOR)
        sector.flush()
        return _boot(program, accelerator, cpu, sector.name, timeout_seconds)


def _boot(program: Path, accelerator: str, cpu: str, sector: str, timeout_seconds: float) -> Kvm:
    arguments = [
        str(program), "-accel", accelerator, "-cpu", cpu, "-machine", "pc", "-m", "16",
        "-display", "none", "-nodefaults", "-no-user-config", "-no-reboot", "-serial", "none",
        "-monitor", "none", "-device", f"isa-debug-exit,iobase={_EXIT_PORT:#x},iosize=1",
        "-drive", f"file={sector},format=raw,if=ide,snapshot=on",
    ]  # fmt: skip
    try:
        done = subprocess.run(
            arguments,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout_seconds,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return Kvm(
            False,
            f"A guest under {accelerator} did not run its first instructions within"
            f" {timeout_seconds:.1f} s, as happens where nested virtualization is offered but doesn't"
            " work. Guests are emulated instead, which is slow.",
        )
    if done.returncode == _EXIT_STATUS:
        return Kvm(True, f"A guest ran under {accelerator}.")
    said = [line.removeprefix(f"{program.name}: ") for line in done.stderr.splitlines() if line.strip()]
    return Kvm(
        False,
        f"QEMU could not run a guest under {accelerator}: {said[0] if said else 'it gave no reason'}."
        " Guests are emulated instead, which is slow.",
    )


def repair_device() -> str | None:
    """Gives /dev/kvm to the group kvm (0660) where no udev does it; what was changed, else None.

    libvirt's unprivileged QEMU user can't open it otherwise, and libvirt then probes QEMU anew for
    every domain, a minute each. Where udev runs, its rules own the device and nothing is touched.
    """
    if os.geteuid() != 0 or not DEVICE.exists() or Path("/run/udev/control").exists():
        return None
    try:
        group = grp.getgrnam("kvm").gr_gid
    except KeyError:
        return None
    now = DEVICE.stat()
    if (now.st_gid, stat.S_IMODE(now.st_mode)) == (group, 0o660):
        return None
    os.chown(DEVICE, now.st_uid, group)
    DEVICE.chmod(0o660)
    return f"{DEVICE} now belongs to the group kvm (no udev does that here)"
