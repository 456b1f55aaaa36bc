"""`make down`: stops Volery's own processes, programs before servers; virtual machines run on."""

from __future__ import annotations

from volery.setup import processes, supervisor, systemd
from volery.setup.console import Output
from volery.setup.home import Home


def down(home: Home, output: Output) -> None:
    """Stops what runs of this installation. Neither libvirt nor any QEMU is touched."""
    if not home.settings_file.exists():
        output.say(f"Nothing is set up in {home.path}.")
        return
    with (
        processes.exclusive(home.run / "up.lock", timeout_seconds=60),
        output.step("Stopping Volery; virtual machines run on") as step,
    ):
        if systemd.in_charge():
            systemd.stop(home)
            systemd.disable(home)
        # Also without systemd's knowledge something may run, such as a server that `up` started.
        step.result = "" if supervisor.stop(home) or systemd.in_charge() else "nothing was running"
