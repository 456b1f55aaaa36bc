"""The programs of an installation: what is started, with which environment, in which order."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from volery.setup.home import Home, write_private
from volery.setup.processes import ProcessId, running

REPOSITORY = Path(__file__).parents[2]
_PACKAGES = ("volery", "services", "host_agent", "api_gateway")

# The caller's environment isn't passed on: `make up` from another shell would start everything anew.
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_ALSO_SETTINGS = ("HTTPS_PROXY", "HTTP_PROXY", "NO_PROXY", "TZ")
"""Names in settings.env that are passed on although they aren't Volery's."""


@dataclass(frozen=True)
class Program:
    """A process of ours that the supervisor, or systemd, keeps running."""

    name: str
    title: str
    module: str

    def command(self) -> list[str]:
        return [sys.executable, "-m", self.module]

    def lock(self, home: Home) -> Path:
        return home.run / f"{self.name}.lock"

    def record(self, home: Home) -> Path:
        return home.run / f"{self.name}.json"

    def log(self, home: Home) -> Path:
        return home.log / f"{self.name}.log"

    def ready(self, home: Home) -> bool:
        """Whether it can be started: an agent must be enrolled."""
        return self.module != "host_agent" or is_enrolled(home)

    def process(self, home: Home) -> ProcessId | None:
        """The running process, None when it isn't running."""
        return running(self.lock(home), self.record(home))


CONTROL_PLANE = Program("control-plane", "the control plane", "services")
HOST_AGENT = Program("host-agent", "the host agent", "host_agent")
PROGRAMS: tuple[Program, ...] = (CONTROL_PLANE, HOST_AGENT)
"""In the order in which they are started; they are stopped in the opposite one."""


def is_enrolled(home: Home) -> bool:
    """Whether this machine's agent has its identity."""
    return (home.agent / "identity" / "identity.json").exists()


def has_local_host(home: Home) -> bool:
    """Whether this machine is itself a host: yes, unless VOLERY_SETUP_LOCAL_HOST=no says otherwise."""
    return home.settings().get("VOLERY_SETUP_LOCAL_HOST", "yes") != "no"


def programs_of(home: Home) -> tuple[Program, ...]:
    return PROGRAMS if has_local_host(home) else (CONTROL_PLANE,)


def environment(home: Home, derived: Mapping[str, str]) -> dict[str, str]:
    """A program's whole environment: ours, what set-up found out, over that settings.env.

    VOLERY_SETUP_* is for set-up itself and isn't passed on: programs refuse what they don't know.
    """
    chosen = {
        key: value
        for key, value in home.settings().items()
        if (key.startswith("VOLERY_") and not key.startswith("VOLERY_SETUP_")) or key in _ALSO_SETTINGS
    }
    return {
        "PATH": f"{sys.prefix}/bin:{_PATH}",
        "LANG": "C.UTF-8",
        "PYTHONUNBUFFERED": "1",
        "PYTHONPATH": str(REPOSITORY),
        "VOLERY_HOME": str(home.path),
        **derived,
        **chosen,
    }


@dataclass(frozen=True)
class Decided:
    """What set-up found out and chose, from which the programs' settings follow."""

    bus_url: str
    """The bus as this machine reaches it."""
    sockets: Path
    """Directory of PostgreSQL's socket."""
    gateway_port: int
    public_address: str
    """Name or IP address under which other machines reach this one."""
    hypervisor: str
    """kvm or qemu."""

    @property
    def public_url(self) -> str:
        return f"https://{_bracketed(self.public_address)}:{self.gateway_port}"

    @property
    def public_bus(self) -> str:
        scheme, _, rest = self.bus_url.partition("://")
        return f"{scheme}://{_bracketed(self.public_address)}:{rest.rpartition(':')[2]}"


def _bracketed(address: str) -> str:
    return f"[{address}]" if ":" in address else address


def derived_environment(home: Home, decided: Decided) -> dict[str, str]:
    """What set-up decided, as the programs' settings."""
    return {
        "VOLERY_BUS_SERVERS": decided.bus_url,
        "VOLERY_BUS_CREDENTIALS_DIR": str(home.bus_credentials),
        "VOLERY_BUS_CA_FILE": str(home.ca_certificate),
        "VOLERY_DATABASE_DSN": f"postgresql:///volery?host={quote(str(decided.sockets))}",
        "VOLERY_DATABASE_PASSWORDS_DIR": str(home.postgres_passwords),
        "VOLERY_INVENTORY_SECRETS_DIR": str(home.bus_credentials),
        "VOLERY_INVENTORY_PKI_DIR": str(home.pki),
        "VOLERY_INVENTORY_PUBLIC_URL": decided.public_url,
        "VOLERY_INVENTORY_BUS_PUBLIC_SERVERS": decided.public_bus,
        "VOLERY_INVENTORY_INSTALLATION": home.installation,
        "VOLERY_INVENTORY_ADMIN_PASSWORD_FILE": str(home.admin_password),
        "VOLERY_NETWORK_DEVICE_SUFFIX": home.installation,
        "VOLERY_STORAGE_KEY_FILE": str(home.secrets / "storage.key"),
        "VOLERY_HA_KEY_FILE": str(home.secrets / "ha.key"),
        "VOLERY_GATEWAY_LISTEN": f"0.0.0.0:{decided.gateway_port}",
        "VOLERY_GATEWAY_CERTIFICATE": str(home.pki / "gateway.pem"),
        "VOLERY_GATEWAY_KEY": str(home.pki / "gateway.key"),
        "VOLERY_GATEWAY_CA": str(home.ca_certificate),
        "VOLERY_AGENT_STATE_DIR": str(home.agent),
        "VOLERY_AGENT_CONTROL_PLANE_URL": f"https://127.0.0.1:{decided.gateway_port}",
        "VOLERY_AGENT_DATA_ADDRESS": f"{_bracketed(decided.public_address)}:0",
        "VOLERY_AGENT_DEVICE_SUFFIX": home.installation,
        "VOLERY_AGENT_INSTALLATION": home.installation,
        "VOLERY_AGENT_HYPERVISOR": decided.hypervisor,
    }


def environment_file(home: Home) -> Path:
    return home.run / "environment.json"


def save_environment(home: Home, values: Mapping[str, str]) -> bool:
    """Keeps the programs' environment for whoever starts them next; whether it changed."""
    text = json.dumps(dict(sorted(values.items())), indent=1) + "\n"
    path = environment_file(home)
    if path.exists() and path.read_text() == text:
        return False
    write_private(path, text)
    return True


def load_environment(home: Home) -> dict[str, str]:
    return dict(json.loads(environment_file(home).read_text()))


def fingerprint(home: Home) -> str:
    """Changes when a running program would run differently if it were started again."""
    digest = hashlib.sha256(environment_file(home).read_bytes())
    for package in _PACKAGES:
        for path in sorted((REPOSITORY / package).rglob("*.py")):
            stat = path.stat()
            digest.update(f"{path}:{stat.st_mtime_ns}:{stat.st_size}\n".encode())
    for path in sorted((Path(sys.prefix)).glob(".volery-*")):
        digest.update(path.read_bytes())
    return digest.hexdigest()
