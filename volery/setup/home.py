"""The state directory: where everything of one installation lies, with which rights."""

from __future__ import annotations

import os
import secrets
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from volery.setup.errors import SetupError

DEFAULT_PATH = Path("/var/lib/volery")

# No hexadecimal digits and no vowels: never part of a MAC address or UUID, nor a word.
_INSTALLATION_LETTERS = "ghjkmnpqrstvwxz"

# (place, mode): libvirt's and PostgreSQL's unprivileged users walk through what is 0755,
# nobody but root opens what is 0700.
_DIRECTORIES: tuple[tuple[str, int], ...] = (
    ("", 0o755),
    ("secrets", 0o700),
    ("secrets/bus", 0o700),
    ("secrets/postgres", 0o700),
    ("pki", 0o755),
    ("nats", 0o700),
    ("postgres", 0o755),
    ("run", 0o755),
    ("log", 0o755),
    ("agent", 0o700),
    ("storage", 0o755),
    ("storage/default", 0o755),
    ("images", 0o755),
)


@dataclass(frozen=True)
class Home:
    """One installation's state directory; every other place is a property of it."""

    path: Path

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] | None = None) -> Home:
        """The directory that `VOLERY_HOME` names, else /var/lib/volery."""
        values = os.environ if environment is None else environment
        return cls(Path(values.get("VOLERY_HOME") or DEFAULT_PATH).absolute())

    @property
    def settings_file(self) -> Path:
        return self.path / "settings.env"

    @property
    def secrets(self) -> Path:
        return self.path / "secrets"

    @property
    def bus_credentials(self) -> Path:
        """One `{service}.creds` per program that speaks on the bus."""
        return self.path / "secrets" / "bus"

    @property
    def postgres_passwords(self) -> Path:
        """One `{service}.password` per database role."""
        return self.path / "secrets" / "postgres"

    @property
    def admin_password(self) -> Path:
        return self.path / "secrets" / "admin.password"

    @property
    def pki(self) -> Path:
        return self.path / "pki"

    @property
    def ca_certificate(self) -> Path:
        return self.path / "pki" / "ca.pem"

    @property
    def nats(self) -> Path:
        return self.path / "nats"

    @property
    def postgres(self) -> Path:
        return self.path / "postgres"

    @property
    def run(self) -> Path:
        return self.path / "run"

    @property
    def log(self) -> Path:
        return self.path / "log"

    @property
    def agent(self) -> Path:
        return self.path / "agent"

    @property
    def storage(self) -> Path:
        """The default storage domain: a directory of disk images."""
        return self.path / "storage" / "default"

    @property
    def images(self) -> Path:
        return self.path / "images"

    def create(self) -> None:
        """Makes every directory with its mode, and the installation's suffix; repeats do nothing.

        Raises SetupError when the place can't be made.
        """
        for place, mode in _DIRECTORIES:
            directory = self.path / place if place else self.path
            try:
                directory.mkdir(parents=not place, exist_ok=True)
                if directory.stat().st_mode & 0o7777 != mode:
                    directory.chmod(mode)
            except OSError as error:
                raise SetupError(
                    f"The state directory {directory} can't be made: {error.strerror}. Set"
                    " VOLERY_HOME to a directory that this user may write, or run as root."
                ) from error
        if "VOLERY_SETUP_INSTALLATION" not in self.settings():
            name = "".join(secrets.choice(_INSTALLATION_LETTERS) for _ in range(5))
            self.change_settings({"VOLERY_SETUP_INSTALLATION": name})

    @property
    def installation(self) -> str:
        """Five letters that tell this installation's units, bridges and domains from others'."""
        value = self.settings().get("VOLERY_SETUP_INSTALLATION")
        if value is None:
            raise SetupError(f"{self.path} isn't a Volery installation: run `make up` first.")
        return value

    def settings(self) -> dict[str, str]:
        """What settings.env says; empty when there is none."""
        try:
            text = self.settings_file.read_text()
        except FileNotFoundError:
            return {}
        return parse_settings(text, self.settings_file)

    def change_settings(self, changes: Mapping[str, str]) -> dict[str, str]:
        """Writes these settings over the stored ones, keeps comments and order; returns all."""
        old = self.settings_file.read_text() if self.settings_file.exists() else _SETTINGS_HEAD
        stored = parse_settings(old, self.settings_file)
        if all(stored.get(key) == value for key, value in changes.items()):
            return stored
        left = dict(changes)
        lines: list[str] = []
        for line in old.splitlines():
            key = line.partition("=")[0].strip()
            lines.append(f"{key}={_quote(left.pop(key))}" if key in left else line)
        lines += [f"{key}={_quote(value)}" for key, value in left.items()]
        write_private(self.settings_file, "\n".join(lines) + "\n")
        return stored | dict(changes)

    def secret(self, path: Path, *, size_bytes: int = 24) -> str:
        """The secret kept in that file; made, random and URL-safe, when there is none."""
        if path.exists():
            return path.read_text().strip()
        value = secrets.token_urlsafe(size_bytes)
        write_private(path, value + "\n")
        return value


_SETTINGS_HEAD = """\
# Settings of this Volery installation, read by `make up` and by every program it starts.
# A line is NAME=value. Change one, then run `make up` again.
"""


def parse_settings(text: str, origin: Path) -> dict[str, str]:
    """NAME=value lines as a dict; `#` starts a comment line, double quotes are taken off.

    Raises SetupError, with the line's number, when a line is neither.
    """
    values: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), 1):
        content = line.strip()
        if not content or content.startswith("#"):
            continue
        key, separator, value = content.partition("=")
        if not separator or not key.strip().isidentifier():
            raise SetupError(f"{origin}, line {number}: expected NAME=value, found {content!r}.")
        value = value.strip()
        if len(value) >= 2 and value[0] == value[-1] == '"':
            value = value[1:-1].replace('\\"', '"').replace("\\\\", "\\")
        values[key.strip()] = value
    return values


def _quote(value: str) -> str:
    if "\n" in value:
        raise SetupError("A setting can't hold a line break.")
    if value and all(c.isalnum() or c in "_-./:,@+%" for c in value):
        return value
    return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'


def write_private(path: Path, content: str | bytes, *, mode: int = 0o600) -> None:
    """Replaces the file whole and durably: a reader sees the old or the new content, root's only.

    The mode holds from the first byte on.
    """
    data = content.encode() if isinstance(content, str) else content
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fchmod(file.fileno(), mode)
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    parent = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(parent)
    finally:
        os.close(parent)
