"""What a host's QEMU says of it, with the time at which it happened: its monitor's events (QMP)."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lab.errors import LabError


@dataclass
class Monitor:
    """One connection; QEMU has one client at a time."""

    connection: socket.socket
    _unread: bytes = b""
    _events: list[dict[str, Any]] = field(default_factory=list)

    def ask(self, command: str) -> Any:
        """The answer. Raises LabError."""
        self.connection.settimeout(30)
        self.connection.sendall(json.dumps({"execute": command}).encode() + b"\n")
        while True:
            said = self._read()
            if "return" in said:
                return said["return"]
            if "error" in said:
                raise LabError(f"QEMU refused {command}: {said['error'].get('desc')}")
            self._events.append(said)

    def event(self, name: str, seconds: float) -> float:
        """When the next event of this name happened, by this machine's clock (seconds since 1970). Raises LabError."""
        deadline = time.monotonic() + seconds
        while True:
            while self._events:
                said = self._events.pop(0)
                if said.get("event") == name:
                    at = said["timestamp"]
                    return float(at["seconds"] + at["microseconds"] / 1e6)
            self.connection.settimeout(max(0.01, deadline - time.monotonic()))
            try:
                self._events.append(self._read())
            except TimeoutError as error:
                raise LabError(f"QEMU said no {name} within {seconds:g} s") from error

    def _read(self) -> dict[str, Any]:
        while b"\n" not in self._unread:
            try:
                piece = self.connection.recv(65536)
            except ConnectionError:
                piece = b""
            if not piece:
                raise LabError("QEMU closed its monitor: it has ended")
            self._unread += piece
        line, _, self._unread = self._unread.partition(b"\n")
        said: dict[str, Any] = json.loads(line)
        return said


@contextmanager
def monitor(path: Path) -> Iterator[Monitor]:
    """The host's QEMU, from now on. Raises LabError when there is none."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(30)
        try:
            connection.connect(str(path))
        except OSError as error:
            raise LabError(f"no QEMU answers at {path}: {error.strerror}") from error
        opened = Monitor(connection)
        opened._read()  # its greeting
        opened.ask("qmp_capabilities")
        yield opened
