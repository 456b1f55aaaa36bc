"""`make status`: what of an installation runs, and where it is reached."""

from __future__ import annotations

from volery.setup import embedded, supervisor, systemd
from volery.setup.console import Output
from volery.setup.home import Home
from volery.setup.processes import ProcessId
from volery.setup.programs import PROGRAMS


def status(home: Home, output: Output) -> bool:
    """Prints a line for each process; whether all of them run."""
    if not home.settings_file.exists():
        output.say(f"Nothing is set up in {home.path}. Run `make up`.")
        return False
    rows: list[tuple[str, ProcessId | None]] = [
        ("PostgreSQL", embedded.status(home, "postgres")),
        ("NATS", embedded.status(home, "nats")),
        *((program.title, program.process(home)) for program in PROGRAMS),
    ]
    if not systemd.in_charge():
        rows.append(("the supervisor", supervisor.process(home)))
    for title, process in rows:
        output.say(f"{title:18} {f'process {process.pid}' if process else 'not running'}")
    port = home.settings().get("VOLERY_SETUP_GATEWAY_PORT")
    if port:
        output.say(f"{'address':18} https://127.0.0.1:{port}")
    output.say(f"{'logs':18} {home.log if not systemd.in_charge() else 'journalctl -u volery-*'}")
    return all(process for _, process in rows)
