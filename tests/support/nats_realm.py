"""A nats-server that trusts a realm, users of it that note what they are refused, and what an agent does."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import nats
import nats.micro
from nats.aio.client import Client
from nats.js.api import StreamConfig

from volery.contracts.ids import new_id
from volery.runtime.connection import connect_options, settle
from volery.runtime.identity import Realm, mint_agent
from volery.runtime.permissions import stream_of
from volery.runtime.signing import Key, format_creds, sign_jwt

ROOT = Path(__file__).parents[2]
SERVER = Path(sys.executable).with_name("nats-server")
PATIENCE_SECONDS = 10.0


class Server:
    """One nats-server that trusts a realm. `start` again keeps its port and, unless told, its store."""

    def __init__(self, directory: Path, realm: Realm) -> None:
        self.directory, self.realm, self.port = directory, realm, -1
        self.cluster_url = ""
        self.process: subprocess.Popen[bytes] | None = None
        directory.mkdir()

    def write_config(self, extra: str = "", jetstream: bool = True) -> None:
        store = f'jetstream: {{ store_dir: "{self.directory}/js", sync_interval: always }}'
        (self.directory / "nats.conf").write_text(
            f'host: 127.0.0.1\nport: {self.port}\nports_file_dir: "{self.directory}"\n'
            f'server_name: "{self.directory.name}"\n{store if jetstream else ""}\n{extra}\n'
            + self.realm.render_nats_conf_identity(self.directory / "resolver")
        )

    def start(self) -> None:
        for old in self.directory.glob("*.ports"):
            old.unlink()
        config = self.directory / "nats.conf"
        config.write_text(config.read_text().replace("port: -1", f"port: {self.port}"))
        with (self.directory / "log").open("ab") as log:
            self.process = subprocess.Popen(
                [SERVER, "-c", self.directory / "nats.conf"], stdout=log, stderr=log
            )
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not (ports := self._ports()):
            assert self.process.poll() is None, (self.directory / "log").read_text()
            assert time.monotonic() < deadline, "nats-server wrote no ports file"
            time.sleep(0.01)  # the server announces its port by a file only
        self.port = int(ports["nats"][0].rpartition(":")[2])
        self.cluster_url = ports["cluster"][0] if ports.get("cluster") else ""

    def _ports(self) -> dict[str, list[str]]:
        for path in self.directory.glob("*.ports"):
            if (text := path.read_text().strip()).endswith("}"):
                return dict(json.loads(text))
        return {}

    @property
    def url(self) -> str:
        return f"nats://127.0.0.1:{self.port}"

    def stop(self) -> None:
        if self.process:
            self.process.kill()
            self.process.wait()


class User:
    """A connection, what the server refused it, and the moment it was closed."""

    def __init__(self, nc: Client) -> None:
        self.nc = nc
        self.errors: list[str] = []
        self.closed, self.reconnected = asyncio.Event(), asyncio.Event()
        self.disconnects = 0

    async def refuses(self, act: Awaitable[Any]) -> bool:
        """Whether the server answered this with a permissions violation, which comes before the pong."""
        self.errors.clear()
        await act
        await settle(self.nc)
        return any("permissions violation" in error for error in self.errors)

    async def publish_refused(self, subject: str) -> bool:
        return await self.refuses(self.nc.publish(subject, b"x"))

    async def subscribe_refused(self, subject: str) -> bool:
        return await self.refuses(self.nc.subscribe(subject))


async def open_user(
    server: Server, creds: Path, name: str, called: str | None = None, at_once: bool = False
) -> User:
    user = User(Client())

    async def on_error(error: Exception) -> None:
        user.errors.append(str(error).lower())

    async def on_closed() -> None:
        user.closed.set()

    async def on_disconnected() -> None:
        user.disconnects += 1

    async def on_reconnected() -> None:
        user.reconnected.set()

    options = connect_options(creds, name, [server.url], name=called, at_once=at_once)
    await user.nc.connect(
        **options,
        error_cb=on_error,
        closed_cb=on_closed,
        disconnected_cb=on_disconnected,
        reconnected_cb=on_reconnected,
    )
    return user


async def is_turned_away(server: Server, creds: Path, name: str) -> bool:
    """Whether the server refuses these credentials at the door (one try)."""
    options = connect_options(creds, name, [server.url])
    del options["reconnect_to_server_handler"]
    options |= {"max_reconnect_attempts": 1, "allow_reconnect": False, "error_cb": ignore}
    try:
        nc = await nats.connect(**options)
    except nats.errors.Error as error:
        return "authorization" in str(error).lower() or "authentication" in str(error).lower()
    await nc.close()
    return False


async def ignore(_error: Exception) -> None:
    return


def enrol(realm: Realm, directory: Path, host_id: str | None = None) -> tuple[str, Path, Key]:
    """What an agent does: make a key, have its public half signed, keep the credentials."""
    host_id = host_id or new_id()
    key = Key.new("user")
    path = directory / f"{host_id}.creds"
    path.write_text(format_creds(mint_agent(realm, host_id, key.public), key.seed))
    return host_id, path, key


async def witness_creds(realm: Realm, directory: Path) -> Path:
    """A user that may do everything in VOLERY, signed by the account itself, to see what arrives."""
    key = Key.new("user")
    account = Key((realm.directory / "keys" / "VOLERY.seed").read_text())
    nats_claims = {"type": "user", "subs": -1, "data": -1, "payload": -1}
    path = directory / "witness.creds"
    token = sign_jwt(account, key.public, "witness", nats_claims, int(time.time()))
    path.write_text(format_creds(token, key.seed))
    return path


@asynccontextmanager
async def streams(owners: tuple[str, ...], connect: Connect) -> AsyncIterator[dict[str, User]]:
    """Each owner's stream, made by the owner; FACTS_HOST by inventory. Removed afterwards."""
    users = {owner: await connect("inventory" if owner == "host" else owner) for owner in owners}
    for owner, user in users.items():
        config = StreamConfig(name=stream_of(owner), subjects=[f"fact.{owner}.>"])
        await user.nc.jetstream().add_stream(config)
    try:
        yield users
    finally:
        for owner, user in users.items():
            await user.nc.jetstream().delete_stream(stream_of(owner))


Connect = Callable[..., Awaitable[User]]
"""Connects a service by name, or the holder of other credentials."""
