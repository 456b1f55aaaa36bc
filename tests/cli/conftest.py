"""The terminal of every test of commands."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.api_gateway.scripted import Script, deployed
from tests.cli.desk import ANSWERS, Desk
from volery.setup.embedded import Embedded


@pytest.fixture
async def desk(nats: Embedded) -> AsyncIterator[Desk]:
    script = Script()
    for call, answer in ANSWERS.items():
        script.on(call, answer)
    async with deployed(nats.url, script) as at:
        yield Desk(at, script.token())
