"""`python -m bench.profiled FILE`: the scheduler under Python's own profiler, which writes FILE when it ends."""

from __future__ import annotations

import cProfile
import sys
from pathlib import Path

from services.scheduler.service import service
from volery.runtime.programs import run

if __name__ == "__main__":
    profile = cProfile.Profile()
    try:
        profile.runcall(run, service)
    finally:
        profile.dump_stats(Path(sys.argv[1]))
