"""`make clean`: removes what an installation made on this machine, after asking: machines, networks, units, state."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree

from volery.setup import down, postgres_server, systemd
from volery.setup.console import Output, confirm
from volery.setup.errors import SetupError
from volery.setup.home import Home

METADATA = "{https://volery.dev/domain/1}domain"
_MADE_KINDS = frozenset({"bridge", "vxlan", "veth", "vlan", "dummy", "tun"})
_VIRSH = ("virsh", "-q", "-c", "qemu:///system")


@dataclass(frozen=True)
class Found:
    """What `clean` would remove."""

    path: Path
    installation: str
    machines: dict[str, str] = field(default_factory=dict)
    """libvirt UUID → name."""
    networks: tuple[str, ...] = ()
    links: tuple[str, ...] = ()
    tables: tuple[tuple[str, str], ...] = ()
    """nftables (family, name)."""
    units: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        shown = (
            ("virtual machine", sorted(self.machines.values())),
            ("virtual network", self.networks),
            ("network device", self.links),
            ("packet filter table", [name for _, name in self.tables]),
            ("systemd unit", self.units),
        )
        found = [f"{kind} {name}" for kind, names in shown for name in names]
        return [*found, f"directory {self.path}, with all disks, the database and the secrets in it"]


def clean(home: Home, output: Output, *, yes: bool, ask: Callable[[str], bool] = confirm) -> bool:
    """Removes the installation; False when the person didn't agree, and nothing was removed."""
    if not home.path.exists() or not home.settings_file.exists():
        output.say(f"Nothing is set up in {home.path}.")
        return True
    _refuse_strange_place(home)
    found = look(home)
    output.say("This removes, for good:")
    for line in found.lines():
        output.say(f"  {line}")
    if not yes and not ask("Remove all of it?"):
        output.say("Nothing was removed. `YES=1 make clean` answers the question.")
        return False
    down.down(home, output)
    with output.step("Removing virtual machines and their networks") as step:
        _remove_machines(found)
        _remove_networks(found)
        step.result = f"{len(found.machines)} machines"
    with output.step(f"Removing {home.path}"):
        if systemd.in_charge():
            systemd.remove(home)
        sockets = postgres_server.socket_directory(home.run)
        shutil.rmtree(home.path)
        if not sockets.is_relative_to(home.path):
            shutil.rmtree(sockets, ignore_errors=True)
    return True


def _refuse_strange_place(home: Home) -> None:
    """Only a directory that `up` made is removed whole."""
    expected = {"settings.env", "secrets", "pki", "nats", "postgres", "run", "log", "agent", "storage",
                "images"}  # fmt: skip
    known = expected | {"lab", "lost+found"}
    strangers = sorted(p.name for p in home.path.iterdir() if p.name not in known)
    if strangers:
        raise SetupError(
            f"{home.path} also holds {', '.join(strangers)}, which Volery didn't put there. Move that"
            " away, then run `make clean` again."
        )
    if os.path.ismount(home.path):
        raise SetupError(f"{home.path} is a mount point. Empty it by hand, or unmount it first.")


def look(home: Home) -> Found:
    """Everything on this machine that carries the installation's id."""
    installation = home.installation
    return Found(
        home.path,
        installation,
        _machines(installation),
        tuple(_networks(installation)),
        tuple(_links(installation)),
        tuple(_tables(installation)),
        tuple(sorted(n for n in systemd.render(home) if (systemd.UNITS / n).exists())),
    )


def _machines(installation: str) -> dict[str, str]:
    found = {}
    for uuid in _lines(*_VIRSH, "list", "--all", "--uuid"):
        xml = _output(*_VIRSH, "dumpxml", uuid)
        if xml is None:
            continue  # it ended meanwhile
        root = ElementTree.fromstring(xml)  # noqa: S314 - written by libvirt
        mark = root.find(f"metadata/{METADATA}")
        if mark is not None and mark.get("installation") == installation:
            found[uuid] = root.findtext("name") or uuid
    return found


def _networks(installation: str) -> list[str]:
    """libvirt's networks whose name or bridge ends with the installation."""
    found = []
    for name in _lines(*_VIRSH, "net-list", "--all", "--name"):
        xml = _output(*_VIRSH, "net-dumpxml", name)
        bridge = ElementTree.fromstring(xml).find("bridge") if xml else None  # noqa: S314
        names = (name, bridge.get("name", "") if bridge is not None else "")
        if any(each.endswith(installation) for each in names):
            found.append(name)
    return found


def _links(installation: str) -> list[str]:
    text = _output("ip", "-d", "-j", "link", "show")
    links = json.loads(text) if text else []
    return [
        link["ifname"]
        for link in links
        if link["ifname"].endswith(installation) and link.get("linkinfo", {}).get("info_kind") in _MADE_KINDS
    ]


def _tables(installation: str) -> list[tuple[str, str]]:
    found = []
    for line in _lines("nft", "list", "tables"):
        match = re.fullmatch(r"table (\w+) (\S+)", line)
        if match and installation in match[2]:
            found.append((match[1], match[2]))
    return found


def _remove_machines(found: Found) -> None:
    for uuid in found.machines:
        _output(*_VIRSH, "destroy", uuid)
        _output(*_VIRSH, "undefine", uuid, "--managed-save", "--snapshots-metadata",
                "--checkpoints-metadata", "--nvram")  # fmt: skip
    left = _machines(found.installation)
    if left:
        raise SetupError(
            f"these virtual machines don't end: {', '.join(sorted(left.values()))}. Look at them with"
            " `virsh list --all`; nothing else was removed."
        )


def _remove_networks(found: Found) -> None:
    for name in found.networks:
        _output(*_VIRSH, "net-destroy", name)
        _output(*_VIRSH, "net-undefine", name)
    for family, name in found.tables:
        _output("nft", "delete", "table", family, name)
    for name in found.links:
        _output("ip", "link", "delete", name)


def _lines(*command: str) -> list[str]:
    text = _output(*command)
    return [line.strip() for line in (text or "").splitlines() if line.strip()]


def _output(*command: str) -> str | None:
    """What the program printed; None when it is missing or failed."""
    return _run(command)


def _run(command: Sequence[str]) -> str | None:
    try:
        done = subprocess.run(list(command), capture_output=True, text=True, check=False, timeout=60)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None
