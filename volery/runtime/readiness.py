"""Whether the bus keeps what it acknowledges: asked of every server before a program begins its work.

NATS acknowledges a message before it is on the disk unless `sync_interval` is `always`; older versions lose
messages even then. A program that is told to insist on it (the default) waits until the servers are right.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import nats.errors
from nats.aio.client import Client

from volery.runtime.bus import connect
from volery.runtime.clock import monotonic
from volery.runtime.config import BusConfig

log = logging.getLogger(__name__)

MINIMUM_VERSION: Final = (2, 15, 1)
CLUSTER_REPLICAS: Final = 3
ANSWERS_SECONDS: Final = 1.0
AGAIN_SECONDS: Final = 2.0
PING: Final = "$SYS.REQ.SERVER.PING.JSZ"


@dataclass(frozen=True, slots=True)
class ServerState:
    """What one NATS server says of itself."""

    name: str
    version: str
    jetstream: bool
    sync_always: bool
    """Every stored message is on the disk before it is acknowledged."""
    cluster_size: int
    """Servers of its JetStream cluster, the absent ones included; 0 when it is alone."""


def read_state(answer: bytes) -> ServerState:
    """An answer to `$SYS.REQ.SERVER.PING.JSZ`. Raises ValueError for something else."""
    try:
        fields: dict[str, Any] = json.loads(answer)
        server, data = fields["server"], fields.get("data") or {}
        config = data.get("config") or {}
        return ServerState(
            name=str(server["name"]),
            version=str(server["ver"]),
            jetstream=bool(config) and not data.get("disabled", False),
            sync_always=config.get("sync_always") is True,
            cluster_size=int((data.get("meta_cluster") or {}).get("cluster_size", 0)),
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"not what a NATS server says of its JetStream: {error!r}") from error


def problems(states: Sequence[ServerState], replicas: int) -> list[str]:
    """Why these servers can't be relied on when every stream is kept `replicas` times; empty: they can.

    A cluster may miss a minority of its servers: that is what it is for.
    """
    if not states:
        return ["no NATS server said how it stores: check that the servers run"]
    found = [problem for state in states for problem in _problems_of(state)]
    size = max(state.cluster_size for state in states)
    present = sum(state.jetstream for state in states)
    if size > 1 and replicas != CLUSTER_REPLICAS:
        found.append(
            f"the servers are a cluster of {size} but streams are kept {replicas} times: set"
            f" VOLERY_BUS_REPLICAS={CLUSTER_REPLICAS}"
        )
    if size <= 1 and replicas > 1:
        found.append(
            f"streams shall be kept {replicas} times but the server {states[0].name} is alone: set"
            " VOLERY_BUS_REPLICAS=1, or let it join its cluster"
        )
    if present < size // 2 + 1:
        found.append(f"{present} of {size} NATS servers answered, which is no majority: start the others")
    return found


def _problems_of(state: ServerState) -> list[str]:
    found = []
    if _version(state.version) < MINIMUM_VERSION:
        least = ".".join(map(str, MINIMUM_VERSION))
        found.append(f"NATS server {state.name} is version {state.version}: upgrade it to {least} or newer")
    if not state.jetstream:
        found.append(f"NATS server {state.name} runs without JetStream: add a `jetstream` section")
    elif not state.sync_always:
        found.append(
            f"NATS server {state.name} acknowledges messages before they are on its disk: set"
            " `sync_interval: always` in its `jetstream` section"
        )
    return found


def _version(text: str) -> tuple[int, ...]:
    match = re.match(r"(\d+)\.(\d+)\.(\d+)", text)
    return tuple(int(part) for part in match.groups()) if match else (0,)


async def ask(system: Client, timeout_seconds: float = ANSWERS_SECONDS) -> list[ServerState]:
    """Every server's state; `system` is connected as `sys`. Returns as soon as all of a cluster answered."""
    inbox = system.new_inbox()
    answers = await system.subscribe(inbox)
    deadline = monotonic() + timeout_seconds
    found: dict[str, ServerState] = {}
    try:
        await system.publish(PING, b"", reply=inbox)
        while (left := deadline - monotonic()) > 0:
            state = read_state((await answers.next_msg(left)).data)
            found[state.name] = state
            if len(found) >= max(1, *(s.cluster_size for s in found.values())):
                break
    except nats.errors.TimeoutError:
        pass
    finally:
        await answers.unsubscribe()
    return sorted(found.values(), key=lambda s: s.name)


async def until_synced(config: BusConfig, stop: asyncio.Event) -> None:
    """Comes back when the servers keep what they acknowledge, or on `stop`; says meanwhile what is wrong.

    A program that has no `sys.creds` can't ask and goes on at once: another one does.
    """
    if not may_ask(config):
        return
    asking = asyncio.create_task(_ask_until_right(config))
    stopping = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait((asking, stopping), return_when=asyncio.FIRST_COMPLETED)
        if asking.done():
            asking.result()
    finally:
        asking.cancel()
        stopping.cancel()
        await asyncio.gather(asking, stopping, return_exceptions=True)


async def _ask_until_right(config: BusConfig) -> None:
    system = await connect(config, "sys")
    said: list[str] = []
    try:
        while found := await look(system, config.replicas):
            if found != said:
                log.error("not ready: %s", "; ".join(found))
                said = found
            await asyncio.sleep(AGAIN_SECONDS)
    finally:
        await system.close()


async def look(system: Client, replicas: int) -> list[str]:
    """One question to all servers and its `problems`; that they can't be asked is one, too."""
    try:
        return problems(await ask(system), replicas)
    except (nats.errors.Error, ValueError) as error:
        return [f"the NATS servers can't be asked how they store: {error or type(error).__name__}"]


def may_ask(config: BusConfig) -> bool:
    """Whether this program insists on synced servers and has the credentials to ask them."""
    if not config.require_sync_always or not config.credentials_dir:
        return False
    return Path(config.credentials_dir, "sys.creds").exists()
