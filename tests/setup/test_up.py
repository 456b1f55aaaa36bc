"""One installation from nothing to a running VM, killed here and there, stopped, started again, removed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from volery.client import api
from volery.client.session import Session
from volery.client.transport import Client
from volery.contracts.host import HostStatus
from volery.contracts.vm import Vm, VmStatus
from volery.setup import clean, embedded, guest_image, libvirt_daemons, processes, systemd
from volery.setup.home import Home
from volery.setup.processes import ProcessId
from volery.setup.programs import PROGRAMS

pytestmark = pytest.mark.timeout(600)
REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def installation() -> Iterator[Home]:
    """What `make up` made, in a place of its own beside whatever else runs on this machine."""
    cache = Home(REPOSITORY / "build" / "guest")
    cache.path.parent.mkdir(exist_ok=True)
    cache.create()
    guest_image.build(cache)
    with embedded.temporary_home("volery-up-test-") as home:
        shutil.copytree(cache.images, home.images, dirs_exist_ok=True)
        try:
            done = volery_setup(home, "up")
            assert done.returncode == 0, done.stdout + done.stderr
            (home.run / "first-up.txt").write_text(done.stdout)
            yield home
        finally:
            volery_setup(home, "clean")
            home.path.mkdir(exist_ok=True)  # the fixture around this one removes it


def volery_setup(home: Home, verb: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "volery.setup", verb],
        cwd=REPOSITORY,
        env={**os.environ, "VOLERY_HOME": str(home.path), "YES": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


def client(home: Home) -> Client:
    return Client(Session(**json.loads((home.secrets / "cli.json").read_text())))


def first(home: Home) -> Vm:
    with client(home) as volery:
        return volery.find(api.VMS, "first")


def machine(home: Home) -> ProcessId:
    """The QEMU that runs this installation's VM."""
    (uuid,) = clean.look(home).machines
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                command = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if b"qemu" in command.split(b"\0")[0] and uuid.encode() in command:
                process = ProcessId.of(int(entry.name))
                assert process is not None
                return process
    raise AssertionError(f"no QEMU runs {uuid}")


def ours(home: Home) -> dict[str, ProcessId | None]:
    return {
        "nats": embedded.status(home, "nats"),
        "postgres": embedded.status(home, "postgres"),
        **{program.name: program.process(home) for program in PROGRAMS},
    }


def test_a_vm_runs_and_its_guest_tells_its_name_and_address(installation: Home) -> None:
    vm = first(installation)
    assert vm.status is VmStatus.UP
    assert vm.guest.hostname == "first"
    assert any(address.startswith("10.") for address in vm.guest.ip_addresses)
    with client(installation) as volery:
        (host,) = volery.list(api.HOSTS)
    assert host.status is HostStatus.UP
    assert host.vm_count >= 1  # and what other tests run on the libvirtd of this machine


def test_the_password_is_shown_once_and_is_root_s_alone(installation: Home) -> None:
    password = installation.admin_password.read_text().strip()
    assert password in (installation.run / "first-up.txt").read_text()
    assert installation.admin_password.stat().st_mode & 0o777 == 0o600
    assert (installation.secrets / "cli.json").stat().st_mode & 0o777 == 0o600
    assert password not in volery_setup(installation, "up").stdout


def test_the_command_line_is_logged_in_already(installation: Home) -> None:
    listing = subprocess.run(
        [str(REPOSITORY / "bin" / "volery"), "vm", "list", "-o", "json"],
        env={"PATH": os.environ["PATH"], "VOLERY_HOME": str(installation.path)},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert [vm["name"] for vm in json.loads(listing) if not vm["external"]] == ["first"]


def test_up_again_changes_nothing_and_is_quick(installation: Home) -> None:
    before = (ours(installation), machine(installation), first(installation).id)
    started = time.monotonic()
    done = volery_setup(installation, "up")
    assert done.returncode == 0, done.stdout + done.stderr
    assert time.monotonic() - started < 20
    assert (ours(installation), machine(installation), first(installation).id) == before


def test_what_is_killed_comes_back_and_the_machine_runs_on(installation: Home) -> None:
    qemu, before = machine(installation), ours(installation)
    for process in before.values():
        assert process is not None
        os.kill(process.pid, signal.SIGKILL)
    done = volery_setup(installation, "up")
    assert done.returncode == 0, done.stdout + done.stderr
    after = ours(installation)
    assert all(process is not None for process in after.values())
    assert all(after[name] != before[name] for name in before)
    assert qemu.alive()
    assert first(installation).status is VmStatus.UP


def test_down_leaves_the_machine_running_and_up_finds_it(installation: Home) -> None:
    qemu = machine(installation)
    assert volery_setup(installation, "down").returncode == 0
    assert not any(ours(installation).values())
    assert volery_setup(installation, "status").returncode == 1
    assert qemu.alive()
    assert any(libvirt_daemons.answers(path) for path in libvirt_daemons.ANSWERING)
    done = volery_setup(installation, "up")
    assert done.returncode == 0, done.stdout + done.stderr
    assert machine(installation) == qemu
    assert first(installation).status is VmStatus.UP


def test_clean_leaves_nothing_behind(installation: Home) -> None:
    qemu, found, running = machine(installation), clean.look(installation), ours(installation)
    done = volery_setup(installation, "clean")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "first" in done.stdout
    assert not installation.path.exists()
    assert processes.wait_for_exit(qemu, 10)
    assert not any(process and process.alive() for process in running.values())
    links = subprocess.run(["ip", "-br", "link"], capture_output=True, text=True, check=True).stdout
    assert found.installation not in links
    assert not list(systemd.UNITS.glob(f"*{found.installation}*"))
