"""One service as a process of its own (`python -m services.{name}`) against the test's servers, to be killed at will."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from volery.runtime.programs import Settings
from volery.runtime.service import Service

ROOT = Path(__file__).parents[2]


@dataclass
class ServiceProcess:
    """`environment` is added to what every service needs."""

    name: str
    configured: Settings
    environment: dict[str, str] = field(default_factory=dict)
    process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        bus, database = self.configured.bus, self.configured.database
        settings = {
            "VOLERY_BUS_SERVERS": bus.servers,
            "VOLERY_BUS_REQUIRE_SYNC_ALWAYS": "false",
            "VOLERY_DATABASE_DSN": database.dsn,
            "VOLERY_DATABASE_PASSWORDS_DIR": database.passwords_dir,
            "VOLERY_DATABASE_POOL_MAX": "4",
            "VOLERY_TELEMETRY_LOG_LEVEL": "WARNING",
        }
        kept = {name: value for name, value in os.environ.items() if not name.startswith("VOLERY_")}
        self.process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            f"services.{self.name}",
            env=kept | settings | self.environment,
            cwd=ROOT,
        )

    async def kill(self) -> None:
        """As kill -9."""
        if self.process is not None and self.process.returncode is None:
            self.process.kill()
            await self.process.wait()

    async def restart(self) -> None:
        await self.kill()
        await self.start()


@asynccontextmanager
async def service_process(
    name: str, configured: Settings, **environment: str
) -> AsyncIterator[ServiceProcess]:
    process = ServiceProcess(name, configured, environment)
    await process.start()
    try:
        yield process
    finally:
        await process.kill()


def captured(service: Service, found: list[Any]) -> Service:
    """The service, whose opened state is put into `found`: to run now what it does every few minutes."""
    opening = service.open

    @asynccontextmanager
    async def opened(core: Any) -> AsyncIterator[Any]:
        async with opening(core) as made:
            found.append(made)
            yield made

    service.open = opened
    return service
