"""A nats-server of its own for a test: no identities, JetStream in a throw-away directory, a free port."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path


class PlainBus:
    """`start` and `kill` as often as you like: the port and the store stay."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.port = -1
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"nats://127.0.0.1:{self.port}"

    @property
    def stopped(self) -> bool:
        return self._process is None

    def start(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        for left in self.directory.glob("*.ports"):
            left.unlink()
        program = Path(sys.executable).parent / "nats-server"
        self._process = subprocess.Popen(
            [
                program,
                "-a",
                "127.0.0.1",
                "-p",
                str(self.port),
                "-js",
                "-sd",
                str(self.directory / "store"),
                "--ports_file_dir",
                str(self.directory),
            ],
            stdout=subprocess.DEVNULL,
            stderr=(self.directory / "log").open("ab"),
        )
        deadline = time.monotonic() + 20
        while not (found := list(self.directory.glob("*.ports"))) or not found[0].read_text().endswith("}"):
            assert self._process.poll() is None, (self.directory / "log").read_text()
            assert time.monotonic() < deadline, "nats-server did not start within 20 s"
            time.sleep(0.01)
        self.port = int(json.loads(found[0].read_text())["nats"][0].rsplit(":", 1)[1])

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def pause(self) -> None:
        assert self._process is not None
        os.kill(self._process.pid, signal.SIGSTOP)

    def resume(self) -> None:
        assert self._process is not None
        os.kill(self._process.pid, signal.SIGCONT)

    def forget(self) -> None:
        """Loses the whole store, as a new disk would."""
        self.kill()
        shutil.rmtree(self.directory / "store", ignore_errors=True)
        self.start()
