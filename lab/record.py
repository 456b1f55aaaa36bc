"""What was decided when a lab was made, as JSON in its state directory; written whole or not at all."""

from __future__ import annotations

import json
import os
import secrets
from dataclasses import asdict, dataclass, field
from pathlib import Path

from lab.errors import LabError

DEFAULT_LUN_SIZES_BYTES = (8 << 30, 8 << 30, 8 << 30, 8 << 30)


@dataclass
class LabRecord:
    """The lab's own settings. `luns` maps a LUN's number to its size in bytes."""

    name: str
    subnet: str
    kvm: bool = False
    agent_command: list[str] | None = None
    chap_user: str = "volery"
    chap_password: str = field(default_factory=lambda: secrets.token_hex(8))
    bmc_user: str = "admin"
    bmc_password: str = field(default_factory=lambda: secrets.token_hex(8))
    luns: dict[int, int] = field(default_factory=lambda: dict(enumerate(DEFAULT_LUN_SIZES_BYTES, start=1)))

    def save(self, path: Path) -> None:
        write_atomically(path, json.dumps(asdict(self), indent=2))


def load(path: Path) -> LabRecord | None:
    """None when the lab was never made. Raises LabError when the file is not ours."""
    try:
        raw = json.loads(path.read_text())
        raw["luns"] = {int(number): int(size) for number, size in raw["luns"].items()}
        return LabRecord(**raw)
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise LabError(
            f"{path} is not the record of a lab ({error}): remove the lab with `down --state "
            f"{path.parent}` after deleting that file, then make it anew."
        ) from error


def write_atomically(path: Path, text: str, mode: int = 0o600) -> None:
    """A crash leaves the old content or the new, never a part."""
    new = path.with_name(f"{path.name}.new")
    descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
    with os.fdopen(descriptor, "w") as file:
        file.write(text)
    new.replace(path)
