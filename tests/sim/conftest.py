"""For suites of services that are run again on the simulation's database: `configured` differs, they don't."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace

import pytest

from tests.sim.twins import Twins
from tests.support.runtime import OWNERS, settings
from volery.runtime.config import DatabaseConfig
from volery.runtime.programs import Settings
from volery.setup.embedded import Embedded


@pytest.fixture
async def twins(database: DatabaseConfig) -> AsyncIterator[Twins]:
    """Both databases. When the test is over they must have agreed on everything, and hold the same."""
    both = Twins(database)
    yield both
    assert not both.differences, "\n\n".join(both.differences[:5])
    for owner in OWNERS:
        if owner in both.simulated.schemas:
            await both.same_contents(owner)


@pytest.fixture
def configured(nats: Embedded, database: DatabaseConfig, twins: Twins) -> Settings:
    return replace(settings(nats.url, database), outside=twins)
