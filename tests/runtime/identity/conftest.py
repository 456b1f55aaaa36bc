"""One server per module, one of a test's own, and connections that close themselves."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from tests.support.nats_realm import Connect, Server, User, open_user
from volery.runtime.identity import Realm


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    directory = tmp_path_factory.mktemp("identity")
    server = Server(directory / "nats", Realm.create(directory / "bus"))
    server.write_config()
    server.start()
    yield server
    server.stop()


@pytest.fixture
def realm(server: Server) -> Realm:
    return server.realm


@pytest.fixture
def own(tmp_path: Path) -> Iterator[Server]:
    """A server of the test's own, not started yet."""
    server = Server(tmp_path / "nats", Realm.create(tmp_path / "bus"))
    server.write_config()
    yield server
    server.stop()


@pytest.fixture
async def connect(server: Server) -> AsyncIterator[Connect]:
    """Connects a service, or the holder of other credentials, and closes it afterwards."""
    async with AsyncExitStack() as stack:

        async def open_one(name: str, creds: Path | None = None, at: Server = server) -> User:
            user = await open_user(at, creds or at.realm.creds_path(name), name)
            stack.push_async_callback(_closed, user)
            return user

        yield open_one


async def _closed(user: User) -> None:
    with contextlib.suppress(OSError):  # a server that was stopped: nats-py's own client tells of it
        await user.nc.close()
