"""Which fence agents this machine has, and what they can be told."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from volery.contracts.errors import unavailable
from volery.contracts.fencing import FenceDevice
from volery.fencing import process, rules
from volery.fencing.metadata import AgentInfo, read_metadata

METADATA_SECONDS = 10.0


def agents(path: str = "") -> list[str]:
    """Names of the installed fence agents that may switch power, sorted. `path`: where to look; by default everywhere."""
    found: set[str] = set()
    for place in (path or process.search_path()).split(os.pathsep):
        if place and Path(place).is_dir():
            found.update(entry.name for entry in Path(place).glob("fence_*") if os.access(entry, os.X_OK))
    return sorted(
        name
        for name in found
        if rules.AGENT_NAME.fullmatch(name)
        and not {name} & (rules.NOT_POWER.keys() | rules.SHOWS_SECRETS.keys())
    )


@dataclass(slots=True)
class Catalog:
    """Asks each agent once, and again when its file changed."""

    path: str = ""
    """Where agents are looked for; by default where this machine has programs."""
    known: dict[str, tuple[int, AgentInfo]] = field(default_factory=dict)

    async def describe(self, name: str) -> AgentInfo:
        """Raises Refused: `invalid` for what isn't an agent's name, `unavailable` when it isn't installed here."""
        rules.check_name(name)
        path = process.find_program(name, self.path)
        if path is None:
            meant = rules.near(name, agents(self.path))
            hint = f", or name {' or '.join(meant)}, which is" if meant else ""
            raise unavailable(
                f"{name} isn't installed on this machine: install fence-agents (on Enterprise Linux"
                f" {name.replace('fence_', 'fence-agents-')}){hint}",
                agent=name,
                near=meant,
            )
        changed = os.stat(path).st_mtime_ns
        kept = self.known.get(path)
        if kept is not None and kept[0] == changed:
            return kept[1]
        ended = await process.run([path], stdin=b"action=metadata\n", timeout_seconds=METADATA_SECONDS)
        if ended.exit_code != 0:
            raise unavailable(
                f"{path} can't say what it can be told: {rules.last_words(ended.errors, ()) or 'it gave no reason'}",
                agent=name,
            )
        info = read_metadata(name, path, ended.output.encode())
        self.known[path] = (changed, info)
        return info

    async def check_device(self, device: FenceDevice, secrets: dict[str, str]) -> AgentInfo:
        """The agent of a device that can be used. Raises Refused(invalid, unavailable) with what to change."""
        rules.check_frame(device)
        agent = await self.describe(device.agent)
        rules.check(agent, device, secrets)
        return agent


CATALOG = Catalog()
"""This process's."""
