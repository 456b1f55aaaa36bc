"""One NATS server in its container: runs it, passes signals on, and lets it read a renewed certificate."""

from __future__ import annotations

import asyncio
import signal
import sys
from pathlib import Path

from volery.setup import nats_server

DIRECTORY = Path("/var/lib/volery/nats")
LOOK_SECONDS = 30.0


def stamp(directory: Path) -> list[int]:
    """Changes when a certificate or the configuration was written anew."""
    watched = sorted(path for path in directory.iterdir() if path.suffix in (".pem", ".key", ".conf"))
    return [path.stat().st_mtime_ns for path in watched]


async def run(directory: Path, look_seconds: float = LOOK_SECONDS) -> int:
    """Until the server ends, which SIGTERM makes it do; returns its exit code."""
    loaded = stamp(directory)
    server = await asyncio.create_subprocess_exec(*nats_server.command(directory))
    loop = asyncio.get_running_loop()
    # SIGINT and SIGTERM both let it write everything and end.
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, server.send_signal, signal.SIGTERM)
    ending = asyncio.create_task(server.wait())
    while not (await asyncio.wait({ending}, timeout=look_seconds))[0]:
        if (now := stamp(directory)) != loaded:
            loaded = now
            server.send_signal(signal.SIGHUP)
    return ending.result()


if __name__ == "__main__":
    sys.exit(asyncio.run(run(DIRECTORY)))
