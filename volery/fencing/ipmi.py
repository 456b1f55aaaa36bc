"""ipmitool without its password in an argument: the agents' go-between, and the question for a machine's GUID."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from volery.contracts.errors import unavailable
from volery.contracts.fencing import FenceDevice
from volery.fencing import process
from volery.fencing.metadata import TRUE, AgentInfo
from volery.fencing.process import Ended
from volery.runtime.clock import monotonic

FLAGS: Mapping[str, str] = {
    "auth": "-A",
    "cipher": "-C",
    "privlvl": "-L",
    "target": "-t",
    "ipmitool_timeout": "-N",
}
"""Of the agents' options, as they hand them to ipmitool."""
GUID = re.compile(r"^System GUID\s*:\s*([0-9a-f-]{32,36})\s*$", re.IGNORECASE | re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Between:
    """A program that stands for ipmitool, and what it must be started with."""

    program: str
    environment: Mapping[str, str]


@cache
def _program() -> bytes:
    source = Path(__file__).with_name("ipmitool.py").read_bytes()
    return f"#!{sys.executable} -SE\n".encode() + source


def _ipmitool() -> str:
    path = process.find_program("ipmitool")
    if path is None:
        raise unavailable("ipmitool isn't installed on this machine: install it", program="ipmitool")
    return path


@contextmanager
def memory_of_ipmitool(password: str, timeout_seconds: float) -> Iterator[Between]:
    """Raises Refused(unavailable) without ipmitool."""
    with ExitStack() as memory:
        file = memory.enter_context(process.memory_file(f"{password}\n".encode())) if password else ""
        program = memory.enter_context(process.memory_file(_program(), executable=True))
        yield Between(
            program,
            {
                "VOLERY_IPMITOOL": _ipmitool(),
                "VOLERY_PASSWORD_FILE": file,
                "VOLERY_DEADLINE": repr(monotonic() + timeout_seconds),
            },
        )


async def ask_guid(agent: AgentInfo, device: FenceDevice, secrets: Mapping[str, str]) -> Ended:
    """What ipmitool answers when it is asked for the machine's GUID, connected as the agent would be."""

    def told(name: str) -> str:
        parameter = agent.parameters.get(name)
        return device.options.get(name) or (parameter.default if parameter else "")

    arguments = [
        _ipmitool(),
        "-I",
        "lanplus" if told("lanplus").lower() in TRUE else "lan",
        "-H",
        device.address,
    ]
    if device.port:
        arguments += ["-p", str(device.port)]
    if device.username:
        arguments += ["-U", device.username]
    for name, flag in FLAGS.items():
        if value := told(name):
            arguments += [flag, value]
    with ExitStack() as memory:
        password = secrets.get("password", "")
        file = memory.enter_context(process.memory_file(f"{password}\n".encode()))
        return await process.run(
            [*arguments, "-f", file, "mc", "guid"], timeout_seconds=device.timeout_seconds
        )
