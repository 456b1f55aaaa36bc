"""The lab's iSCSI storage: one tgtd on the switch's own address, one target with CHAP, sparse LUNs."""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path

from lab import cgroups, network
from lab.commands import MODULE_ENVIRONMENT, python_module, run
from lab.errors import LabError
from lab.layout import ISCSI_PORT, STORAGE_OCTET, LabLayout, address
from lab.processes import ProcessId, identify, is_alive, kill_and_wait, send
from lab.record import LabRecord

TARGET_ID = "1"
LUN_LINE = re.compile(r"^ +LUN: (\d+)$", re.MULTILINE)


class IscsiTarget:
    """State is tgtd's and the lab's record; every method looks at both anew."""

    def __init__(self, lab: LabLayout, record: LabRecord) -> None:
        self._lab = lab
        self._record = record

    @property
    def name(self) -> str:
        """The target's IQN."""
        return self._lab.target_name

    @property
    def host(self) -> str:
        return address(self._record.subnet, STORAGE_OCTET)

    @property
    def portal(self) -> str:
        return f"{self.host}:{ISCSI_PORT}"

    @property
    def user(self) -> str:
        return self._record.chap_user

    @property
    def password(self) -> str:
        return self._record.chap_password

    @property
    def luns(self) -> dict[int, int]:
        """Sizes in bytes by LUN number. Number 0 is tgtd's controller and not listed."""
        return dict(self._record.luns)

    def url(self, lun: int | None = None, *, authenticated: bool = True) -> str:
        """What libiscsi's tools and QEMU take: `iscsi://user%password@host:port/iqn/lun`."""
        credentials = f"{self.user}%{self.password}@" if authenticated else ""
        path = "" if lun is None else f"/{self.name}/{lun}"
        return f"iscsi://{credentials}{self.portal}{path}"

    def backing_file(self, lun: int) -> Path:
        return self._lab.iscsi / f"lun-{lun}.raw"

    @property
    def process(self) -> ProcessId | None:
        """tgtd, if it lives."""
        try:
            found = identify(int((self._lab.iscsi / "tgtd.pid").read_text()))
        except (FileNotFoundError, ValueError):
            return None
        if found is None or not is_alive(found):
            return None
        # A pid from before a reboot of the machine may belong to anything by now.
        return found if found.pid in cgroups.members(f"{self._lab.cgroup}/storage") else None

    def start(self) -> None:
        """Starts tgtd unless it runs, and makes its target and LUNs what the record says."""
        self._lab.iscsi.mkdir(parents=True, exist_ok=True)
        if self.process is None:
            self._launch()
        if f"Target {TARGET_ID}:" not in self._tgtadm("target", "show"):
            self._tgtadm("target", "new", "--tid", TARGET_ID, "-T", self.name)
        self._bind_account()
        present = self._present_luns()
        for number, size_bytes in self._record.luns.items():
            if number not in present:
                self._offer(number, size_bytes)

    def _launch(self) -> None:
        group = f"{self._lab.cgroup}/storage"
        cgroups.create(group)
        for stale in self._lab.iscsi.glob("control.*"):
            stale.unlink()
        command = ["tgtd", "--foreground", "--nr_iothreads", "2", "--iscsi", f"portal={self.portal}"]
        run(
            python_module(
                "lab.launch", group, self._lab.switch, str(self._lab.iscsi),
                "tgtd.log", "tgtd.pid", *command,
            ),
            environment={**MODULE_ENVIRONMENT, **self._environment},
        )  # fmt: skip
        deadline = time.monotonic() + 10
        while True:  # tgtd has no way to say that it listens
            try:
                self._tgtadm("target", "show")
                return
            except LabError as error:
                if self.process is None or time.monotonic() > deadline:
                    log = self._lab.iscsi / "tgtd.log"
                    raise LabError(
                        f"The iSCSI target of lab {self._lab.name} did not start on {self.portal}: "
                        f"{error} Its log is {log}."
                    ) from error
            time.sleep(0.02)

    @property
    def _environment(self) -> dict[str, str]:
        # Relative to the working directory: a socket's path may have 108 bytes, a state's more.
        return {"TGT_IPC_SOCKET": "control"}

    def _tgtadm(self, mode: str, action: str, *options: str) -> str:
        return run(
            ["tgtadm", "--lld", "iscsi", "--mode", mode, "--op", action, *options],
            environment=self._environment,
            directory=self._lab.iscsi,
        )

    def _bind_account(self) -> None:
        shown = self._tgtadm("target", "show")
        if self.user not in self._tgtadm("account", "show").split():
            self._tgtadm("account", "new", "--user", self.user, "--password", self.password)
        if self.user not in shown.partition("Account information:")[2].split():
            self._tgtadm("account", "bind", "--tid", TARGET_ID, "--user", self.user)
        if "ALL" not in shown.partition("ACL information:")[2].split():
            self._tgtadm("target", "bind", "--tid", TARGET_ID, "-I", "ALL")

    def _present_luns(self) -> set[int]:
        return {int(number) for number in LUN_LINE.findall(self._tgtadm("target", "show"))}

    def _offer(self, number: int, size_bytes: int) -> None:
        path = self.backing_file(number)
        with path.open("ab") as file:
            if file.tell() < size_bytes:
                os.truncate(path, size_bytes)
        place = ("--tid", TARGET_ID, "--lun", str(number))
        self._tgtadm("logicalunit", "new", *place, "-b", str(path))
        # It says which blocks are zeros and unmaps them, so that looking and wiping take no time.
        self._tgtadm("logicalunit", "update", *place, "--params", "thin_provisioning=1")

    def add_lun(self, size_bytes: int) -> int:
        """A new sparse LUN. Returns its number."""
        if size_bytes <= 0 or size_bytes % 512:
            raise LabError(f"A LUN of {size_bytes} bytes can't be made: give a multiple of 512.")
        number = max(self._record.luns, default=0) + 1
        self._record.luns[number] = size_bytes
        self._record.save(self._lab.record)
        self._offer(number, size_bytes)
        return number

    def remove_lun(self, number: int) -> None:
        """Withdraws the LUN and deletes its data. Harmless when it's gone."""
        if self._record.luns.pop(number, None) is None:
            return
        self._record.save(self._lab.record)
        if number in self._present_luns():
            self._tgtadm("logicalunit", "delete", "--tid", TARGET_ID, "--lun", str(number))
        self.backing_file(number).unlink(missing_ok=True)

    def kill(self) -> None:
        """kill -9: the array is gone until `start`. What it had written stays."""
        process = self.process
        if process is not None:
            kill_and_wait(process)

    def freeze(self) -> None:
        """The array answers nothing, but connections stay open."""
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self._signal(signal.SIGCONT)

    def _signal(self, number: signal.Signals) -> None:
        process = self.process
        if process is None or not send(process.pid, number):
            raise LabError(f"The iSCSI target of lab {self._lab.name} does not run: start it with `up`.")

    def cut(self) -> None:
        """Takes the portal's address off the network, for every host at once."""
        network.run_ignoring_absence(
            "address", "del", f"{self.host}/24", "dev", network.BRIDGE, namespace=self._lab.switch
        )

    def join(self) -> None:
        network.ip(
            "address", "replace", f"{self.host}/24", "dev", network.BRIDGE,
            namespace=self._lab.switch,
        )  # fmt: skip
