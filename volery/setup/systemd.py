"""The installation as systemd units, named after it, so that several live on one machine."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from volery.setup import embedded
from volery.setup.errors import SetupError
from volery.setup.home import Home, write_private
from volery.setup.programs import CONTROL_PLANE, HOST_AGENT, REPOSITORY, fingerprint, programs_of

UNITS = Path("/etc/systemd/system")
RUNNING = Path("/run/systemd/system")
_START_SECONDS = 60.0


@dataclass(frozen=True)
class _Unit:
    """One service. It is started through `volery.setup.exec`, which takes the same locks as ever."""

    name: str
    description: str
    after: tuple[str, ...] = ()
    service: Mapping[str, str] | None = None
    needs: str = ""
    """Isn't started before this file, within the state directory, exists."""


_UNITS = (
    _Unit(
        "postgres",
        "database",
        # SIGINT is PostgreSQL's "fast" shutdown; the server itself ends its children.
        service={"KillSignal": "SIGINT", "KillMode": "mixed", "TimeoutStopSec": "120",
                 "OOMScoreAdjust": "-900"},
    ),
    _Unit("nats", "message bus", service={"TimeoutStopSec": "45", "LimitNOFILE": "65536"}),
    _Unit(CONTROL_PLANE.name, "control plane", ("postgres", "nats"), {"LimitNOFILE": "65536"}),
    # Virtual machines are libvirt's children, never the agent's: stopping it doesn't touch them.
    _Unit(HOST_AGENT.name, "host agent", (), {"KillMode": "mixed", "LimitNOFILE": "65536"},
          needs="agent/identity/identity.json"),
)  # fmt: skip


def in_charge() -> bool:
    """Whether systemd runs this machine."""
    return RUNNING.is_dir()


def target(home: Home) -> str:
    return f"volery-{home.installation}.target"


def unit(home: Home, name: str) -> str:
    return f"volery-{home.installation}-{name}.service"


def render(home: Home) -> dict[str, str]:
    """File name → text of every unit of this installation."""
    files = {
        target(home): f"[Unit]\nDescription=Volery in {home.path}\n\n[Install]\nWantedBy=multi-user.target\n",
        f"volery-{home.installation}-renew.service": _text(
            home, _Unit("renew", "renewal of certificates"), oneshot=True
        ),
        f"volery-{home.installation}-renew.timer": "[Unit]\n"
        f"Description=Volery: daily renewal of certificates ({home.path})\n"
        f"PartOf={target(home)}\n"
        "\n[Timer]\nOnCalendar=daily\nRandomizedDelaySec=1h\nPersistent=true\n"
        f"\n[Install]\nWantedBy={target(home)}\n",
    }
    kept = {"nats", "postgres", *(program.name for program in programs_of(home))}
    files |= {unit(home, each.name): _text(home, each) for each in _UNITS if each.name in kept}
    return files


def _text(home: Home, each: _Unit, *, oneshot: bool = False) -> str:
    after = ["network-online.target", "libvirtd.service", "virtqemud.service"]
    after += [unit(home, name) for name in each.after]
    service = {
        "Type": "oneshot" if oneshot else "exec",
        "ExecStart": f"{_escaped(sys.executable)} -m volery.setup.exec {each.name}",
        "Environment": f'"VOLERY_HOME={_escaped(str(home.path))}" "PYTHONPATH={_escaped(str(REPOSITORY))}"',
        "WorkingDirectory": "/",
        **({} if oneshot else {"Restart": "always", "RestartSec": "1"}),
        **(each.service or {}),
    }
    wants = "".join(f"Wants={unit(home, name)}\n" for name in each.after)
    if each.needs:
        wants += f"ConditionPathExists={_escaped(str(home.path / each.needs))}\n"
    return (
        "# Written by Volery's set-up; changes are overwritten. Use drop-ins.\n"
        f"[Unit]\nDescription=Volery: {each.description} ({_escaped(str(home.path))})\n"
        f"PartOf={target(home)}\nWants=network-online.target\nAfter={' '.join(after)}\n{wants}"
        "StartLimitIntervalSec=0\n"
        "\n[Service]\n" + "".join(f"{key}={value}\n" for key, value in service.items())
        + ("" if oneshot else f"\n[Install]\nWantedBy={target(home)}\n")
    )  # fmt: skip


def _escaped(text: str) -> str:
    return text.replace("%", "%%").replace("\\", "\\\\").replace('"', '\\"')


def last_lines(home: Home, name: str, count: int = 8) -> list[str]:
    """The newest lines that a unit logged."""
    told = subprocess.run(
        ["journalctl", "-u", unit(home, name), "-n", str(count), "-o", "cat", "--no-pager"],
        capture_output=True,
        text=True,
        check=False,
    )
    return told.stdout.splitlines()


def start_servers(home: Home) -> None:
    """Bus and database, as units; they hold their directories afterwards, so that they are adopted."""
    _install(home)
    names: tuple[embedded.Name, ...] = ("postgres", "nats")
    _systemctl("start", *(unit(home, name) for name in names))
    deadline = time.monotonic() + _START_SECONDS
    for name in names:
        while embedded.status(home, name) is None:
            if time.monotonic() > deadline:
                raise SetupError(
                    f"the unit {unit(home, name)} doesn't come up; `journalctl -u {unit(home, name)}` says why."
                )
            time.sleep(0.05)


def start_programs(home: Home) -> None:
    """Control plane and agent; those that would now run differently are started anew."""
    started_as = home.run / "programs.started-as"
    now = fingerprint(home)
    changed = not started_as.exists() or started_as.read_text() != now
    names = [unit(home, program.name) for program in programs_of(home) if program.ready(home)]
    _systemctl("enable", "--now", target(home), f"volery-{home.installation}-renew.timer")
    _systemctl("restart" if changed else "start", *names)
    started_as.write_text(now)


def _install(home: Home) -> None:
    changed = False
    for name, text in render(home).items():
        path = UNITS / name
        if not path.exists() or path.read_text() != text:
            write_private(path, text, mode=0o644)
            changed = True
    if changed:
        _systemctl("daemon-reload")
    _systemctl("enable", *(n for n in render(home) if n.endswith((".service", ".timer", ".target"))
                           and not n.endswith("-renew.service")))  # fmt: skip


def stop(home: Home) -> None:
    """Stops every unit of the installation, programs before servers."""
    if not (UNITS / target(home)).exists():
        return
    for name in (HOST_AGENT.name, CONTROL_PLANE.name, "nats", "postgres"):
        if (UNITS / unit(home, name)).exists():
            _systemctl("stop", unit(home, name))
    _systemctl("stop", f"volery-{home.installation}-renew.timer", target(home))


def disable(home: Home) -> None:
    """After `make down` a reboot doesn't start it again."""
    if (UNITS / target(home)).exists():
        _systemctl("disable", *(n for n in render(home) if not n.endswith("-renew.service")))


def remove(home: Home) -> None:
    """Stops the units and removes their files."""
    stop(home)
    disable(home)
    found = [UNITS / name for name in render(home) if (UNITS / name).exists()]
    for path in found:
        path.unlink()
    if found:
        _systemctl("daemon-reload")


def _systemctl(*arguments: str) -> None:
    done = subprocess.run(["systemctl", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SetupError(
            f"`systemctl {' '.join(arguments)}` failed: {done.stderr.strip()} `journalctl -xe` says more."
        )
