"""Becomes one server or program of the installation, holding its lock: how systemd starts them."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from volery.setup import embedded, servers
from volery.setup.errors import SetupError
from volery.setup.home import Home
from volery.setup.processes import become
from volery.setup.programs import PROGRAMS, load_environment


def main(name: str, home: Home) -> None:
    """Doesn't return for a server or program; `renew` renews certificates and returns."""
    if name == "renew":
        servers.renew_certificates(home)
        return
    if name in ("nats", "postgres"):
        launch = servers.launch_nats(home) if name == "nats" else embedded.launch_postgres(home)
        become(
            launch.arguments,
            lock=launch.lock,
            record=launch.record,
            user=launch.user,
            group=launch.group,
            when_alone=launch.forget_predecessor,
        )
    program = {p.name: p for p in PROGRAMS}.get(name)
    if program is None:
        raise SetupError(f"{name} is none of Volery's programs.")
    become(
        program.command(),
        lock=program.lock(home),
        record=program.record(home),
        environment=load_environment(home),
    )


if __name__ == "__main__":
    os.chdir(Path("/"))
    try:
        main(sys.argv[1], Home.from_environment())
    except SetupError as error:
        sys.exit(f"Volery: {error}")
