"""The BMC of one lab host: an address of its own on the lab's switch, and Redfish and IPMI on it.

It lives beside the host, as a real one does: it answers while the host is off, frozen or cut.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path

from lab import cgroups, network
from lab.board import Board, Fault
from lab.commands import MODULE_ENVIRONMENT, PACKAGE_PARENT, python_module, run
from lab.errors import LabError
from lab.host import Host
from lab.ipmi import write_configuration
from lab.layout import BMC_OCTET, HostLayout, LabLayout, address
from lab.processes import ProcessId, identify, is_alive, kill_and_wait
from lab.record import LabRecord, load, write_atomically

START_SECONDS = 15.0


class HostChassis:
    """A lab host as its board sees it."""

    def __init__(self, host: Host) -> None:
        self._host = host

    @property
    def uuid(self) -> str:
        return str(self._host.layout.machine_uuid)

    def is_on(self) -> bool:
        return self._host.boot is not None

    def power_on(self) -> None:
        self._host.power_on(wait=False)

    def power_off(self) -> None:
        self._host.power_off()


class Bmc:
    """State is in files and the kernel; every method looks anew."""

    REDFISH_PORT = 443
    IPMI_PORT = 623

    def __init__(self, layout: HostLayout, record: LabRecord) -> None:
        self._layout = layout
        self._record = record

    @classmethod
    def of(cls, state: Path, name: str, number: int) -> Bmc:
        """For the BMC's own processes. Raises LabError when there is no such lab."""
        lab = LabLayout(state, name)
        record = load(lab.record)
        if record is None:
            raise LabError(f"There is no lab in {state}: make one with `up`.")
        return cls(lab.host(number), record)

    @property
    def address(self) -> str:
        """Where hosts and the machine reach it."""
        return address(self._record.subnet, BMC_OCTET + self._layout.number)

    @property
    def login(self) -> tuple[str, str]:
        return self._record.bmc_user, self._record.bmc_password

    @property
    def certificate(self) -> Path:
        return self._layout.lab.bmc_certificate

    @property
    def directory(self) -> Path:
        return self._layout.directory / "bmc"

    @property
    def board(self) -> Board:
        host = HostChassis(Host(self._layout, self._record))
        return Board(host, self.directory / "fault", self._partner)

    def _partner(self) -> HostChassis:
        """The host after this one, and the first after the last."""
        numbers = self._layout.lab.recorded_hosts()
        later = [number for number in numbers if number > self._layout.number]
        other = (later or numbers)[0]
        return HostChassis(Host(self._layout.lab.host(other), self._record))

    @property
    def fault(self) -> Fault:
        return self.board.fault

    def set_fault(self, fault: Fault) -> None:
        """Breaks it in this way, or mends it. Raises LabError when it can't be broken so."""
        with self._action():
            if fault is Fault.SWAPPED and len(self._layout.lab.recorded_hosts()) < 2:
                raise LabError(
                    "A lab of one host has no other BMC to swap with: add one with `up --hosts 2`."
                )
            if self.fault is Fault.SLOW:
                self._stop()  # what it still thinks about must not happen later
            write_atomically(self.directory / "fault", fault.value)
            self._start()

    def start(self) -> None:
        """Runs it unless it runs, and makes it what its fault says."""
        with self._action():
            self._start()

    def _start(self) -> None:
        self._plug()
        cgroups.create(self._group)
        fault = self.fault
        user, password = self.login
        if fault is Fault.REFUSES:
            password = password[::-1]
        ipmi = self.directory / "ipmi"
        before = self._configured()
        lab = self._layout.lab
        chassis = [
            *("env", f"PYTHONPATH={PACKAGE_PARENT}"),
            *python_module("lab.ipmi", str(lab.state), lab.name, str(self._layout.number)),
        ]
        command = write_configuration(
            ipmi,
            address=(self.address, self.IPMI_PORT),
            login=(user, password),
            machine=self.board.uuid,
            chassis=chassis,
        )
        self._launch("ipmi", command, anew=before != self._configured())
        self._launch(
            "redfish", python_module("lab.redfish", str(lab.state), lab.name, str(self._layout.number))
        )
        self._wait_for_listeners()

    def _stop(self) -> None:
        for pid in cgroups.members(self._group):
            process = identify(pid)
            if process is not None:
                kill_and_wait(process)

    def _configured(self) -> str:
        try:
            return (self.directory / "ipmi" / "lan.conf").read_text()
        except FileNotFoundError:
            return ""

    def _plug(self) -> None:
        """Its address on the switch; without one while it is unreachable. Bound sockets outlive that."""
        place = (f"{self.address}/24", "dev", network.BRIDGE)
        network.ip("address", "replace", *place, namespace=self._layout.lab.switch)

    def _unplug(self) -> None:
        network.run_ignoring_absence(
            "address", "del", f"{self.address}/24", "dev", network.BRIDGE, namespace=self._layout.lab.switch
        )

    @property
    def _group(self) -> str:
        return f"{self._layout.lab.cgroup}/bmc{self._layout.number}"

    def process(self, kind: str) -> ProcessId | None:
        """Its Redfish server (`redfish`) or ipmi_sim (`ipmi`), if that lives."""
        try:
            found = identify(int((self.directory / f"{kind}.pid").read_text()))
        except (FileNotFoundError, ValueError):
            return None
        if found is None or not is_alive(found):
            return None
        # A pid from before a reboot of the machine may belong to anything by now.
        return found if found.pid in cgroups.members(self._group) else None

    def _launch(self, kind: str, command: list[str], *, anew: bool = False) -> None:
        running = self.process(kind)
        if running is not None:
            if not anew:
                return
            kill_and_wait(running)
        lab = self._layout.lab
        run(
            python_module(
                "lab.launch",
                self._group,
                lab.switch,
                str(self.directory),
                f"{kind}.log",
                f"{kind}.pid",
                *command,
            ),
            environment=MODULE_ENVIRONMENT,
        )

    def _wait_for_listeners(self) -> None:
        """Neither announces that it listens: the kernel's table of sockets says it. Then the cable may go."""
        deadline = time.monotonic() + START_SECONDS
        while not self._listens():
            if self.process("redfish") is None or self.process("ipmi") is None or time.monotonic() > deadline:
                raise LabError(
                    f"The BMC of host {self._layout.number} of lab {self._layout.lab.name} did not start: see"
                    f" {self.directory}/redfish.log and ipmi.log."
                )
            time.sleep(0.01)
        if self.fault is Fault.UNREACHABLE:
            self._unplug()

    def _listens(self) -> bool:
        sockets = run(["ip", "netns", "exec", self._layout.lab.switch, "ss", "-Hlntu", f"src {self.address}"])
        return all(f":{port} " in sockets for port in (self.REDFISH_PORT, self.IPMI_PORT))

    @contextlib.contextmanager
    def _action(self) -> Iterator[None]:
        """One change of this BMC at a time, whoever asks."""
        self.directory.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)


def ensure_certificate(lab: LabLayout) -> None:
    """The key and certificate of the lab's BMCs, in one file; nobody vouches for them, as for most BMCs."""
    if lab.bmc_certificate.exists():
        return
    new = lab.bmc_certificate.with_suffix(".new")
    make_certificate(new)
    new.replace(lab.bmc_certificate)


def make_certificate(path: Path) -> None:
    """A self-signed certificate and its key in one PEM file."""
    key = path.with_suffix(".key")
    run(
        [
            *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"),
            *("-nodes", "-days", "3650", "-subj", "/CN=bmc", "-keyout", str(key), "-out", str(path)),
        ]
    )
    path.chmod(0o600)
    path.write_text(path.read_text() + key.read_text())
    key.unlink()
