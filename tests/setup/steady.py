"""A program for the supervisor to keep: says its settings, runs until SIGTERM, or ends at once as told."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
place = Path(os.environ["VOLERY_HOME"])
with (place / "run" / "starts").open("a") as file:
    file.write(f"{os.getpid()} {os.environ.get('VOLERY_TEST_VALUE', '')}\n")
if (place / "run" / "end-at-once").exists():
    sys.exit(3)
signal.sigwait({signal.SIGTERM})
(place / "run" / "ended-in-order").touch()
