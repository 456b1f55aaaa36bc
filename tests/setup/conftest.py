"""A throw-away state directory for each test of set-up."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from volery.setup import embedded
from volery.setup.home import Home


@pytest.fixture
def home() -> Iterator[Home]:
    """Under /tmp and open to all: PostgreSQL's unprivileged user can't enter pytest's own place."""
    with embedded.temporary_home("volery-setup-test-") as made:
        try:
            yield made
        finally:
            embedded.stop(made, "nats")
            embedded.stop(made, "postgres")
