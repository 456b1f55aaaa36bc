"""A gateway in front of scripted services, anew for each test."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.api_gateway.scripted import Deployed, deployed
from volery.setup.embedded import Embedded


@pytest.fixture
async def gateway(nats: Embedded) -> AsyncIterator[Deployed]:
    async with deployed(nats.url) as found:
        yield found
