"""A guest of the small image under plain QEMU (TCG), spoken to through its guest agent."""

from __future__ import annotations

import base64
import json
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

BOOT_SECONDS = 90.0


class Guest:
    """A running QEMU with its guest agent's and its monitor's socket."""

    def __init__(self, process: subprocess.Popen[bytes], place: Path) -> None:
        self.process = process
        self.place = place
        self._agent = _connect(place / "agent.sock")
        self._answers = self._agent.makefile("rb")

    def wait_for_agent(self) -> None:
        """Until the agent answers: a question asked before it runs is kept and answered then."""
        self._agent.settimeout(BOOT_SECONDS)
        assert self.ask("guest-sync", id=4711) == 4711

    def ask(self, command: str, **arguments: Any) -> Any:
        self._send(command, **arguments)
        try:
            answer = json.loads(self._answers.readline())
        except TimeoutError:
            raise AssertionError((self.place / "console.log").read_text(errors="replace")) from None
        assert "return" in answer, answer
        return answer["return"]

    def _send(self, command: str, **arguments: Any) -> None:
        message = {"execute": command, "arguments": arguments}
        self._agent.sendall(json.dumps(message).encode() + b"\n")

    def run(self, script: str) -> str:
        """What the script prints, run by the guest's shell."""
        started = self.ask("guest-exec", path="/bin/sh", arg=["-c", script], **{"capture-output": True})
        while not (status := self.ask("guest-exec-status", pid=started["pid"]))["exited"]:
            time.sleep(0.02)
        return base64.b64decode(status.get("out-data", "")).decode()

    def shut_down(self) -> None:
        self._send("guest-shutdown")
        self.process.wait(30)

    def press_power_button(self) -> None:
        with _connect(self.place / "monitor.sock") as monitor:
            lines = monitor.makefile("rb")
            lines.readline()
            for command in ("qmp_capabilities", "system_powerdown"):
                monitor.sendall(json.dumps({"execute": command}).encode() + b"\n")
                lines.readline()
            self.process.wait(30)


def _connect(path: Path) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX)
    deadline = time.monotonic() + 10
    while True:
        try:
            connection.connect(str(path))
        except (FileNotFoundError, ConnectionRefusedError):
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)
        else:
            return connection


@contextmanager
def booted(place: Path, arguments: Sequence[str], memory_mb: int = 128) -> Iterator[Guest]:
    process = subprocess.Popen(
        [
            "qemu-system-x86_64", "-machine", "q35,accel=tcg", "-cpu", "max", "-m", str(memory_mb),
            "-display", "none", "-nodefaults", "-no-user-config",
            "-serial", f"file:{place / 'console.log'}",
            "-qmp", f"unix:{place / 'monitor.sock'},server=on,wait=off",
            "-device", "virtio-serial-pci",
            "-chardev", f"socket,id=agent,path={place / 'agent.sock'},server=on,wait=off",
            "-device", "virtserialport,chardev=agent,name=org.qemu.guest_agent.0",
            "-netdev", "user,id=net", "-device", "virtio-net-pci,netdev=net,romfile=",
            "-smbios", "type=1,manufacturer=Volery,product=Volery,serial=vm-id,family=web-1",
            *arguments,
        ]
    )  # fmt: skip
    try:
        guest = Guest(process, place)
        guest.wait_for_agent()
        yield guest
    finally:
        process.kill()
        process.wait()
