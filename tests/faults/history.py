"""The event history: what the streams hold, and an SSE client that loses its connection all the time."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import httpx
import nats.js.errors

from api_gateway.cursor import OWNERS, parse
from tests.api_gateway.sse_client import Ended, Follower
from volery.contracts.base import Owner
from volery.runtime.bus import Bus
from volery.runtime.relay import stream_name
from volery.runtime.tail import Broken, follow

Event = dict[str, Any]


@dataclass(frozen=True)
class Object:
    """One object as its last event left it."""

    document: Event
    revisions: tuple[int, ...]
    deleted: bool


async def history(bus: Bus, owner: Owner) -> list[tuple[int, Event]]:
    """Every event of an owner's stream with its position; asked again until it was read whole."""
    while True:
        found: list[tuple[int, Event]] = []
        try:
            async with follow(bus.client, stream_name(owner), 0) as tail:
                if tail.standing.last == 0:
                    return []
                async for heard in tail:
                    found.append((heard.position, json.loads(heard.body)))
                    if heard.position >= tail.standing.last:
                        return found
        except (Broken, nats.js.errors.Error, TimeoutError):
            await asyncio.sleep(0.2)


def owner_of(event: Event) -> Owner:
    return Owner(event["source"].rpartition("/")[2])


def objects(events: list[tuple[int, Event]]) -> dict[str, Object]:
    """`noun/id` → the object. Raises AssertionError for a revision that is missing, twice or out of order."""
    found: dict[str, Object] = {}
    for position, event in events:
        document = event["data"]
        if "revision" not in document:
            continue
        key, revision = event["subject"], document["revision"]
        before = found.get(key)
        revisions = before.revisions if before else ()
        if revision != (revisions[-1] + 1 if revisions else 1) or (before and before.deleted):
            raise AssertionError(f"position {position}: {key} has revision {revision} after {revisions[-3:]}")
        found[key] = Object(document, (*revisions, revision), event["type"].endswith(".deleted"))
    return found


@dataclass
class Witness:
    """Follows the events over SSE, hangs up at random moments and comes back with its cursor."""

    http: httpx.AsyncClient
    rng: random.Random
    seen: dict[Owner, list[int]] = field(default_factory=lambda: defaultdict(list))
    began: dict[Owner, int] = field(default_factory=dict)
    connections: int = 0

    async def watch(self, begun: asyncio.Event) -> None:
        """Until cancelled. `begun` is set with the first cursor. Raises httpx.HTTPStatusError, e.g. for 410."""
        follower = Follower(self.http)
        while True:
            leave_after = self.rng.randint(1, 300)
            try:
                async for received in follower.events():
                    if not begun.is_set():
                        self.began = dict(zip(OWNERS, parse(follower.cursor).positions, strict=True))
                        begun.set()
                    if received is not None:
                        self.seen[owner_of(received.event)].append(int(received.event["sequence"]))
                        leave_after -= 1
                    if leave_after <= 0:
                        break
            except (Ended, httpx.TransportError):
                await asyncio.sleep(0.05)
            except httpx.HTTPStatusError as error:
                if error.response.status_code not in (500, 502, 503, 504):
                    raise
                await asyncio.sleep(0.2)
            self.connections += 1

    async def saw_all(self, last: dict[Owner, int], seconds: float = 60.0) -> None:
        """Every event up to these positions was seen once, in order. Raises AssertionError."""
        until = time.monotonic() + seconds
        for owner, position in last.items():
            first = self.began[owner] + 1
            while (self.seen[owner] or [first - 1])[-1] < position and time.monotonic() < until:
                await asyncio.sleep(0.1)
            found = self.seen[owner]
            wanted = list(range(first, max(position, found[-1] if found else 0) + 1))
            if found != wanted:
                wrong = next((p for p in zip(found, wanted, strict=False) if p[0] != p[1]), (len(found), 0))
                raise AssertionError(f"SSE: {owner} {len(found)} of {len(wanted)} events, at {wrong}")
