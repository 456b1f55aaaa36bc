"""Machines for fence agents to switch: a chassis in a directory, a real Redfish endpoint and OpenIPMI's ipmi_sim on it.

Run as a program it is what ipmi_sim asks about its chassis.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from lab.board import Board, Fault
from lab.ipmi import answer, write_configuration
from lab.redfish import SYSTEM, RedfishServer
from volery.contracts.fencing import FenceDevice

ROOT = Path(__file__).resolve().parents[2]
LOGIN = ("admin", "s3cret%7:w'x")
"""With what a URL, a shell or a line could stumble over; 16 bytes without blanks is all that ipmi_sim takes."""


class FileChassis:
    """A machine that is on when its file says so."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)

    @property
    def uuid(self) -> str:
        return str(uuid.uuid5(uuid.NAMESPACE_URL, self.directory.name))

    def is_on(self) -> bool:
        return (self.directory / "on").exists()

    def power_on(self) -> None:
        (self.directory / "on").touch()
        self._note("on")

    def power_off(self) -> None:
        (self.directory / "on").unlink(missing_ok=True)
        self._note("off")

    def _note(self, word: str) -> None:
        with (self.directory / "switched").open("a") as file:
            file.write(f"{word}\n")

    @property
    def switched(self) -> list[str]:
        """What was done to it."""
        try:
            return (self.directory / "switched").read_text().split()
        except FileNotFoundError:
            return []


class Machine:
    """A chassis, its board, and how to reach it."""

    def __init__(self, directory: Path, other: Path) -> None:
        self.chassis = FileChassis(directory)
        self.fault_file = directory / "fault"
        self.board = Board(self.chassis, self.fault_file, lambda: FileChassis(other))
        self.secrets = {"password": LOGIN[1]}
        self.device: FenceDevice

    def breaks(self, fault: Fault) -> None:
        self.fault_file.write_text(fault.value)


@contextlib.contextmanager
def redfish(directory: Path, certificate: Path) -> Iterator[Machine]:
    machine = Machine(directory / "one", directory / "two")
    server = RedfishServer(("127.0.0.1", 0), machine.board, LOGIN, certificate)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    machine.device = FenceDevice(
        agent="fence_redfish",
        address="127.0.0.1",
        port=server.server_port,
        username=LOGIN[0],
        timeout_seconds=60,
        options={"ssl_insecure": "1", "systems_uri": SYSTEM, "power_wait": "0"},
    )
    try:
        yield machine
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextlib.contextmanager
def ipmi(directory: Path) -> Iterator[Machine]:
    machine = Machine(directory / "one", directory / "two")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = write_configuration(
        directory / "ipmi",
        address=("127.0.0.1", port),
        login=LOGIN,
        machine=machine.chassis.uuid,
        chassis=[
            *("env", f"PYTHONPATH={ROOT}", sys.executable, "-m", "tests.support.machines"),
            str(machine.chassis.directory),
        ],
    )
    with (directory / "ipmi.log").open("w") as log:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    machine.device = FenceDevice(
        agent="fence_ipmilan",
        address="127.0.0.1",
        port=port,
        username=LOGIN[0],
        timeout_seconds=60,
        options={"power_wait": "0"},
    )
    try:
        _wait_for_port(process, port)
        yield machine
    finally:
        process.kill()
        process.wait()


KINDS = ("redfish", "ipmi")


@contextlib.contextmanager
def switched_on(kind: str, directory: Path, certificate: Path) -> Iterator[Machine]:
    """A machine of this kind that is on, and of which nothing was asked yet."""
    with redfish(directory, certificate) if kind == "redfish" else ipmi(directory) as one:
        one.chassis.power_on()
        (one.chassis.directory / "switched").unlink()
        yield one


def _wait_for_port(process: subprocess.Popen[bytes], port: int) -> None:
    """ipmi_sim announces nothing; the kernel's table of sockets says that it listens."""
    deadline = time.monotonic() + 20
    while f":{port:04X} 00000000:0000 07" not in Path("/proc/net/udp").read_text():
        assert process.poll() is None, "ipmi_sim ended"
        assert time.monotonic() < deadline, "ipmi_sim does not listen"
        time.sleep(0.01)


def processes() -> dict[int, bytes]:
    """Every process's arguments and environment together, as anybody with the right may read them."""
    found = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError):
                parts = [Path("/proc", entry, name).read_bytes() for name in ("cmdline", "environ")]
                found[int(entry)] = b"\0".join(parts)
    return found


def main(arguments: list[str]) -> int:
    directory, _, *asked = arguments
    machine = Machine(Path(directory), Path(directory).with_name("two"))
    for line in answer(machine.board, asked):
        print(line)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
