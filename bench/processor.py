"""Processor time of an installation's processes: it says what something costs whatever else the machine does meanwhile."""

from __future__ import annotations

import os
from pathlib import Path

from bench.memory import family
from bench.world import Installation
from volery.setup import embedded

TICKS = os.sysconf("SC_CLK_TCK")


def processor_seconds(there: Installation) -> dict[str, float]:
    """Part of the installation → what its processes have used until now, user and system, with children that have ended."""
    roots = {"services": there.process}
    for name in ("postgres", "nats"):
        server = embedded.status(there.home, name)
        assert server is not None, f"{name} does not run"
        roots[name] = server.pid
    return {part: sum(used(pid) for pid in family(root)) for part, root in roots.items()}


def used(pid: int) -> float:
    """Of one process; 0 when it has just ended, since its parent counts it then."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    return sum(int(ticks) for ticks in fields[11:15]) / TICKS
