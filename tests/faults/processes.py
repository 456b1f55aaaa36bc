"""The control plane as processes of its own, one for each service, so that each can be killed and paused."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.support.plane import ROOT, Plane
from volery.setup import processes

MODULES = {
    "inventory": "services.inventory",
    "scheduler": "services.scheduler",
    "storage": "services.storage",
    "network": "services.network",
    "ha": "services.ha",
    "dwh": "services.dwh",
    "gateway": "api_gateway",
}


@dataclass
class ServiceProcess:
    """One service as a process of its own, restarted by whoever killed it."""

    name: str
    environ: Mapping[str, str]
    log: Path
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with self.log.open("ab") as log:
            command = [sys.executable, "-m", MODULES[self.name]]
            self.process = subprocess.Popen(command, env=self.environ, stdout=log, stderr=log, cwd=ROOT)

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def signal(self, number: signal.Signals) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def stop(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.terminate()
            try:
                self.process.wait(15)
            except subprocess.TimeoutExpired:
                self.kill()


def service_processes(plane: Plane) -> tuple[dict[str, ServiceProcess], str]:
    """Every service and the gateway, not started; and the gateway's URL."""
    home, bus, database = plane.home, plane.settings.bus, plane.settings.database
    port = processes.free_port()
    home.secret(home.admin_password, size_bytes=15)
    environ = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": str(ROOT),
        "VOLERY_BUS_SERVERS": bus.servers,
        "VOLERY_BUS_CREDENTIALS_DIR": bus.credentials_dir,
        "VOLERY_BUS_CA_FILE": bus.ca_file,
        "VOLERY_DATABASE_DSN": database.dsn,
        "VOLERY_DATABASE_PASSWORDS_DIR": database.passwords_dir,
        "VOLERY_INVENTORY_ADMIN_PASSWORD_FILE": str(home.admin_password),
        "VOLERY_STORAGE_KEY_FILE": str(home.secrets / "storage.key"),
        "VOLERY_HA_KEY_FILE": str(home.secrets / "ha.key"),
        "VOLERY_GATEWAY_LISTEN": f"127.0.0.1:{port}",
        "VOLERY_GATEWAY_CERTIFICATE": str(home.pki / "gateway.pem"),
        "VOLERY_GATEWAY_KEY": str(home.pki / "gateway.key"),
        "VOLERY_GATEWAY_CA": str(home.ca_certificate),
        **plane.environ,
    }
    made = {name: ServiceProcess(name, environ, home.path / f"{name}.log") for name in MODULES}
    return made, f"https://127.0.0.1:{port}"


def kill_child(pid: int) -> None:
    """kill -9, and no zombie that others would take for alive."""
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
