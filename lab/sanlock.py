"""sanlock and wdmd of a lab host: the machine's programs, with what a lab can't give them stood in for.

`build` runs once in a lab; the rest is how process 1 of a host starts the two. Only the standard library is imported.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from lab.commands import run
from lab.errors import LabError
from lab.layout import HostLayout, LabLayout

SOURCE = Path(__file__).with_name("stand_in.c")
PLUGINS = ("/usr/lib/x86_64-linux-gnu/libvirt", "/usr/lib64/libvirt", "/usr/lib/libvirt")
DIRECTORIES = ("/run/sanlock", "/run/wdmd")
UNITS = ("wdmd", "sanlock")
"""Never started again in one boot: a host whose daemon of leases died is the watchdog's."""
SOCKET = "run/sanlock/sanlock.sock"


def build(lab: LabLayout) -> None:
    """Compiles the stand-in, unless it is newer than its source. Raises LabError."""
    if not any(Path(place, "lock-driver", "sanlock.so").exists() for place in PLUGINS):
        raise LabError(
            "libvirt's sanlock plugin is not installed, and the lab's guests hold leases: install libvirt-sanlock"
            " (Debian) or libvirt-daemon-plugin-sanlock (Oracle Linux)."
        )
    library = lab.stand_in
    if library.exists() and library.stat().st_mtime > SOURCE.stat().st_mtime:
        return
    compiler = shutil.which("cc") or "gcc"
    new = library.with_suffix(".new")
    run([compiler, "-shared", "-fPIC", "-O", "-o", str(new), str(SOURCE)], timeout_seconds=60)
    new.replace(library)


def environment(host: HostLayout) -> dict[str, str]:
    return {"LD_PRELOAD": str(host.lab.stand_in)}


def command(host: HostLayout, unit: str, *, watchdog: bool) -> list[str]:
    """`watchdog`: whether wdmd runs on this host, which sanlock then reports to."""
    if unit == "wdmd":
        return ["wdmd", "-D", "-H", "0", "-S", "0", "-w", str(host.watchdog)]
    # The host's name in its leases is the same at every boot, so that it gets its own number back at once.
    own = ["-e", str(host.machine_uuid)]
    return [
        "sanlock",
        "daemon",
        "-D",
        "-w",
        str(int(watchdog)),
        "-U",
        "root",
        "-G",
        "root",
        "-l",
        "0",
        "-h",
        "0",
        *own,
    ]
