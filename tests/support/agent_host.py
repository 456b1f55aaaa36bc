"""A host agent's parts without its bus: a host with a state directory of its own, and an order being run."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from host_agent.action import Host, Running
from host_agent.config import AgentConfig
from host_agent.tickets import Tickets
from volery.contracts.ids import new_id
from volery.setup.processes import free_port


def make_host(
    state_dir: Path,
    hypervisor: object = None,
    reachable: Callable[[], Awaitable[bool]] | None = None,
    **settings: Any,
) -> Host:
    """A host whose orders about storage and networks can be run; `hypervisor` only where an order needs it."""
    config = AgentConfig(state_dir=str(state_dir), installation="test01", **settings)
    extra = {} if reachable is None else {"control_plane_reachable": reachable}
    return Host(config, cast("Any", hypervisor), Tickets(), new_id(), **extra)


def running(object_id: str = "", *, resumed: bool = False, told: list[float] | None = None) -> Running:
    """An order being run; its progress goes into `told`."""

    def progress(percent: float, details: dict[str, Any]) -> None:
        if told is not None:
            told.append(percent)

    return Running(
        order_id=new_id(),
        owner="storage",
        object_id=object_id or new_id(),
        epoch=0,
        order_seq=1,
        deadline_seconds=300,
        resumed=resumed,
        progress=progress,
    )


@dataclass
class IscsiTarget:
    """A private tgtd on a control port of its own, with one target; its LUNs are files."""

    directory: Path
    user: str = ""
    password: str = ""
    iqn: str = "iqn.2026-11.test.volery:disks"
    port: int = field(default_factory=free_port)
    address: str = "127.0.0.1"
    server: subprocess.Popen[bytes] | None = None

    @property
    def environment(self) -> dict[str, str]:
        """The control socket: a private path, where TCP port numbers would clash with another test's."""
        return {**os.environ, "TGT_IPC_SOCKET": str(self.directory / "tgtd.sock")}

    @property
    def portal(self) -> str:
        return f"{self.address}:{self.port}"

    def _tgtadm(self, mode: str, op: str, *arguments: str) -> None:
        subprocess.run(
            ["tgtadm", "--lld", "iscsi", "--mode", mode, "--op", op, *arguments],
            check=True,
            capture_output=True,
            env=self.environment,
        )

    def add_target(self, tid: int, iqn: str, user: str = "", password: str = "") -> None:
        self._tgtadm("target", "new", "--tid", str(tid), "-T", iqn)
        self._tgtadm("target", "bind", "--tid", str(tid), "-I", "ALL")
        if user:
            self._tgtadm("account", "new", "--user", user, "--password", password)
            self._tgtadm("account", "bind", "--tid", str(tid), "--user", user)

    def add_lun(self, number: int, size_bytes: int, tid: int = 1, *, thin: bool = False) -> Path:
        """`thin`: it says which of its blocks are zeros, and unmaps."""
        path = self.directory / f"target{tid}-lun{number}.img"
        with path.open("wb") as file:
            file.truncate(size_bytes)
        place = ("--tid", str(tid), "--lun", str(number))
        self._tgtadm("logicalunit", "new", *place, "-b", str(path))
        if thin:
            self._tgtadm("logicalunit", "update", *place, "--params", "thin_provisioning=1")
        return path

    def remove_lun(self, number: int, tid: int = 1) -> None:
        self._tgtadm("logicalunit", "delete", "--tid", str(tid), "--lun", str(number))

    def kill(self) -> None:
        """It answers nobody any more."""
        assert self.server is not None
        self.server.kill()
        self.server.wait()


@contextlib.contextmanager
def iscsi_target(
    directory: Path, user: str = "", password: str = "", address: str = "127.0.0.1"
) -> Iterator[IscsiTarget]:
    """Started, and ended with everything that it made."""
    target = IscsiTarget(directory, user, password, address=address)
    log = directory / "tgtd.log"
    with log.open("wb") as output:
        server = subprocess.Popen(
            ["tgtd", "-f", "--iscsi", f"portal={target.portal}"],
            stdout=output,
            stderr=output,
            env=target.environment,
        )
    target.server = server
    try:
        _wait_for_port((target.address, target.port), server, log)
        target.add_target(1, target.iqn, user, password)
        yield target
    finally:
        server.kill()
        server.wait()


def _wait_for_port(place: tuple[str, int], server: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 10
    while True:
        if server.poll() is not None or time.monotonic() > deadline:
            raise AssertionError(f"tgtd does not listen: {log.read_text()}")
        with contextlib.suppress(OSError), socket.create_connection(place):
            return
        time.sleep(0.02)


def qemu_img(*arguments: str | Path) -> str:
    assert shutil.which("qemu-img")
    return subprocess.run(
        ["qemu-img", *map(str, arguments)], check=True, capture_output=True, text=True
    ).stdout


def qemu_io(path: str | Path, *commands: str, format: str = "qcow2") -> str:
    arguments = [item for command in commands for item in ("-c", command)]
    return subprocess.run(
        ["qemu-io", "-f", format, *arguments, str(path)], check=True, capture_output=True, text=True
    ).stdout
