"""Fixtures shared by all tests: real servers, started once, cheap to have anew."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from tests.support.runtime import Databases, settings
from volery.runtime.config import DatabaseConfig
from volery.runtime.programs import Settings
from volery.setup.embedded import Embedded, temporary_nats, temporary_postgres

os.environ.pop("COLUMNS", None)  # a worker has 80 there, and tables would be as narrow
HERE = Path(__file__).parent
WHOLE_MACHINE = (
    "compose",  # its engine, images and cache
    "docs",  # an installation
    "faults",  # storms over control planes and labs
    "lab",  # a lab, its watchdogs against the clock
    "setup/test_clean.py",  # the machine's libvirtd and packet filter
    "setup/test_guest_image.py",  # build/guest
    "setup/test_up.py",  # an installation; build/guest
    "sim/test_simulation.py",  # two processes of its own
    "system",  # labs
)
"""What wants the machine for itself, or shares what there is once in it: never two of these at the same time."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What a worker of `-n 2 --dist loadgroup` runs in a row: the tests of a file, or all that want the machine."""
    for item in items:
        file = item.path.relative_to(HERE)
        whole = any(file.is_relative_to(place) for place in WHOLE_MACHINE)
        item.add_marker(pytest.mark.xdist_group("machine" if whole else str(file)))


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
