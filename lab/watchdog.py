"""The watchdog of a lab host, which it can't cheat: a process outside of it that kills its process 1.

`python -S -m lab.watchdog STATE NAME NUMBER`, with the host's pid 1 (on the machine) as a line on standard input.
It lives for one boot. The host pets it through a FIFO; once petted it fires FIRE_SECONDS after the last pet, also
while every process of the host is stopped. A `V` disarms it, as with the kernel's own.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

from lab import cgroups, stalls
from lab.commands import MODULE_ENVIRONMENT, python_module
from lab.layout import HostLayout, LabLayout

FIRE_SECONDS = 60.0
"""What wdmd sets every device to."""
IDENTITY = "Volery lab watchdog"
DISARM = b"V"


def start(host: HostLayout) -> subprocess.Popen[bytes]:
    """For the boot that begins now; the host's pid 1 is given to its standard input when it is known."""
    with contextlib.suppress(FileExistsError):
        os.mkfifo(host.watchdog, 0o600)
    device = host.watchdog_class / "watchdog0"
    device.mkdir(parents=True, exist_ok=True)
    (device / "identity").write_text(f"{IDENTITY}\n")
    (device / "state").write_text("inactive\n")
    with (host.log / "watchdog.log").open("ab") as output:
        return subprocess.Popen(
            python_module("lab.watchdog", str(host.lab.state), host.lab.name, str(host.number)),
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=output,
            env={**os.environ, **MODULE_ENVIRONMENT},
            start_new_session=True,
        )


def main(arguments: list[str]) -> int:
    state, name, number = arguments
    host = LabLayout(Path(state), name).host(int(number))
    group = f"{host.lab.cgroup}/watchdogs"
    cgroups.create(group)
    cgroups.join(group)
    pets = os.open(host.watchdog, os.O_RDWR | os.O_NONBLOCK)  # also for writing, so that it never ends
    line = sys.stdin.readline().strip()
    if not line:
        return 0  # the host did not boot
    try:
        init = os.pidfd_open(int(line))
    except ProcessLookupError:
        return 0
    watch(pets, init, host)
    return 0


def watch(pets: int, init: int, host: HostLayout) -> None:
    """Until the host has ended, by its watchdog or otherwise."""
    poll = select.poll()
    poll.register(pets, select.POLLIN)
    poll.register(init, select.POLLIN)
    deadline: float | None = None
    while True:
        left = None if deadline is None else max(0.0, deadline - time.monotonic()) * 1000
        ready = [descriptor for descriptor, _ in poll.poll(left)]
        if init in ready:
            return
        if pets in ready:
            disarmed = os.read(pets, 4096).endswith(DISARM)
            deadline = None if disarmed else time.monotonic() + FIRE_SECONDS
            say(host, "inactive" if disarmed else "active")
        elif deadline is not None and time.monotonic() >= deadline:
            print(
                f"{time.time():.3f} host {host.number} was not petted for {FIRE_SECONDS:g} s: reset",
                flush=True,
            )
            signal.pidfd_send_signal(init, signal.SIGKILL)
            stalls.end(host.cgroup)
            return


def say(host: HostLayout, state: str) -> None:
    """What the kernel would show in /sys/class/watchdog."""
    file = host.watchdog_class / "watchdog0" / "state"
    if file.read_text().strip() != state:
        file.write_text(f"{state}\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
