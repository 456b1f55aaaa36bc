"""One agent per state directory: two would both obey every order."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Final

from volery.runtime.clock import monotonic

LOCK_SECONDS: Final = 5.0


class AlreadyRunning(Exception):
    """Another agent uses the state directory."""


@contextlib.asynccontextmanager
async def alone(state_dir: Path) -> AsyncIterator[None]:
    """Holds the state directory for this process. A former one gets a moment to end."""
    state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    with (state_dir / "agent.lock").open("w") as lock:
        deadline = monotonic() + LOCK_SECONDS
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if monotonic() > deadline:
                    raise AlreadyRunning(
                        f"another agent runs with {state_dir}: end it, or give this one a state directory of its own"
                    ) from None
                await asyncio.sleep(0.1)
        yield
