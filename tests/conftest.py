"""Fixtures shared by all tests: real servers, started once, cheap to have anew."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
from hypothesis import settings as properties

from tests.support.runtime import Databases, settings
from tests.support.workers import ByRoom, longest_first
from volery.runtime.config import DatabaseConfig
from volery.runtime.programs import Settings
from volery.setup.embedded import Embedded, temporary_nats, temporary_postgres

os.environ.pop("COLUMNS", None)  # a worker has 80 there, and tables would be as narrow


# How long an example takes says more about who else uses the machine.
properties.register_profile("shared", deadline=None)
properties.load_profile("shared")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: longest_first(item.nodeid))


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> ByRoom:
    return ByRoom(config, log)


@pytest.fixture
def nats() -> Iterator[Embedded]:
    """A NATS server of this test's own, every write synced."""
    with temporary_nats() as server:
        yield server


@pytest.fixture(scope="session")
def postgres() -> Iterator[Embedded]:
    with temporary_postgres() as server:
        yield server


@pytest.fixture
async def database(postgres: Embedded) -> AsyncIterator[DatabaseConfig]:
    """A fresh database with every service's role and schema."""
    databases = Databases(postgres)
    if not databases.passwords.exists():
        await databases.make_template()
    config = await databases.fresh()
    yield config
    await databases.drop(config)


@pytest.fixture
def configured(nats: Embedded, database: DatabaseConfig) -> Settings:
    """What `run` would have read from the environment."""
    return settings(nats.url, database)
