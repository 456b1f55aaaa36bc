"""dwh as a process of its own."""

from __future__ import annotations

from services.dwh.service import service
from volery.runtime.programs import run

if __name__ == "__main__":
    run(service)
