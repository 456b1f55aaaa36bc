"""The scheduler as a process of its own."""

from __future__ import annotations

from services.scheduler.service import service
from volery.runtime.programs import run

if __name__ == "__main__":
    run(service)
