"""What a host of the tier is started with, without starting one: that takes minutes, and `python -m vm_tier` does it."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import pytest

from host_agent.config import AgentConfig
from lab.errors import LabError
from vm_tier.container import Container
from vm_tier.image import Image
from vm_tier.machine import Machine
from vm_tier.qmp import monitor
from vm_tier.site import AGENT
from volery.setup.programs import REPOSITORY


def machine(number: int, directory: Path) -> Machine:
    return Machine(number, directory, Image(directory / "image"), "10.111.77", "vvt")


def test_two_hosts_are_two_machines(tmp_path: Path) -> None:
    """The same machine id on both would give their bridges one MAC, and no traffic."""
    first, second = (machine(number, tmp_path).command(tmp_path / "disk") for number in (1, 2))
    for option in ("-uuid", "-device", "-pidfile", "-append"):
        assert first[first.index(option) + 1] != second[second.index(option) + 1]
    kernel = first[first.index("-append") + 1].split()
    assert "ip=10.111.77.1::10.111.77.254:255.255.255.0:hv1:eth0:none" in kernel
    assert f"systemd.machine_id={first[first.index('-uuid') + 1].replace('-', '')}" in kernel


def test_a_host_has_a_watchdog_that_its_kernel_can_not_stop_and_the_nice_that_was_asked_for(
    tmp_path: Path,
) -> None:
    command = replace(machine(1, tmp_path), nice=5).command(tmp_path / "disk")
    assert command[:4] == ["nice", "-n", "5", "qemu-system-x86_64"]
    assert command[command.index("-action") + 1] == "watchdog=reset"
    assert "i6300esb" in command


def test_what_a_hosts_qemu_says_is_heard_with_its_time(tmp_path: Path) -> None:
    """A QEMU without a machine, whose monitor is the same."""
    path = tmp_path / "qmp"
    command = ["qemu-system-x86_64", "-machine", "none", "-nodefaults", "-display", "none", "-daemonize"]
    with pytest.raises(LabError, match="no QEMU answers"), monitor(path):
        pass
    subprocess.run([*command, "-qmp", f"unix:{path},server=on,wait=off"], check=True)
    with monitor(path) as qemu:
        with pytest.raises(LabError, match="refused made-up"):
            qemu.ask("made-up")
        assert qemu.ask("query-status")["running"] is True
        before = time.time()
        qemu.ask("system_reset")
        assert before - 1 <= qemu.event("RESET", 10) <= time.time() + 1
        with pytest.raises(LabError, match="said no WATCHDOG within"):
            qemu.event("WATCHDOG", 0.05)
        with contextlib.suppress(LabError):
            qemu.ask("quit")  # its answer comes, or its end before that
        with pytest.raises(LabError, match="it has ended"):
            qemu.event("WATCHDOG", 10)


def test_a_process_that_took_the_number_of_a_dead_host_is_not_killed(tmp_path: Path) -> None:
    one = machine(1, tmp_path)
    assert one.pid is None
    one.pid_file.write_text(str(os.getpid()))
    assert one.pid is None
    one.kill()
    one.pid_file.write_text("")
    assert one.pid is None


def test_a_container_is_started_by_scripts_that_a_shell_can_read(tmp_path: Path) -> None:
    image = Image(tmp_path / "image")
    one = Container(11, tmp_path, image, "10.111.77", "vvt", shared=tmp_path / "shared")
    for script in one.scripts():
        subprocess.run(["sh", "-n", "-c", script], check=True)
        assert "{" not in script
    assert f"{tmp_path}/hc11/root" in one.scripts()[1]
    one.pid_file.write_text(str(os.getpid()))
    assert one.pid is None


def test_the_unit_restarts_the_agent_and_leaves_virtual_machines_alone() -> None:
    text = (REPOSITORY / "deploy" / AGENT).read_text()
    keys = dict(line.split("=", 1) for line in text.splitlines() if "=" in line and not line.startswith("#"))
    assert keys["KillMode"] == "mixed"
    assert keys["Restart"] == "always"
    assert keys["ExecStart"] == "/opt/volery/.venv/bin/python -m host_agent"
    # A stop of the host gives guests their time: the stop time of a unit is 90 s.
    assert "TimeoutStopSec" not in keys
    assert AgentConfig().shutdown_guests_seconds < 90
